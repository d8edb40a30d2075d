"""A bench that predicts instead of measuring, and says so in everything that it gives."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from dilap import backends
from dilap.core.codec import file_sha256
from dilap.core.measurement import Measurement
from dilap.core.progress import Progress
from dilap.core.shape import Architecture
from dilap.core.workload import Workload
from dilap.job.bench import Bench
from dilap.profilers.devices.device import Device
from dilap.profilers.tables.fit import LatencyModel
from dilap.profilers.tables.roofline import describe, estimated_fingerprint, predict_ns, roofline


@dataclass(frozen=True, kw_only=True)
class EstimatedBench(Bench):
    """Exports as any bench does; its seconds come from published numbers alone."""

    measured: ClassVar[str] = "estimated"

    @classmethod
    def of(
        cls,
        devices: Sequence[Device],
        backend_name: str,
        workload: Workload,
        progress: Progress,
        *,
        force: bool = False,
        tables: Path | None = None,  # noqa: ARG003 - an estimate has none
    ) -> "EstimatedBench":
        """Raises InvalidInput for unknown names. Neither the device nor the runtime need be here."""
        device, backend = devices[0], backends.get(backend_name)
        backends.require_precision(backend, workload.precision)
        progress.say(f"ESTIMATED: {describe(device)} stands for {device.name}, nothing is measured")
        return cls(device=device, backend=backend, workload=workload, progress=progress, force=force)

    def latency_model(self, architecture: Architecture) -> LatencyModel:
        cache_bits = self.backend.cache_bits(self.workload)
        return roofline(architecture, self.workload, self.device, cache_bits=cache_bits)

    def measure(self, paths: Sequence[Path], *, final: bool = False) -> list[Measurement]:  # noqa: ARG002
        """The first is the dense model, whose roofline the others are cut from."""
        architectures = [self.read_artifact(path.parent).architecture for path in paths]
        return [
            self._prediction(architectures[0], architecture, sha256=file_sha256(path))
            for path, architecture in zip(paths, architectures, strict=True)
        ]

    def measure_widths(
        self,
        dense: Path,
        architecture: Architecture,
        path: Path,  # noqa: ARG002
    ) -> list[Measurement]:
        whole = self.read_artifact(dense.parent).architecture
        return [*self.measure([dense]), self._prediction(whole, architecture, sha256="")]

    def _prediction(self, dense: Architecture, architecture: Architecture, *, sha256: str) -> Measurement:
        model = self.latency_model(dense)
        return Measurement(
            artifact_sha256=sha256,
            workload=self.workload,
            fingerprint=estimated_fingerprint(self.device, backend=self.backend.name),
            samples_ns=(predict_ns(model, architecture.layers),),
            rounds=(0,),
            peak_memory_bytes=None,
            load_seconds=0.0,
            started="",
            status="estimated",
            note=f"{describe(self.device)}, not measured",
        )

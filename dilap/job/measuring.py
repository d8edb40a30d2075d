"""Measuring on one device, in one runtime, under one workload: what jobs of all kinds of models ask their target."""

import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from dilap import backends
from dilap.backends import Backend
from dilap.core.artifact import Artifact, HowToRun
from dilap.core.codec import checked, decode, digest, encode, read_json, write_json
from dilap.core.errors import Unavailable
from dilap.core.measurement import Measurement
from dilap.core.progress import Progress
from dilap.core.workload import Statistic, Workload
from dilap.job.outputs import home_of, name_of
from dilap.profilers import intervals
from dilap.profilers.configuration import Configuration
from dilap.profilers.devices.device import Device
from dilap.profilers.profiler import Case, Profiler
from dilap.profilers.protocol import FINAL, TABLE, Protocol
from dilap.profilers.tables.roofline import describe

# A measurement is repeated so many times at most while other processes use the cores or the device runs slower than it
# can: both spoil even ratios of interleaved samples.
_REPEATS = 2
# Slower by this much, and by more than the interval of fresh starts explains, is another state of the device. Seen on a
# virtual machine whose neighbours took memory bandwidth for an hour: the dense model took 25.0 ms instead of 20.2, and
# a pruned one, which reads less, used 93.7 % [90.7, 96.8] of a budget of which it uses 101.6 % [99.9, 102.9] when all
# is quiet. Less is usual: on another quiet one it was 6 to 8 % from one minute to the next.
_SLOWER = 0.10


@dataclass(frozen=True, kw_only=True)
class Usual:
    """What the dense model takes when the device is undisturbed, as far as the job has seen."""

    seconds: float
    statistic: Statistic

    def excess(self, dense: Measurement) -> str | None:
        """Say how much slower the dense model was in a measurement with fresh starts; None where that is only noise."""
        found = intervals.latency(dense, self.statistic)
        if found.low <= (1 + _SLOWER) * self.seconds:
            return None
        return (
            f"the device is slower than before: the dense model took {found.value * 1e3:.4g} ms instead of "
            f"{self.seconds * 1e3:.4g}"
        )


@dataclass(frozen=True, kw_only=True)
class MeasuringBench(ABC):
    """A device, a runtime and a workload, for which a job measures.

    `helpers` are further devices of the same kind, which measure part of a latency table. With `estimate` nothing is
    measured: latencies come from a roofline of the device's published numbers, and are marked as estimated.
    `precisions` are those that parts of a model may have, the best first; a latency table is measured in all of them.
    Empty, they are the workload's own one alone.
    """

    device: Device
    backend: Backend
    workload: Workload
    progress: Progress
    helpers: tuple[Device, ...] = ()
    force: bool = False
    tables: Path | None = None  # where tables and configurations are kept; `tables/` by default
    estimate: bool = False
    precisions: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        devices: Sequence[Device],
        backend_name: str,
        workload: Workload,
        progress: Progress,
        *,
        force: bool = False,
        tables: Path | None = None,
        estimate: bool = False,
    ) -> Self:
        """Return the bench of the first of `devices`; the others are its helpers.

        Raises InvalidInput for unknown names, and Unavailable where the device or the runtime cannot be used from here.
        An estimate needs neither of them.
        """
        device, *helpers = devices
        backend = backends.get(backend_name)
        if estimate:
            progress.say(f"ESTIMATED: {describe(device)} stands for {device.name}, nothing is measured")
        elif (reason := device.unavailable()) or (device.location is None and (reason := backend.unavailable())):
            raise Unavailable(reason)
        cls.require_precision(backend, workload.precision)
        return cls(
            device=device,
            backend=backend,
            workload=workload,
            progress=progress,
            helpers=tuple(helpers),
            force=force,
            tables=tables,
            estimate=estimate,
        )

    @staticmethod
    @abstractmethod
    def require_precision(backend: Backend, precision: str) -> None:
        """Raise InvalidInput or Unsupported for a precision in which the runtime runs no such models."""

    @abstractmethod
    def estimates(self, cases: Sequence[Case]) -> list[Measurement]:
        """Return estimates for model files, the dense model as the first one."""

    @property
    def others(self) -> tuple[str, ...]:
        """The precisions that parts of a model may have beside the workload's own, which is the artifact's."""
        return tuple(one for one in self.precisions if one != self.workload.precision)

    @property
    def measured(self) -> str:
        """How its latencies were got, in one word for messages."""
        return "estimated" if self.estimate else "measured"

    @cached_property
    def profiler(self) -> Profiler:
        return Profiler(self.device, backend=self.backend.name, force=self.force)

    def protocol(self, protocol: Protocol) -> Protocol:
        """Return `protocol` with the pauses that this device needs to cool down."""
        device = self.device
        return replace(protocol, back_off_seconds=device.back_off_seconds, max_back_offs=device.max_back_offs)

    def read_artifact(self, folder: Path) -> Artifact:
        """Read the sidecar of the artifact in `folder`. Raises InvalidInput."""
        path = folder / "artifact.json"
        return decode(Artifact, read_json(path), source=str(path))

    def measure(self, paths: Sequence[Path]) -> list[Measurement]:
        """Measure model files in interleaved rounds, under the bench's own workload; see `measure_cases`."""
        return self.measure_cases([Case(path=path, workload=self.workload) for path in paths])

    def measure_cases(self, cases: Sequence[Case], *, final: bool = False) -> list[Measurement]:
        """Measure every case in interleaved rounds, and return one measurement for each.

        `final` is for claims: it takes fresh starts and a narrower interval. All cases are measured again, twice at
        most, while other processes use the cores. In an estimate the first case has to be the dense model, whose
        roofline gives the latency of the others. Whoever claims something calls `measure_final`.
        """
        if self.estimate:
            return self.estimates(cases)
        protocol = self.protocol(FINAL if final else TABLE)
        with self.progress.bar("measure", total=None, unit="") as bar:
            found = self.profiler.measure(cases, protocol, progress=bar.set_postfix_str)
            for _ in range(_REPEATS):
                if all(one.status != "contended" for one in found):
                    break
                self.progress.say("other processes used the cores: measuring again")
                found = self.profiler.measure(cases, protocol, progress=bar.set_postfix_str)
        return found

    def measure_final(self, cases: Sequence[Case], usual: Usual | None) -> list[Measurement]:
        """Measure every case for a claim, the dense model as the first; see `measure_cases`.

        `usual` is what the dense model takes when the device is undisturbed. While it takes clearly longer, all cases
        are measured again, twice at most; if that does not help, they are marked as contended.
        """
        found = self.measure_cases(cases, final=True)
        if usual is None or self.estimate:
            return found
        for left in reversed(range(1 + _REPEATS)):
            if (excess := usual.excess(found[0])) is None:
                return found
            if left:
                self.progress.say(f"{excess}: measuring again")
                found = self.measure_cases(cases, final=True)
        advice = "repeat when it is quiet and cool, or measure the latency table again if this is its speed now"
        return [replace(one, status="contended", note=f"{excess}; {advice}") for one in found]

    def measure_beside(
        self, dense: Path, path: Path, *, probe: Callable[[Path], Artifact], usual: Usual | None
    ) -> list[Measurement]:
        """Measure the dense model beside one that `probe` writes into a folder; see `measure_final`.

        The two measurements are kept in the file `path`, where a continued run finds them, unless they are contended.
        """
        if path.exists():
            return list(checked(tuple[Measurement, ...], read_json(path).get("measurements"), source=str(path)))
        folder = path.with_suffix("")
        shutil.rmtree(folder, ignore_errors=True)
        made = probe(folder)
        cases = [Case(path=one, workload=self.workload) for one in (dense, folder / made.path)]
        measurements = self.measure_final(cases, usual)
        shutil.rmtree(folder)
        if all(one.status != "contended" for one in measurements):
            write_json(path, {"measurements": [asdict(one) for one in measurements]})
        return measurements

    @abstractmethod
    def find_configuration(self, path: Path, *, threads: Sequence[int]) -> Configuration:
        """Return the fastest configuration for the model file `path`, with one of the given numbers of threads."""

    def kept_configuration(self, kept: Path, *, threads: Sequence[int], dense: Callable[[], Path]) -> Configuration:
        """Return the fastest configuration for a model, which is looked for once and kept in the file `kept`.

        `dense` returns the file of the dense model.
        """
        if not kept.exists():
            write_json(kept, encode(self.find_configuration(dense(), threads=threads)))
        return decode(Configuration, read_json(kept), source=str(kept))

    def note_how_to_run_(self, folder: Path) -> None:
        """Write into an artifact's sidecar how to run it in the stock runtime, configured as it is measured here."""
        artifact = self.read_artifact(folder)
        run = HowToRun(
            work=self.workload.describe(),
            threads=self.workload.threads,
            switches=self.workload.switches,
            commands=self.backend.how_to_run(artifact.path, self.workload),
        )
        if artifact.run != run:
            write_json(folder / "artifact.json", encode(replace(artifact, run=run)))

    @property
    def helping_profilers(self) -> list[Profiler]:
        """Those of the helpers, which share the work of a latency table."""
        return [Profiler(one, backend=self.backend.name, force=self.force) for one in self.helpers]

    def kept_path(self, model: str, shape: object, more: list[Any]) -> Path:
        """Return the file, without an ending that says what it holds, of what is kept of a model for later runs.

        Every device, runtime, workload, `shape` of the model (as plain values) and `more` have a file of their own, and
        so has every way of measuring that differs in how warm the caches are.
        """
        fingerprint = replace(self.profiler.fingerprint(), soft={})
        key = digest([asdict(fingerprint), asdict(self.workload), shape, TABLE.lead_in_seconds, *more])
        stem = f"{name_of(model)}-{self.device.name}-{self.backend.name}"
        folder = self.tables or home_of(model) / "tables"
        return folder / f"{stem}-{self.workload.phase}-{self.workload.precision}-{key[:8]}.jsonl"

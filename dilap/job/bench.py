"""One target, runtime and workload: everything that a job asks of them."""

import shutil
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from dilap import backends, export
from dilap.backends import Backend
from dilap.core.artifact import Artifact, HowToRun
from dilap.core.codec import checked, decode, digest, encode, file_sha256, read_json, scratch_folder, write_json
from dilap.core.errors import Unavailable
from dilap.core.measurement import Measurement
from dilap.core.plan import Plan, full_plan
from dilap.core.printable import joined
from dilap.core.progress import Progress, say_lines
from dilap.core.shape import Architecture
from dilap.core.workload import Workload
from dilap.job.outputs import home_of, name_of
from dilap.models.anatomy import architecture_of
from dilap.models.load import Source
from dilap.profilers.configuration import Configuration, MeasuredWorld, find_fastest
from dilap.profilers.devices.device import Device
from dilap.profilers.profiler import Case, Profiler
from dilap.profilers.protocol import FINAL, TABLE, Protocol
from dilap.profilers.tables.fit import LatencyModel
from dilap.profilers.tables.probes import build_table, default_levels
from dilap.profilers.tables.roofline import describe, estimated, roofline
from dilap.profilers.tables.table import LatencyTable

_REPEATS = 2


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Exports to one runtime and measures on one device; `helpers` of its kind measure part of the table.

    With `estimate` nothing is measured: a roofline of the device's published numbers stands for it, and whatever comes
    of it says so.
    """

    device: Device
    backend: Backend
    workload: Workload
    progress: Progress
    helpers: tuple[Device, ...] = ()
    force: bool = False
    tables: Path | None = None  # where tables and configurations are kept; `tables/` by default
    estimate: bool = False

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
    ) -> "Bench":
        """The first device is the one. Raises InvalidInput for unknown names, Unavailable for what is not here; an
        estimate needs neither the device nor the runtime."""
        device, *helpers = devices
        backend = backends.get(backend_name)
        if estimate:
            progress.say(f"ESTIMATED: {describe(device)} stands for {device.name}, nothing is measured")
        elif (reason := device.unavailable()) or (device.location is None and (reason := backend.unavailable())):
            raise Unavailable(reason)
        backends.require_precision(backend, workload.precision)
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

    @property
    def measured(self) -> str:
        """The word for its seconds."""
        return "estimated" if self.estimate else "measured"

    def estimated_model(self, architecture: Architecture) -> LatencyModel:
        """What stands for a latency table where nothing is measured."""
        cache_bits = self.backend.cache_bits(self.workload)
        return roofline(architecture.envelope, self.workload, self.device, cache_bits=cache_bits)

    @cached_property
    def profiler(self) -> Profiler:
        return Profiler(self.device, backend=self.backend.name, force=self.force)

    def _protocol(self, protocol: Protocol) -> Protocol:
        """With the pauses that this device needs to cool."""
        device = self.device
        return replace(protocol, back_off_seconds=device.back_off_seconds, max_back_offs=device.max_back_offs)

    def export(self, source: Source, plan: Plan, folder: Path) -> Artifact:
        """The source's model as it stands, verified."""
        return export.get(self.backend.name).export(
            source.model,
            tokenizer=source.tokenizer_path,
            precision=self.workload.precision,
            plan_digest=plan.digest,
            out=folder,
        )

    def read_artifact(self, folder: Path) -> Artifact:
        path = folder / "artifact.json"
        return decode(Artifact, read_json(path), source=str(path))

    def measure(self, paths: Sequence[Path], *, final: bool = False) -> list[Measurement]:
        """Measure models interleaved; for a final claim with fresh starts and a narrower interval.

        Other load spoils even ratios of interleaved samples (88.9 % and then 121.9 % of one budget were seen), so a
        measurement beside which other processes used the cores is taken again, twice at most.
        """
        return self.measure_cases([Case(path=path, workload=self.workload) for path in paths], final=final)

    def measure_cases(self, cases: Sequence[Case], *, final: bool = False) -> list[Measurement]:
        """The same of models under workloads of their own; an estimate takes the first for the dense model, whose
        roofline the others are cut from."""
        if self.estimate:
            shapes = [(self.read_artifact(one.path.parent).architecture, file_sha256(one.path)) for one in cases]
            return self._estimates(shapes[0][0], shapes)
        protocol = self._protocol(FINAL if final else TABLE)
        with self.progress.bar("measure", total=None, unit="") as bar:
            found = self.profiler.measure(cases, protocol, progress=bar.set_postfix_str)
            for _ in range(_REPEATS):
                if all(one.status != "contended" for one in found):
                    break
                self.progress.say("other processes used the cores: measuring again")
                found = self.profiler.measure(cases, protocol, progress=bar.set_postfix_str)
        return found

    def measure_widths(self, dense: Path, architecture: Architecture, path: Path) -> list[Measurement]:
        """The dense model and a random one of `architecture`, as for a claim; kept in `path` for a run that goes on."""
        if self.estimate:
            whole = self.read_artifact(dense.parent).architecture
            return self._estimates(whole, [(whole, file_sha256(dense)), (architecture, "")])
        if not path.exists():
            folder = path.with_suffix("")
            exporter = export.get(self.backend.name)
            shutil.rmtree(folder, ignore_errors=True)
            probe = exporter.export_probe(architecture, precision=self.workload.precision, seed=0, out=folder)
            measurements = self.measure([dense, folder / probe.path], final=True)
            shutil.rmtree(folder)
            write_json(path, {"measurements": [asdict(one) for one in measurements]})
        return list(checked(tuple[Measurement, ...], read_json(path).get("measurements"), source=str(path)))

    def _estimates(self, dense: Architecture, shapes: Sequence[tuple[Architecture, str]]) -> list[Measurement]:
        """Estimates for models given by their shape and the SHA-256 of their file."""
        model = self.estimated_model(dense)
        return [
            estimated(model, shape.layers, device=self.device, backend=self.backend.name, artifact_sha256=sha256)
            for shape, sha256 in shapes
        ]

    def find_configuration(self, path: Path, *, threads: Sequence[int]) -> Configuration:
        """The fastest configuration for the model in `path`, in one of those numbers of threads."""
        artifact = self.read_artifact(path.parent)
        world = MeasuredWorld(
            backend=self.backend,
            vocab_size=artifact.architecture.vocab_size,
            measure=lambda workloads: self.measure_cases([Case(path=path, workload=one) for one in workloads]),
            diverge=lambda base, other, tokens: self.divergence(path, base, other, tokens),
        )
        return find_fastest(self.workload, backend=self.backend, threads=threads, world=world, tell=self.progress.say)

    def divergence(self, path: Path, base: Workload, other: Workload, tokens: Sequence[int]) -> float | None:
        """Mean KL in nats a token of a model under `other` from the same under `base`; None where it cannot be seen."""
        return self.profiler.divergence(path, base, other, tokens)

    def note_how_to_run_(self, folder: Path) -> None:
        """Write into the sidecar of an artifact how the stock runtime runs it as it is measured here."""
        artifact = self.read_artifact(folder)
        run = HowToRun(
            work=self.workload.describe(),
            threads=self.workload.threads,
            switches=self.workload.switches,
            commands=self.backend.how_to_run(artifact.path, self.workload),
        )
        if artifact.run != run:
            write_json(folder / "artifact.json", encode(replace(artifact, run=run)))

    def configuration_path(self, model: str, architecture: Architecture, *, threads: Sequence[int]) -> Path:
        """Where the fastest configuration for a model lies, beside its table."""
        return self._kept_path(model, architecture, [list(threads)]).with_suffix(".configuration.json")

    def table_path(self, model: str, architecture: Architecture) -> Path:
        """Where this bench's table of a model lies by default: another device, runtime or workload, another file."""
        return self._kept_path(model, architecture, [])

    def _kept_path(self, model: str, architecture: Architecture, more: list[Any]) -> Path:
        fingerprint = replace(self.profiler.fingerprint(), soft={})
        key = digest([asdict(fingerprint), asdict(self.workload), asdict(architecture.envelope), *more])
        stem = f"{name_of(model)}-{self.device.name}-{self.backend.name}"
        folder = self.tables or home_of(model) / "tables"
        return folder / f"{stem}-{self.workload.phase}-{self.workload.precision}-{key[:8]}.jsonl"

    def build_table(self, architecture: Architecture, path: Path) -> LatencyTable:
        """Measure what `path` lacks of the table, with a progress bar.

        Costs go by widths, so the table of a model whose layers differ is that of the widest of them.
        """
        architecture = architecture.envelope
        capabilities = self.backend.capabilities(architecture, precision=self.workload.precision)
        attention_levels, ffn_levels = default_levels(architecture, capabilities)
        with self.progress.bar("latency table", total=None, unit="probe") as bar:

            def show(done: int, total: int, text: str) -> None:
                bar.total, bar.n = total, done
                bar.set_postfix_str(text)

            table = build_table(
                architecture,
                profiler=self.profiler,
                helpers=[Profiler(one, backend=self.backend.name, force=self.force) for one in self.helpers],
                workload=self.workload,
                path=path,
                attention_levels=attention_levels,
                ffn_levels=ffn_levels,
                protocol=self._protocol(TABLE),
                progress=show,
            )
        say_lines(self.progress, describe_errors(table))
        return table

    def read_table(self, path: Path, architecture: Architecture) -> LatencyTable:
        """A table measured earlier. Raises Mismatch where it was measured for anything else than this bench."""
        table = LatencyTable.read(path)
        table.require_usable(
            fingerprint=self.profiler.fingerprint(),
            workload=self.workload,
            architecture=architecture.envelope,
            backend=self.backend.name,
        )
        say_lines(self.progress, describe_errors(table))
        return table


def kept_configuration(
    bench: Bench, source: Source, *, threads: Sequence[int], dense: Path | None = None
) -> Configuration:
    """The fastest configuration for a model, found once, so that all runs share one table.

    `dense` is the model's file; without it the model is exported for this alone.
    """
    architecture = architecture_of(source.model)
    kept = bench.configuration_path(source.name, architecture, threads=threads)
    if not kept.exists():
        with scratch_folder(kept) as folder:
            if dense is None:
                place = folder / "dense"
                dense = place / bench.export(source, full_plan(architecture, base=source.digest), place).path
            write_json(kept, encode(bench.find_configuration(dense, threads=threads)))
    return decode(Configuration, read_json(kept), source=str(kept))


def describe_errors(table: LatencyTable) -> str:
    """How well a table predicts plans that took no part in its fit, and what has to be known of it."""
    model = table.model()
    errors = model.holdout_errors()
    said = f"latency table fitted by {model.method}"
    if errors:
        said += (
            f": on {len(errors)} held-out random plans the prediction is off by {statistics.median(errors):.1%} "
            f"(median), {max(errors):.1%} (worst)"
        )
    else:
        said += "; it has no held-out plans yet"
    return joined([said, *model.caveats])

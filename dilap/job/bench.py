"""Exporting to one runtime and measuring on one device: everything that a job asks of its target."""

import shutil
import statistics
from collections.abc import Mapping, Sequence
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
from dilap.core.shape import UNMIXED, Architecture
from dilap.core.workload import Statistic, Workload
from dilap.job.outputs import home_of, name_of
from dilap.job.precisions import offered_precisions
from dilap.models.anatomy import architecture_of
from dilap.models.load import Source
from dilap.profilers import intervals
from dilap.profilers.configuration import Configuration, MeasuredWorld, find_fastest
from dilap.profilers.devices.device import Device
from dilap.profilers.profiler import Case, Profiler
from dilap.profilers.protocol import FINAL, TABLE, Protocol
from dilap.profilers.tables.model import LatencyModel
from dilap.profilers.tables.probes import build_table, default_levels
from dilap.profilers.tables.roofline import describe, estimated, roofline
from dilap.profilers.tables.table import LatencyTable

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
class Bench:
    """A device, a runtime and a workload, for which a job exports, measures and predicts.

    `precisions` are those that parts of a model may have, the best first; a latency table is measured in all of them.
    Empty, they are the workload's own one alone. `helpers` are further devices of the same kind, which measure part of
    the table. With `estimate` nothing is measured: latencies come from a roofline of the device's published numbers,
    and are marked as estimated.
    """

    device: Device
    backend: Backend
    workload: Workload
    progress: Progress
    precisions: tuple[str, ...] = ()
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

    def mixing(self, asked: tuple[str, ...] | None, architecture: Architecture) -> "Bench":
        """Return the bench where parts of models of this architecture may have the precisions `asked` for.

        None stands for all that the runtime has. Raises InvalidInput or Unsupported for those in which the runtime does
        not hold such models.
        """
        for precision in (self.workload.precision, *(asked or ())):
            backends.require_precision(self.backend, precision)
            backends.require_loadable(self.backend, architecture, precision=precision)
        found = offered_precisions(asked, self.backend, architecture, own=self.workload.precision)
        return replace(self, precisions=found)

    @property
    def others(self) -> tuple[str, ...]:
        """The precisions that parts of a model may have beside the workload's own, which is the artifact's."""
        return tuple(one for one in self.precisions if one != self.workload.precision)

    @property
    def measured(self) -> str:
        """How its latencies were got, in one word for messages."""
        return "estimated" if self.estimate else "measured"

    def estimated_model(self, architecture: Architecture) -> LatencyModel:
        """Return the roofline of the device, which takes the place of a fitted latency table in an estimate."""
        cache_bits = self.backend.cache_bits(self.workload)
        return roofline(
            architecture.envelope, self.workload, self.device, cache_bits=cache_bits, precisions=self.others
        )

    @cached_property
    def profiler(self) -> Profiler:
        return Profiler(self.device, backend=self.backend.name, force=self.force)

    def _protocol(self, protocol: Protocol) -> Protocol:
        """Return `protocol` with the pauses that this device needs to cool down."""
        device = self.device
        return replace(protocol, back_off_seconds=device.back_off_seconds, max_back_offs=device.max_back_offs)

    def export(self, source: Source, plan: Plan, folder: Path, *, precision: str | None = None) -> Artifact:
        """Export the source's model as it is now into `folder`, and verify it against torch.

        `plan` is the one that the model was cut by; its parts have the `precision` given, by default the workload's,
        unless the plan names another. Raises the exporter's errors, VerificationFailed among them.
        """
        return export.get(self.backend.name).export(
            source.model,
            tokenizer=source.tokenizer_path,
            precision=precision or self.workload.precision,
            precisions=plan.pruned_precisions(),
            plan_digest=plan.digest,
            out=folder,
        )

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
            artifacts = [(one.path, self.read_artifact(one.path.parent)) for one in cases]
            shapes = [(one.decoder, file_sha256(path), self._mix_of(one)) for path, one in artifacts]
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

    def measure_widths(
        self,
        dense: Path,
        architecture: Architecture,
        path: Path,
        *,
        usual: Usual | None,
        precisions: Mapping[str, str] = UNMIXED,
    ) -> list[Measurement]:
        """Measure the dense model beside a model of shape `architecture` with random weights; see `measure_final`.

        `precisions` has those of the parts that are not in the workload's own. The two measurements are kept in the
        file `path`, where a continued run finds them, unless they are contended.
        """
        if self.estimate:
            whole = self.read_artifact(dense.parent).decoder
            return self._estimates(whole, [(whole, file_sha256(dense), UNMIXED), (architecture, "", precisions)])
        if path.exists():
            return list(checked(tuple[Measurement, ...], read_json(path).get("measurements"), source=str(path)))
        folder = path.with_suffix("")
        exporter = export.get(self.backend.name)
        shutil.rmtree(folder, ignore_errors=True)
        probe = exporter.export_probe(
            architecture, precision=self.workload.precision, precisions=precisions, seed=0, out=folder
        )
        cases = [Case(path=one, workload=self.workload) for one in (dense, folder / probe.path)]
        measurements = self.measure_final(cases, usual)
        shutil.rmtree(folder)
        if all(one.status != "contended" for one in measurements):
            write_json(path, {"measurements": [asdict(one) for one in measurements]})
        return measurements

    def _estimates(
        self, dense: Architecture, shapes: Sequence[tuple[Architecture, str, Mapping[str, str]]]
    ) -> list[Measurement]:
        """Return estimates for models that are given by their shape, the SHA-256 of their file, and precisions."""
        models = (self.estimated_model(replace(dense, vocab_size=shape.vocab_size)) for shape, _, _ in shapes)
        return [
            estimated(
                model,
                shape.layers,
                precisions=precisions,
                device=self.device,
                backend=self.backend.name,
                artifact_sha256=sha256,
            )
            for model, (shape, sha256, precisions) in zip(models, shapes, strict=True)
        ]

    def _mix_of(self, artifact: Artifact) -> Mapping[str, str]:
        """Return the precisions, by name, of the parts of an artifact that are not in the workload's own."""
        own = artifact.precision
        parts = artifact.decoder.parts if own != self.workload.precision else ()
        return {**dict.fromkeys(parts, own), **artifact.precisions}

    def find_configuration(self, path: Path, *, threads: Sequence[int]) -> Configuration:
        """Return the fastest configuration for the model file `path`, with one of the given numbers of threads."""
        artifact = self.read_artifact(path.parent)
        world = MeasuredWorld(
            backend=self.backend,
            vocab_size=artifact.decoder.vocab_size,
            measure=lambda workloads: self.measure_cases([Case(path=path, workload=one) for one in workloads]),
            diverge=lambda base, other, tokens: self.divergence(path, base, other, tokens),
        )
        return find_fastest(self.workload, backend=self.backend, threads=threads, world=world, tell=self.progress.say)

    def divergence(self, path: Path, base: Workload, other: Workload, tokens: Sequence[int]) -> float | None:
        """Return the mean KL, in nats a token, of the model file `path` under `other` from the same under `base`.

        None where the device does not show logits.
        """
        return self.profiler.divergence(path, base, other, tokens)

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

    def configuration_path(self, model: str, architecture: Architecture, *, threads: Sequence[int]) -> Path:
        """Return the file that keeps a model's fastest configuration, in the folder of its latency table."""
        return self._kept_path(model, architecture, [list(threads)]).with_suffix(".configuration.json")

    def table_path(self, model: str, architecture: Architecture) -> Path:
        """Return the default file of a model's latency table.

        Every device, runtime, workload, shape of the model and set of precisions has a file of its own.
        """
        return self._kept_path(model, architecture, [list(self.others)] if self.others else [])

    def _kept_path(self, model: str, architecture: Architecture, more: list[Any]) -> Path:
        fingerprint = replace(self.profiler.fingerprint(), soft={})
        key = digest([asdict(fingerprint), asdict(self.workload), asdict(architecture.envelope), *more])
        stem = f"{name_of(model)}-{self.device.name}-{self.backend.name}"
        folder = self.tables or home_of(model) / "tables"
        return folder / f"{stem}-{self.workload.phase}-{self.workload.precision}-{key[:8]}.jsonl"

    def build_table(self, architecture: Architecture, path: Path) -> LatencyTable:
        """Measure the probes that the table in the file `path` still lacks, and return the table.

        A table gives costs by width, so that of a model whose layers differ is measured for the envelope of its layers.
        """
        architecture = architecture.envelope
        (attention_levels, ffn_levels), *others = (
            default_levels(architecture, self.backend.capabilities(architecture, precision=precision))
            for precision in (self.workload.precision, *self.others)
        )
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
                others=dict(zip(self.others, others, strict=True)),
                protocol=self._protocol(TABLE),
                progress=show,
            )
        say_lines(self.progress, describe_errors(table))
        return table

    def read_table(self, path: Path, architecture: Architecture) -> LatencyTable:
        """Read a table that was measured earlier. Raises Mismatch where that was for anything else than this bench."""
        table = LatencyTable.read(path)
        table.require_usable(
            fingerprint=self.profiler.fingerprint(),
            workload=self.workload,
            architecture=architecture.envelope,
            backend=self.backend.name,
            precisions=self.others,
        )
        say_lines(self.progress, describe_errors(table))
        return table


def kept_configuration(
    bench: Bench, source: Source, *, threads: Sequence[int], dense: Path | None = None
) -> Configuration:
    """Return the fastest configuration for a model, which is looked for once and kept: all runs can share one table.

    `dense` is the model's file; without it, the model is exported only for this.
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
    """Say how well a table predicts plans that took no part in its fit, and which caveats it has."""
    model = table.model()
    errors = model.holdout_errors()
    said = f"latency table fitted by {model.method}"
    if errors:
        said += (
            f": on {len(errors)} held-out random plans the prediction is off by {statistics.median(errors):.1%} "
            f"(median), {max(errors):.1%} (worst){_by_precision(model)}"
        )
    else:
        said += "; it has no held-out plans yet"
    return joined([said, *model.caveats])


def _by_precision(model: LatencyModel) -> str:
    """Say how well plans are predicted that are mostly in one precision or another; nothing where there is only one."""
    errors = model.holdout_errors_by_precision()
    said = (f"{statistics.median(some):.1%} mostly in {precision}" for precision, some in errors.items())
    return f": {', '.join(said)}" if len(model.by_precision) > 1 else ""

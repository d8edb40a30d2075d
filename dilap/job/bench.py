"""Exporting decoders to one runtime and measuring them on one device: everything that a job asks of its target."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from dilap import backends, export
from dilap.core.artifact import Artifact
from dilap.core.codec import file_sha256
from dilap.core.measurement import Measurement
from dilap.core.plan import Plan
from dilap.core.progress import say_lines
from dilap.core.shape import UNMIXED, Architecture
from dilap.core.workload import Workload
from dilap.job.measuring import MeasuringBench, Usual
from dilap.job.precisions import offered_precisions
from dilap.job.tables import describe_errors, shown_probes
from dilap.models.load import Source
from dilap.profilers.configuration import Configuration, MeasuredWorld, find_fastest
from dilap.profilers.devices.device import Reach
from dilap.profilers.profiler import Case
from dilap.profilers.protocol import TABLE
from dilap.profilers.tables.model import LatencyModel
from dilap.profilers.tables.probes import build_table, default_levels
from dilap.profilers.tables.roofline import estimated, reaches, roofline
from dilap.profilers.tables.table import LatencyTable


@dataclass(frozen=True, kw_only=True)
class Bench(MeasuringBench):
    """A device, a runtime and a workload, for which a job exports, measures and predicts decoders."""

    require_precision = staticmethod(backends.require_precision)

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

    def estimated_model(self, architecture: Architecture, *, reach: Reach | None = None) -> LatencyModel:
        """Return the roofline of the device, which takes the place of a fitted latency table in an estimate."""
        cache_bits = self.backend.cache_bits(self.workload)
        return roofline(
            architecture.envelope,
            self.workload,
            self.device,
            cache_bits=cache_bits,
            precisions=self.others,
            reach=reach,
        )

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
        exporter = export.get(self.backend.name)

        def probe(folder: Path) -> Artifact:
            return exporter.export_probe(
                architecture, precision=self.workload.precision, precisions=precisions, seed=0, out=folder
            )

        return self.measure_beside(dense, path, probe=probe, usual=usual)

    def estimates(self, cases: Sequence[Case]) -> list[Measurement]:
        """Return estimates for model files, the dense model as the first one."""
        artifacts = [(one.path, self.read_artifact(one.path.parent)) for one in cases]
        shapes = [(one.decoder, file_sha256(path), self._mix_of(one)) for path, one in artifacts]
        return self._estimates(shapes[0][0], shapes)

    def _estimates(
        self, dense: Architecture, shapes: Sequence[tuple[Architecture, str, Mapping[str, str]]]
    ) -> list[Measurement]:
        """Return estimates for models that are given by their shape, the SHA-256 of their file, and precisions."""
        return [
            estimated(
                [
                    self.estimated_model(replace(dense, vocab_size=shape.vocab_size), reach=reach)
                    for reach in reaches(self.device)
                ],
                shape.layers,
                precisions=precisions,
                device=self.device,
                backend=self.backend.name,
                artifact_sha256=sha256,
            )
            for shape, sha256, precisions in shapes
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

    def configuration_path(self, model: str, architecture: Architecture, *, threads: Sequence[int]) -> Path:
        """Return the file that keeps a model's fastest configuration, in the folder of its latency table."""
        return self.kept_path(model, asdict(architecture.envelope), [list(threads)]).with_suffix(".configuration.json")

    def table_path(self, model: str, architecture: Architecture) -> Path:
        """Return the default file of a model's latency table.

        Every device, runtime, workload, shape of the model and set of precisions has a file of its own.
        """
        return self.kept_path(model, asdict(architecture.envelope), [list(self.others)] if self.others else [])

    def build_table(self, architecture: Architecture, path: Path) -> LatencyTable:
        """Measure the probes that the table in the file `path` still lacks, and return the table.

        A table gives costs by width, so that of a model whose layers differ is measured for the envelope of its layers.
        """
        architecture = architecture.envelope
        (attention_levels, ffn_levels), *others = (
            default_levels(architecture, self.backend.capabilities(architecture, precision=precision))
            for precision in (self.workload.precision, *self.others)
        )
        with shown_probes(self.progress) as show:
            table = build_table(
                architecture,
                profiler=self.profiler,
                helpers=self.helping_profilers,
                workload=self.workload,
                path=path,
                attention_levels=attention_levels,
                ffn_levels=ffn_levels,
                others=dict(zip(self.others, others, strict=True)),
                protocol=self.protocol(TABLE),
                progress=show,
            )
        say_lines(self.progress, describe_table(table))
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
        say_lines(self.progress, describe_table(table))
        return table


def describe_table(table: LatencyTable) -> str:
    """Say how well a table predicts plans that took no part in its fit, and which caveats it has."""
    model = table.model()
    return describe_errors(model, more=_by_precision(model))


def _by_precision(model: LatencyModel) -> str:
    """Say how well plans are predicted that are mostly in one precision or another; nothing where there is only one."""
    errors = model.holdout_errors_by_precision()
    said = (f"{statistics.median(some):.1%} mostly in {precision}" for precision, some in errors.items())
    return f": {', '.join(said)}" if len(model.by_precision) > 1 else ""

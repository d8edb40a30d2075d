"""Exporting networks that are no decoders to one runtime and measuring them on one device."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from dilap import backends, export
from dilap.core.artifact import Artifact
from dilap.core.codec import file_sha256
from dilap.core.graph import Network
from dilap.core.measurement import Measurement
from dilap.core.plan import Plan
from dilap.core.progress import say_lines
from dilap.core.rules import NetworkCapabilities
from dilap.job.measuring import MeasuringBench, Usual
from dilap.job.precisions import offered_network_precisions
from dilap.job.tables import describe_errors, shown_probes
from dilap.models.convolutional.cut import shrink_network_
from dilap.models.convolutional.load import NetworkSource
from dilap.models.convolutional.recalibration import recalibrate_
from dilap.models.network import Examples
from dilap.profilers.configuration import Configuration, MeasuredWorld, find_fastest
from dilap.profilers.devices.device import Reach
from dilap.profilers.profiler import Case
from dilap.profilers.protocol import TABLE
from dilap.profilers.tables.networks.estimate import network_roofline
from dilap.profilers.tables.networks.model import NetworkLatency
from dilap.profilers.tables.networks.probes import build_network_table
from dilap.profilers.tables.networks.table import NetworkTable
from dilap.profilers.tables.roofline import estimated, reaches

_NUM_CALIBRATED = 128  # examples, whose activations say the ranges of 8 bits
_NUM_OF_PROBE = 8  # examples on which the batch norms of a network that is only timed are measured


@dataclass(frozen=True, kw_only=True)
class NetworkBench(MeasuringBench):
    """A device, a runtime and a workload, for which a job exports, measures and predicts networks that are no
    decoders.

    `plans` are those of the artifacts that it can estimate.
    """

    plans: tuple[Plan[Network], ...] = ()
    require_precision = staticmethod(backends.require_network_precision)

    def mixing(self, asked: tuple[str, ...] | None) -> "NetworkBench":
        """Return the bench where networks may have the precisions `asked` for. Raises Unsupported."""
        return replace(self, precisions=offered_network_precisions(asked, self.backend, own=self.workload.precision))

    def at(self, precision: str) -> "NetworkBench":
        """Return the bench on which every network is in that precision."""
        return replace(self, workload=replace(self.workload, precision=precision))

    @property
    def capabilities(self) -> NetworkCapabilities:
        return self.backend.network_capabilities(precision=self.workload.precision)

    def export(
        self,
        source: NetworkSource,
        folder: Path,
        *,
        examples: Examples,
        plan_digest: str = "",
        tokenizer: Path | None = None,
        precision: str | None = None,
    ) -> Artifact:
        """Export the source's network as it is now into `folder`, and compare it with torch on examples.

        `tokenizer` is the folder of the one that is put beside the file, and `precision` is by default the workload's.
        Raises the exporter's errors,
        VerificationFailed among them.
        """
        return export.get_network(self.backend.name).export(
            source.model,
            input_=source.input,
            precision=precision or self.workload.precision,
            images=examples[:_NUM_CALIBRATED],
            plan_digest=plan_digest,
            out=folder,
            tokenizer=tokenizer,
        )

    def export_probe(
        self, source: NetworkSource, counts: Mapping[str, int], folder: Path, *, examples: Examples
    ) -> Artifact:
        """Export a network with so many units left in its groups, the first ones, to be timed.

        Its batch norms are measured on some of the `examples`, so that what passes through keeps its size.
        """
        kept = {name: tuple(range(count)) for name, count in counts.items()}
        plan = Plan(base=source.digest, architecture=source.traced.network, kept=kept)
        model = shrink_network_(copy.deepcopy(source.model), plan)
        recalibrate_(model, examples[:_NUM_OF_PROBE])
        return self.export(replace(source, model=model), folder, examples=examples)

    def estimated_costs(self, network: Network, *, reach: Reach | None = None) -> NetworkLatency:
        """Return the roofline of the device, which takes the place of a fitted latency table in an estimate."""
        return network_roofline(network, self.workload, self.device, reach=reach)

    def table_path(self, model: str, network: Network) -> Path:
        """Return the default file of a network's latency table."""
        return self.kept_path(model, asdict(network), [])

    def build_table(self, source: NetworkSource, path: Path, *, examples: Examples) -> NetworkTable:
        """Measure the probes that the table in the file `path` still lacks, and return the table.

        `examples` are those of `export_probe`.
        """

        def write_probe(counts: Mapping[str, int], folder: Path) -> Path:
            return folder / self.export_probe(source, counts, folder, examples=examples).path

        with shown_probes(self.progress) as show:
            table = build_network_table(
                source.traced.network,
                profiler=self.profiler,
                helpers=self.helping_profilers,
                write_probe=write_probe,
                workload=self.workload,
                path=path,
                multiple=self.capabilities.channel_multiple,
                protocol=self.protocol(TABLE),
                progress=show,
            )
        say_lines(self.progress, describe_errors(table.model()))
        return table

    def read_table(self, path: Path, network: Network) -> NetworkTable:
        """Read a table that was measured earlier. Raises Mismatch where that was for anything else than this bench."""
        table = NetworkTable.read(path)
        table.require_usable(
            fingerprint=self.profiler.fingerprint(),
            workload=self.workload,
            network=network,
            backend=self.backend.name,
        )
        say_lines(self.progress, describe_errors(table.model()))
        return table

    def estimates(self, cases: Sequence[Case]) -> list[Measurement]:
        """Return estimates for model files of the bench's plans."""
        plans = {plan.digest: plan for plan in self.plans}
        artifacts = [self.read_artifact(case.path.parent) for case in cases]
        found = [plans[one.plan_digest] for one in artifacts]
        return [
            self._estimate(plan.architecture, plan.counts, precision=artifact.precision, sha256=file_sha256(case.path))
            for plan, artifact, case in zip(found, artifacts, cases, strict=True)
        ]

    def measure_counts(
        self,
        dense: Path,
        network: Network,
        counts: Mapping[str, int],
        path: Path,
        *,
        probe: Callable[[Path], Artifact],
        usual: Usual | None,
    ) -> list[Measurement]:
        """Measure the dense network beside a `probe` with so many units left in its groups; see `measure_beside`.

        The probe is in the bench's own precision, the dense network in that of its artifact.
        """
        if not self.estimate:
            return self.measure_beside(dense, path, probe=probe, usual=usual)
        precision = self.read_artifact(dense.parent).precision
        return [
            self._estimate(network, {}, precision=precision, sha256=file_sha256(dense)),
            self._estimate(network, counts, precision=self.workload.precision, sha256=""),
        ]

    def _estimate(self, network: Network, counts: Mapping[str, int], *, precision: str, sha256: str) -> Measurement:
        """Return an estimate for a file in some precision, under the bench's own workload as a measurement is."""
        there = self.at(precision)
        found = estimated(
            [there.estimated_costs(network, reach=reach) for reach in reaches(self.device)],
            network.widths_at(counts),
            device=self.device,
            backend=self.backend.name,
            artifact_sha256=sha256,
        )
        return replace(found, workload=self.workload)

    def find_configuration(self, path: Path, *, threads: Sequence[int]) -> Configuration:
        """Return the fastest configuration for the model file `path`, with one of the given numbers of threads."""
        known = self.capabilities.switches
        world = MeasuredWorld(
            backend=self.backend,
            measure=lambda workloads: self.measure_cases([Case(path=path, workload=one) for one in workloads]),
        )
        return find_fastest(
            self.workload,
            backend=self.backend,
            threads=threads,
            world=world,
            switches={name: values for name, values in self.backend.switches().items() if name in known},
            tell=self.progress.say,
        )

    def configuration_path(self, model: str, network: Network, *, threads: Sequence[int]) -> Path:
        """Return the file that keeps a network's fastest configuration."""
        return self.kept_path(model, asdict(network), [list(threads)]).with_suffix(".configuration.json")

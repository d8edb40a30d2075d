"""Measure the latency table of a network that is no decoder, or estimate it."""

from collections.abc import Sequence
from pathlib import Path

from dilap.core.progress import Progress
from dilap.job.network_bench import NetworkBench
from dilap.job.network_options import NetworkOptions
from dilap.job.network_prune import describe, load_timed
from dilap.job.profile import Profile, configured, estimated
from dilap.models.convolutional.load import NetworkSource
from dilap.models.network import Examples, random_examples
from dilap.profilers.devices.device import Device
from dilap.profilers.tables.networks.model import NetworkLatency
from dilap.profilers.tables.networks.table import NetworkTable
from dilap.profilers.tables.roofline import reaches

_NUM_EXAMPLES = 16  # of noise: whatever a network is shown, it takes as long


def profile_network(
    options: NetworkOptions,
    *,
    devices: Sequence[Device],
    out: Path | None = None,
    tables: Path | None = None,
    progress: Progress,
) -> Profile[NetworkLatency]:
    """Measure what is missing of a network's latency table, fit it, and return the fit.

    The arguments are those of `dilap.job.profile.profile`.
    """
    bench = NetworkBench.of(
        devices,
        options.backend,
        options.workload,
        progress,
        force=options.force,
        tables=tables,
        estimate=options.estimate,
    )
    source = load_timed(options)
    network = source.traced.network
    progress.say(f"{source.name}: {describe(source.traced, source.input)}")
    progress.say(f"{options.workload.describe()} on {devices[0].label}, {options.backend}")
    if options.estimate:
        return estimated([bench.estimated_costs(network, reach=reach) for reach in reaches(bench.device)])
    examples = _noise(source)

    def write_dense(folder: Path) -> Path:
        return folder / bench.export(source, folder, examples=examples).path

    kept = bench.configuration_path(source.name, network, threads=options.threads_tried)
    begun = NetworkTable.read(out) if out is not None and out.exists() else None
    bench = configured(bench, options, begun=begun, kept=kept, write_dense=write_dense)
    path = out or bench.table_path(source.name, network)
    return Profile(model=bench.build_table(source, path, examples=examples).model(), table=path)


def _noise(source: NetworkSource) -> Examples:
    """Return examples of what a network takes."""
    found: Examples = random_examples(source.model, source.input.size, _NUM_EXAMPLES).numpy()
    return found

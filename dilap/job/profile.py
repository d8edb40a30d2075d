"""Measure a model's latency table on a device, or estimate it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dilap.core.progress import Progress
from dilap.job.bench import Bench, kept_configuration
from dilap.job.options import JobOptions
from dilap.models.anatomy import architecture_of
from dilap.models.context import require_context
from dilap.models.load import load
from dilap.profilers.devices.device import Device
from dilap.profilers.tables.model import LatencyModel
from dilap.profilers.tables.roofline import reaches
from dilap.profilers.tables.table import LatencyTable
from dilap.search.layouts import describe


@dataclass(frozen=True, kw_only=True)
class Profile:
    """The fitted costs of a model, and the file of the table that they come from (None for an estimate).

    `range_seconds` is what the dense model takes at best and at worst by an estimate.
    """

    model: LatencyModel
    table: Path | None
    range_seconds: tuple[float, float] | None = None


def profile(
    options: JobOptions,
    *,
    devices: Sequence[Device],
    out: Path | None = None,
    tables: Path | None = None,
    progress: Progress,
) -> Profile:
    """Measure what is missing of a model's latency table, fit it, and return the fit.

    Of the `options`, those about the model, the runtime and what is timed count. The first of `devices` is the one that
    is asked about; the others are of its kind and share the work. `out` is the table's file, by default one for the
    model, device, runtime, workload and precisions in the folder `tables`.
    """
    workload, backend, model = options.workload, options.backend, options.model
    bench = Bench.of(
        devices, backend, workload, progress, force=options.force, tables=tables, estimate=options.estimate
    )
    source = load(model, merge_adapter=options.merge_adapter, vocabulary=options.vocabulary)
    architecture = architecture_of(source.model)
    bench = bench.mixing(options.precisions, architecture)
    held = bench.backend.capabilities(architecture, precision=workload.precision).max_tokens
    require_context(source.model.config, workload, runtime=backend, runtime_tokens=held)
    progress.say(f"{model}: {describe(architecture)}")
    for note in source.notes:
        progress.say(note)
    mixed = f" (parts in {', '.join(bench.others)} too)" if bench.others else ""
    progress.say(f"{workload.describe()}{mixed} on {devices[0].label}, {backend}")
    if options.estimate:
        best, likely, worst = (bench.estimated_model(architecture, reach=reach) for reach in reaches(devices[0]))
        ends = (best.predict(architecture.layers), worst.predict(architecture.layers))
        return Profile(model=likely, table=None, range_seconds=ends)
    if out is not None and out.exists():  # a table keeps the configuration that it was begun in
        begun = LatencyTable.read(out).header.workload
        bench = replace(bench, workload=replace(workload, threads=begun.threads, switches=begun.switches))
    elif options.configuration == "fastest":
        bench = replace(bench, workload=kept_configuration(bench, source, threads=options.threads_tried).workload)
    progress.say(f"configuration: {bench.workload.configuration}")
    path = out or bench.table_path(model, architecture)
    return Profile(model=bench.build_table(architecture, path).model(), table=path)

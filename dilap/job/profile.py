"""Measure a model's latency table on a device, or estimate it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from dilap.core.codec import scratch_folder
from dilap.core.plan import full_plan
from dilap.core.progress import Progress
from dilap.job.bench import Bench
from dilap.job.measuring import MeasuringBench
from dilap.job.options import CommonOptions, JobOptions
from dilap.models.anatomy import architecture_of
from dilap.models.context import require_context
from dilap.models.load import load
from dilap.profilers.devices.device import Device
from dilap.profilers.tables.model import LatencyModel
from dilap.profilers.tables.networks.model import NetworkLatency
from dilap.profilers.tables.record import RecordedTable
from dilap.profilers.tables.roofline import reaches
from dilap.profilers.tables.table import LatencyTable
from dilap.search.layouts import describe

_Costs = TypeVar("_Costs", LatencyModel, NetworkLatency)
_Bench = TypeVar("_Bench", bound=MeasuringBench)


@dataclass(frozen=True, kw_only=True)
class Profile(Generic[_Costs]):
    """The fitted costs of a model, and the file of the table that they come from (None for an estimate).

    `range_seconds` is what the dense model takes at best and at worst by an estimate.
    """

    model: _Costs
    table: Path | None
    range_seconds: tuple[float, float] | None = None


def profile(
    options: JobOptions,
    *,
    devices: Sequence[Device],
    out: Path | None = None,
    tables: Path | None = None,
    progress: Progress,
) -> Profile[LatencyModel]:
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
        return estimated([bench.estimated_model(architecture, reach=reach) for reach in reaches(bench.device)])

    def write_dense(folder: Path) -> Path:
        return folder / bench.export(source, full_plan(architecture, base=source.digest), folder).path

    kept = bench.configuration_path(model, architecture, threads=options.threads_tried)
    begun = LatencyTable.read(out) if out is not None and out.exists() else None
    bench = configured(bench, options, begun=begun, kept=kept, write_dense=write_dense)
    path = out or bench.table_path(model, architecture)
    return Profile(model=bench.build_table(architecture, path).model(), table=path)


def estimated(models: Sequence[_Costs]) -> Profile[_Costs]:
    """Return an estimate, given the costs with the best, the likely and the worst reach of the device's peaks."""
    best, likely, worst = models
    return Profile(model=likely, table=None, range_seconds=(best.dense_seconds, worst.dense_seconds))


def configured(
    bench: _Bench,
    options: CommonOptions,
    *,
    begun: RecordedTable[Any, Any] | None,
    kept: Path,
    write_dense: Callable[[Path], Path],
) -> _Bench:
    """Return a bench in the configuration in which its table is measured.

    A table that was `begun` keeps its own. Otherwise that is the fastest one, which is looked for once and kept in the
    file `kept`, or the plain one where that is asked for. `write_dense` writes the dense model into a new folder, and
    returns its file.
    """
    if begun is not None:
        own = begun.header.workload
        bench = replace(bench, workload=replace(bench.workload, threads=own.threads, switches=own.switches))
    elif options.configuration == "fastest":
        with scratch_folder(kept) as folder:
            found = bench.kept_configuration(
                kept, threads=options.threads_tried, dense=lambda: write_dense(folder / "dense")
            )
        bench = replace(bench, workload=found.workload)
    bench.progress.say(f"configuration: {bench.workload.configuration}")
    return bench

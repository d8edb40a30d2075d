"""Predicted against measured latency of random plans that no fit has seen.

    tools/bench_latency                        measures a table of SmolLM2-135M and 12 fresh held-out plans
    tools/bench_latency --table T --plans 20   takes a table from dilap-profile

Every plan is measured interleaved with the dense model and compared as a ratio to it, so that the day's speed of the
machine cancels. The held-out plans come from another seed than the table's own.
"""

import argparse
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path

from dilap import backends, export
from dilap.cli.console import Console, run
from dilap.core.shape import Architecture, LayerWidths
from dilap.core.workload import Workload
from dilap.job.bench import Bench
from dilap.models.anatomy import architecture_of
from dilap.models.builtin import DEFAULT_MODEL
from dilap.models.load import load
from dilap.profilers.devices.device import get
from dilap.profilers.profiler import Case, speedup
from dilap.profilers.protocol import TABLE
from dilap.profilers.tables.probes import default_levels, list_probes, probe_architecture
from dilap.profilers.tables.table import LatencyTable

_SEED = 20261122  # another one than that of the tables


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--precision", default="f16")
    parser.add_argument("--phase", choices=["decode", "prefill"], default="decode")
    parser.add_argument("--table", type=Path, help="by default the one in tables/ that fits, measured first")
    parser.add_argument("--plans", type=int, default=12)
    return parser.parse_args()


def _plans(architecture: Architecture, bench: Bench, count: int) -> list[tuple[LayerWidths, ...]]:
    capabilities = bench.backend.capabilities(architecture, precision=bench.workload.precision)
    levels = default_levels(architecture, capabilities)
    probes = list_probes(
        architecture,
        measured=([], []),
        levels=levels,
        uniform=not capabilities.per_layer_widths,
        num_random=0,
        num_holdout=count,
        seed=_SEED,
    )
    return [probe.widths for probe in probes if probe.role == "holdout"]


def _ratios(
    bench: Bench, architecture: Architecture, plans: list[tuple[LayerWidths, ...]]
) -> list[tuple[float, float]]:
    """Return the measured seconds of every plan over those of the dense model, with the interval's relative half-width.

    Plans are measured four at a time, beside the dense model.
    """
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for start in range(0, len(plans), 4):
            paths = []
            for number, widths in enumerate([architecture.layers, *plans[start : start + 4]]):
                out = Path(folder) / f"{start}-{number}"
                shape = replace(architecture, layers=widths)
                probe = export.get(bench.backend.name).export_probe(
                    shape, precision=bench.workload.precision, seed=0, out=out
                )
                paths.append(out / probe.path)
            cases = [Case(path=path, workload=bench.workload) for path in paths]
            dense, *others = bench.profiler.measure(cases, TABLE)
            for other in others:
                ratio = speedup(dense, other)
                found.append((1 / ratio.value, ratio.half_width))
            for path in paths:
                path.unlink()
            bench.progress.say(f"measured {min(start + 4, len(plans))} of {len(plans)} plans ({dense.status})")
    return found


def _main() -> int:
    given = _arguments()
    console = Console()
    workload = Workload(phase=given.phase, precision=given.precision, threads=get("host_cpu").default_threads())
    bench = Bench.of([get("host_cpu")], "llamacpp", workload, console)
    architecture = architecture_of(load(given.model).model)
    table: LatencyTable = bench.build_table(architecture, given.table or bench.table_path(given.model, architecture))
    model = table.model()
    shallow = probe_architecture(architecture, workload, cache_bytes=table.header.fingerprint.last_level_cache_bytes)
    plans = _plans(shallow, bench, given.plans)
    dense = model.predict(shallow.layers)
    errors = []
    print(f"{given.model}, {workload.describe()}, llama.cpp {backends.get('llamacpp').version()}, fit: {model.method}")
    print("plan  predicted / dense  measured / dense  +-       error")
    for number, (widths, (measured, half)) in enumerate(
        zip(plans, _ratios(bench, shallow, plans), strict=True), start=1
    ):
        predicted = model.predict(widths) / dense
        errors.append(abs(predicted / measured - 1))
        print(f"{number:4}  {predicted:17.4f}  {measured:16.4f}  {half:5.2%}  {predicted / measured - 1:+6.2%}")
    print(f"median error {statistics.median(errors):.2%}, worst {max(errors):.2%} on {len(errors)} held-out plans")
    return 0


if __name__ == "__main__":
    run(_main)

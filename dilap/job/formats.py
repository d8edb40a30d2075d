"""The dense model in every precision that the runtime has, which is what quantising alone gives."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dilap.core.artifact import Artifact
from dilap.core.codec import checked, read_json, write_json
from dilap.core.graph import Shape
from dilap.core.measurement import Measurement
from dilap.core.plan import Plan
from dilap.job.claims import Scores
from dilap.job.common_stages import CommonStages, require_measured
from dilap.job.quality import AnyQuality
from dilap.job.result import DenseFormat
from dilap.profilers.profiler import Case, speedup

Files = Mapping[str, tuple[Path, Artifact]]  # the artifact's folder and the artifact, by precision, the best first


def dense_files(stages: CommonStages[Shape], plan: Plan[Shape], *, own: str) -> Files:
    """Export the model in every precision on offer, before it is pruned; return nothing where there is only one.

    `plan` keeps all of it. Its file in the precision `own`, if it has one, is there already: the dense one that ships.
    """
    if not stages.chooses_precision:
        return {}
    found = {}
    for precision in stages.bench.precisions:
        folder = stages.workspace.dense if precision == own else dense_folder(stages, precision)
        found[precision] = folder, stages.artifact(folder, plan, precision=precision)
    return found


def dense_folder(stages: CommonStages[Any], precision: str) -> Path:
    """Return the folder of the dense model's artifact in a precision in which it does not ship."""
    return stages.workspace.common / f"dense-{precision}"


def dense_formats(
    stages: CommonStages[Any], files: Files, scores: Scores[AnyQuality], *, in_torch: AnyQuality
) -> tuple[DenseFormat[AnyQuality], ...]:
    """Measure the dense model in every precision, beside the one that ships, and score its files.

    `in_torch` is the quality of the dense torch model.
    """
    if not files:
        return ()
    base, *measured = _measured(stages, files)
    statistic = stages.options.budget.statistic
    found = []
    for (precision, (folder, artifact)), measurement in zip(files.items(), measured, strict=True):
        require_measured(measurement, artifact, source=str(folder))
        faster = None if measurement.status == "estimated" else speedup(base, measurement, statistic)
        quality = scores.of_artifact(stages, folder, artifact, in_torch=in_torch)
        found.append(
            DenseFormat(
                precision=precision, artifact=artifact, measurement=measurement, speedup=faster, quality=quality
            )
        )
    return tuple(found)


def latency_shares(stages: CommonStages[Any], files: Files) -> dict[str, float]:
    """Return the latency of the dense model in every precision, as a share of that in which it ships."""
    base, *measured = _measured(stages, files)
    found = (speedup(base, one, stages.options.budget.statistic).value for one in measured)
    return {name: 1 / faster for name, faster in zip(files, found, strict=True)}


def _measured(stages: CommonStages[Any], files: Files) -> list[Measurement]:
    """Return the measurement of the dense model that ships and those of all formats, which a continued run finds."""
    path = stages.workspace.common / "formats-latency.json"
    if not path.exists():
        bench, dense = stages.bench, stages.workspace.dense
        paths = [dense / bench.read_artifact(dense).path, *(folder / one.path for folder, one in files.values())]
        with stages.workspace.stage("latency of the dense model in every precision"):
            measured = bench.measure_cases([Case(path=one, workload=bench.workload) for one in paths])
        write_json(path, {"measurements": [asdict(one) for one in measured]})
    return list(checked(tuple[Measurement, ...], read_json(path).get("measurements"), source=str(path)))

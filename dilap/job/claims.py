"""What can be claimed of a pruned model: its file and the dense one are scored, and measured with fresh starts."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from dilap.core.artifact import Artifact
from dilap.core.graph import Shape
from dilap.core.measurement import Interval, Measurement
from dilap.core.plan import Plan
from dilap.evaluation.subject import require_unchanged
from dilap.job.common_stages import CommonStages, Goal, require_measured
from dilap.job.quality import AnyQuality, EmbeddingQuality, PhotoQuality, Quality
from dilap.job.result import PlainDefaults, PruneResult, Side, caveats, versions
from dilap.job.verdict import verdict
from dilap.profilers import intervals
from dilap.profilers.profiler import Case, budget_share, is_shown, speedup
from dilap.search.method import Pruned

_Scored = TypeVar("_Scored", Quality, PhotoQuality, EmbeddingQuality)
Sizes = Callable[[Artifact], tuple[int, int]]  # parameters, and FLOPs of one workload


class Scores(Protocol[_Scored]):
    """Scores the exported files of a job on what no search saw; the score of a file is kept."""

    def of_artifact(self, stages: Any, folder: Path, artifact: Artifact, *, in_torch: _Scored) -> _Scored:
        """Return the quality of a file, or `in_torch` with the reason where it cannot be read here."""


@dataclass(frozen=True, kw_only=True)
class Claim(Generic[AnyQuality]):
    """The dense and the pruned model, scored and measured, and the same in the runtime's plain defaults."""

    dense: Side[AnyQuality]
    pruned: Side[AnyQuality]
    plain: PlainDefaults | None


@dataclass(frozen=True, kw_only=True)
class Calibrated:
    """What a method was calibrated on: `sequences` of texts, of so many tokens each, or photographs or sentences."""

    name: str
    sha256: str
    sequences: int
    length: int | None = None


def claimed(
    stages: CommonStages[Shape],
    goal: Goal,
    plan: Plan[Shape],
    scores: Scores[AnyQuality],
    *,
    in_torch: tuple[AnyQuality, AnyQuality],
    sizes: Sizes,
) -> Claim[AnyQuality]:
    """Export the pruned model, score both files through their runtime, then measure them together.

    `in_torch` are the qualities of the dense and the pruned torch model. Raises Mismatch where a file is replaced
    meanwhile, because a claim must be about the files that were exported.
    """
    workspace, bench = stages.workspace, stages.bench
    folders = workspace.dense, workspace.folder / "artifact"
    stages.artifact(folders[1], plan)
    for folder in folders:
        bench.note_how_to_run_(folder)
    artifacts = bench.read_artifact(folders[0]), bench.read_artifact(folders[1])
    with workspace.stage("score the artifacts"):
        qualities = [
            scores.of_artifact(stages, folder, artifact, in_torch=quality)
            for folder, artifact, quality in zip(folders, artifacts, in_torch, strict=True)
        ]
    with workspace.stage("latency for the claim"):
        paths = [folder / one.path for folder, one in zip(folders, artifacts, strict=True)]
        measurements, plain = measured(stages, goal, paths)
    for folder, artifact, measurement in zip(folders, artifacts, measurements, strict=True):
        require_measured(measurement, artifact, source=str(folder))
        require_unchanged(folder, artifact)
    dense, pruned = (
        _side(stages, *parts, sizes=sizes) for parts in zip(artifacts, measurements, qualities, in_torch, strict=True)
    )
    return Claim(dense=dense, pruned=pruned, plain=plain)


def measured(
    stages: CommonStages[Any], goal: Goal, paths: Sequence[Path]
) -> tuple[list[Measurement], PlainDefaults | None]:
    """Measure both models in the configuration found and, where it differs, in the runtime's plain defaults."""
    found = stages.configuration
    workloads = [stages.bench.workload]
    if found is not None and not found.is_plain:
        workloads.append(found.plain)
    cases = [Case(path=path, workload=workload) for workload in workloads for path in paths]
    measurements = stages.bench.measure_final(cases, goal.usual)
    if len(workloads) == 1:
        return measurements, None
    *measurements, dense, pruned = measurements
    budget = stages.options.budget
    plain = PlainDefaults(
        dense=dense,
        pruned=pruned,
        speedup=speedup(dense, pruned, budget.statistic),
        budget_used=budget_share(budget, dense, pruned) if budget.ratio is None else None,
    )
    return measurements, plain


def _side(
    stages: CommonStages[Any],
    artifact: Artifact,
    measurement: Measurement,
    quality: AnyQuality,
    torch_quality: AnyQuality,
    *,
    sizes: Sizes,
) -> Side[AnyQuality]:
    statistic = stages.options.budget.statistic
    parameters, flops = sizes(artifact)
    return Side(
        artifact=artifact,
        measurement=measurement,
        seconds=measurement.seconds(statistic),
        interval=None if measurement.status == "estimated" else intervals.latency(measurement, statistic),
        parameters=parameters,
        flops=flops,
        quality=quality,
        torch_quality=torch_quality,
    )


def result_of(
    stages: CommonStages[Shape],
    goal: Goal,
    pruned: Pruned[Shape],
    claim: Claim[AnyQuality],
    *,
    source: tuple[str, str],
    dense_cost: float,
    calibrated: Calibrated,
    validation_distance: float,
    without_recovery: float,
    recovery: str,
    notes: Sequence[str],
) -> PruneResult[AnyQuality]:
    """Return the result of a job: the verdict on its budget, and what that rests on.

    `source` is the model's name and digest, `dense_cost` its predicted cost. `validation_distance` is that of the
    pruned torch model before recovery from the dense one, on the validation split, `without_recovery` that on what all
    models are scored on. `notes` are added to the caveats of the measurements and of the predictions.
    """
    options = stages.options
    dense: Side[AnyQuality] = claim.dense
    side: Side[AnyQuality] = claim.pruned
    budget, statuses = options.budget, {dense.measurement.status, side.measurement.status}
    is_estimate = "estimated" in statuses
    ratio = None if is_estimate else speedup(dense.measurement, side.measurement, budget.statistic)
    cost = goal.cost_limit.cost(pruned.plan)
    if budget.ratio is None:
        used = budget_share(budget, dense.measurement, side.measurement)
        limit: float | None = budget.limit_seconds(dense_seconds=dense.seconds)
        predicted: float | None = cost / dense_cost * goal.unpruned_share * dense.seconds
    else:
        share = cost / goal.cost_limit.limit
        used, limit, predicted = Interval(value=share, low=share, high=share), None, None
    return PruneResult(
        status=verdict(used, statuses if budget.ratio is None else statuses - {"contended"}),  # weights are counted
        budget_used=used.value,
        budget_interval=used if budget.ratio is None and not is_estimate else None,
        target=options.target,
        backend=options.backend,
        model=source[0],
        model_digest=source[1],
        method=options.method,
        budget=budget,
        workload=stages.bench.workload,
        limit_seconds=limit,
        floor_seconds=goal.floor_seconds,
        fastest_seconds=goal.fastest_seconds,
        predicted_seconds=predicted,
        dense=dense,
        pruned=side,
        plain=claim.plain,
        speedup=ratio,
        speedup_shown=ratio is not None and is_shown(ratio) and "contended" not in statuses,
        plan_digest=side.artifact.plan_digest,
        validation_kl=validation_distance,
        kl_without_recovery=without_recovery,
        recovery=recovery,
        calibration=calibrated.name,
        calibration_sha256=calibrated.sha256,
        calibration_sequences=calibrated.sequences,
        calibration_sequence_length=calibrated.length,
        pruning_seconds=float(pruned.facts["seconds"]),
        pruning_peak_memory_bytes=int(pruned.facts["peak_memory_bytes"]),
        method_facts={k: v for k, v in pruned.facts.items() if k not in ("seconds", "peak_memory_bytes")},
        options=asdict(options),
        stage_seconds=dict(stages.workspace.stage_seconds),
        stage_peak_bytes=dict(stages.workspace.stage_peak_bytes),
        versions=versions(),
        seed=options.seed,
        notes=(*notes, *caveats(dense.measurement, side.measurement), *goal.caveats),
    )

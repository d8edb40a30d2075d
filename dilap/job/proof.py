"""The last part of a prune job: from the plan to a measured artifact, and what can be claimed of it."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from dilap.core.artifact import Artifact
from dilap.core.codec import encode, remove, write_json
from dilap.core.measurement import Interval, Measurement
from dilap.core.plan import Plan
from dilap.core.vocabulary import VocabularyCut
from dilap.evaluation.subject import require_unchanged
from dilap.job.exam import Exam
from dilap.job.formats import Files, dense_formats
from dilap.job.recovery import UNDONE, of_dense, recover
from dilap.job.result import PlainDefaults, PruneResult, Quality, Side, caveats, flops_of, versions
from dilap.job.stages import Goal, Stages, require_measured
from dilap.job.verdict import verdict
from dilap.models.anatomy import decoder_layers
from dilap.models.cut import shrink_
from dilap.models.load import save_checkpoint
from dilap.models.rounded_model import round_model_
from dilap.models.rounding import FLOATS
from dilap.models.text import Calibration
from dilap.profilers import intervals
from dilap.profilers.profiler import Case, budget_share, is_shown, speedup
from dilap.search.method import Pruned


def claim(stages: Stages, goal: Goal, pruned: Pruned, text: Calibration, files: Files) -> PruneResult:
    """Shrink, recover and export the model, score it on unseen text, measure it with fresh starts; return the result.

    `files` are those of the dense model in every precision, which are measured and scored beside it. The model in
    `stages.source` becomes the pruned one on the way, so everything that is asked of the dense model is asked first.
    """
    source, workspace, plan = stages.source, stages.workspace, pruned.plan
    write_json(workspace.folder / "plan.json", encode(plan))
    with workspace.stage("score the dense model"):
        exam = Exam.of(stages, text)
        dense_model = of_dense(stages, text)
    if plan.precisions:
        source.model.float()  # half precision has too few values for rounded weights
    shrink_(source.model, plan, parameters=pruned.parameters)
    source.model.config.dilap_plan = plan.digest
    exam = exam.facing(source.model)
    with workspace.stage("score the pruned model"):
        validation_kl = exam.validation.kl(source.model)
        shrunk = exam.of_torch(source.model)
    stages.workspace.log.say(
        f"shrunk, the torch model in floats: KL {shrunk.kl:.3f} on {exam.text.name}, {validation_kl:.3f} on the "
        "validation split"
    )
    recovered, done = shrunk, None
    if dense_model is not None:
        done = recover(stages, dense_model, exam.validation)
        dense_model = None  # frees the memory of a copy
        recovered = exam.of_torch(source.model)
    is_rounded = bool(plan.precisions) and done is None  # by the method that chose the precisions
    if not is_rounded and _round_(stages, plan, text):
        recovered = exam.of_torch(source.model)
    with workspace.stage("save the checkpoint"):
        remove(workspace.folder / "checkpoint")  # left by an earlier start
        save_checkpoint(source.model, source.tokenizer, workspace.folder / "checkpoint")
    dense, side, plain = _sides(stages, goal, plan, exam, recovered)
    formats = dense_formats(stages, files, exam)
    result = _result(stages, goal, pruned, text, dense=dense, side=side, shrunk=shrunk, validation_kl=validation_kl)
    precisions = plan.pruned_precisions()
    if done is not None:
        notes = (*result.notes, *[UNDONE] * (done.best_step == 0))
        curve = tuple(sorted(done.validation.items()))
        result = replace(result, notes=notes, recovery_kls=tuple(done.kls), recovery_validation_kls=curve)
    return replace(result, plain=plain, formats=formats, precisions=precisions)


def _sides(
    stages: Stages, goal: Goal, plan: Plan, exam: Exam, recovered: Quality
) -> tuple[Side, Side, PlainDefaults | None]:
    """Score both artifacts through their runtime, then measure them together; return the dense and the pruned side.

    The third value is what was measured in the runtime's plain defaults. Raises Mismatch where a file is replaced
    meanwhile, because a claim must be about the files that were exported.
    """
    workspace, bench = stages.workspace, stages.bench
    folders = workspace.dense, workspace.folder / "artifact"
    stages.artifact(folders[1], plan)
    for folder in folders:
        bench.note_how_to_run_(folder)
    artifacts = bench.read_artifact(folders[0]), bench.read_artifact(folders[1])
    in_torch = exam.dense, recovered
    with workspace.stage("score the artifacts"):
        qualities = [
            exam.of_artifact(stages, folder, artifact, in_torch=quality)
            for folder, artifact, quality in zip(folders, artifacts, in_torch, strict=True)
        ]
    with workspace.stage("latency for the claim"):
        paths = [folder / one.path for folder, one in zip(folders, artifacts, strict=True)]
        measurements, plain = _measured(stages, goal, paths)
    for folder, artifact, measurement in zip(folders, artifacts, measurements, strict=True):
        require_measured(measurement, artifact, source=str(folder))
        require_unchanged(folder, artifact)
    dense, pruned = (_side(stages, *parts) for parts in zip(artifacts, measurements, qualities, in_torch, strict=True))
    return dense, pruned, plain


def _measured(stages: Stages, goal: Goal, paths: Sequence[Path]) -> tuple[list[Measurement], PlainDefaults | None]:
    """Measure both models in the configuration found and, where it differs, in the runtime's plain defaults."""
    found = stages.configuration
    workloads = [stages.bench.workload]
    if found is not None and not found.is_plain:
        workloads.append(found.plain)
    cases = [Case(path=path, workload=workload) for workload in workloads for path in paths]
    measured = stages.bench.measure_final(cases, goal.usual)
    if len(workloads) == 1:
        return measured, None
    *measured, dense, pruned = measured
    budget = stages.options.budget
    plain = PlainDefaults(
        dense=dense,
        pruned=pruned,
        speedup=speedup(dense, pruned, budget.statistic),
        budget_used=budget_share(budget, dense, pruned) if budget.ratio is None else None,
    )
    return measured, plain


def _round_(stages: Stages, plan: Plan, text: Calibration) -> bool:
    """Round the pruned model to the precisions of its parts, so that columns make up for the errors of others.

    The runtime's quantiser then loses nothing more. A head that is tied to the embedding is left to it. Return whether
    anything was rounded.
    """
    model, own = stages.source.model, stages.options.workload.precision
    named = plan.pruned_precisions()
    precisions = {block.name: named.get(block.name, own) for block in plan.pruned_architecture().blocks}
    if not plan.architecture.tied_embeddings:
        precisions |= {part: precision for part, precision in named.items() if part in ("head", "embedding")}
    if set(precisions.values()) <= set(FLOATS):
        return False
    tokens = text.train[: stages.options.calibration.train_sequences]
    with (
        stages.workspace.stage("round"),
        stages.workspace.log.bar("round", total=len(decoder_layers(model)) * tokens.numel(), unit="tok") as bar,
    ):
        round_model_(model.float(), precisions, tokens=tokens, progress=bar.update)
    return True


def _side(
    stages: Stages, artifact: Artifact, measurement: Measurement, quality: Quality, torch_quality: Quality
) -> Side:
    return Side(
        artifact=artifact,
        measurement=measurement,
        seconds=measurement.seconds(stages.options.budget.statistic),
        interval=(
            None
            if measurement.status == "estimated"
            else intervals.latency(measurement, stages.options.budget.statistic)
        ),
        parameters=artifact.decoder.num_parameters,
        flops=flops_of(artifact.decoder, stages.bench.workload),
        quality=quality,
        torch_quality=torch_quality,
    )


def _vocabulary(stages: Stages) -> VocabularyCut | None:
    """Return what was cut from the vocabulary, and what the text on which all models are scored loses by it."""
    cut = stages.source.vocabulary
    return None if cut is None else cut.facts_on(stages.options.evaluation_text)


def _result(
    stages: Stages,
    goal: Goal,
    pruned: Pruned,
    text: Calibration,
    *,
    dense: Side,
    side: Side,
    shrunk: Quality,
    validation_kl: float,
) -> PruneResult:
    options, vocabulary = stages.options, _vocabulary(stages)
    budget, statuses = options.budget, {dense.measurement.status, side.measurement.status}
    is_estimate = "estimated" in statuses
    ratio = None if is_estimate else speedup(dense.measurement, side.measurement, budget.statistic)
    cost, dense_cost = goal.cost_limit.cost(pruned.plan), goal.cost_limit.predict(pruned.plan.architecture.layers)
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
        model=stages.source.name,
        model_digest=stages.source.digest,
        method=options.method,
        layout=goal.layout,
        budget=budget,
        workload=stages.bench.workload,
        limit_seconds=limit,
        floor_seconds=goal.floor_seconds,
        fastest_seconds=goal.fastest_seconds,
        predicted_seconds=predicted,
        dense=dense,
        pruned=side,
        speedup=ratio,
        speedup_shown=ratio is not None and is_shown(ratio) and "contended" not in statuses,
        plan_digest=side.artifact.plan_digest,
        validation_kl=validation_kl,
        kl_without_recovery=shrunk.kl,
        perplexity_without_recovery=shrunk.perplexity,
        recovery=options.recovery.mode,
        calibration=text.name,
        calibration_sha256=text.sha256,
        calibration_sequences=len(text.train) + len(text.validation),
        calibration_sequence_length=text.train.shape[1],
        pruning_seconds=float(pruned.facts["seconds"]),
        pruning_peak_memory_bytes=int(pruned.facts["peak_memory_bytes"]),
        method_facts={k: v for k, v in pruned.facts.items() if k not in ("seconds", "peak_memory_bytes")},
        options=asdict(options),
        stage_seconds=dict(stages.workspace.stage_seconds),
        stage_peak_bytes=dict(stages.workspace.stage_peak_bytes),
        versions=versions(),
        seed=options.seed,
        notes=(
            *(() if vocabulary is None else (*vocabulary.notes, vocabulary.note_on_quality)),
            *caveats(dense.measurement, side.measurement),
            *goal.caveats,
        ),
        vocabulary=vocabulary,
    )

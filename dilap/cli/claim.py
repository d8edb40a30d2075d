"""The end of a prune job: from the plan to a measured artifact and what can be claimed of it."""

from dataclasses import asdict, dataclass, replace

from transformers import PreTrainedModel

from dilap.cli.result import PruneResult, Quality, Side, flops_of, versions
from dilap.cli.stages import Goal, Stages
from dilap.codec import encode, write_json
from dilap.methods.method import Pruned
from dilap.profilers.profiler import budget_share, is_shown, speedup
from dilap.recover import distil
from dilap.shrink import shrink_
from dilap.source import save_checkpoint
from dilap.teacher import Teacher
from dilap.text import Calibration, EvaluationText, evaluation_text
from dilap.types import Artifact, Measurement


@dataclass(frozen=True, kw_only=True)
class _Exam:
    """Text that no search saw, with what the dense model says about it and about the validation split."""

    text: EvaluationText
    reference: Teacher
    validation: Teacher
    dense: Quality


def claim(stages: Stages, goal: Goal, pruned: Pruned, text: Calibration) -> PruneResult:
    """Shrink, recover, export, measure with fresh starts, and score on text that no stage has seen.

    The source's model becomes the pruned one on the way, so what is asked of the dense one is asked first.
    """
    source, workspace, plan = stages.source, stages.workspace, pruned.plan
    write_json(workspace.folder / "plan.json", encode(plan))
    with workspace.stage("score the dense model"):
        exam = _exam(stages, text)
        lessons = stages.teacher("training", text.train) if stages.options.recovery.mode != "none" else None
    shrink_(source.model, plan, parameters=pruned.parameters)
    source.model.config.dilap_plan = plan.digest
    with workspace.stage("score the pruned model"):
        validation_kl = exam.validation.kl(source.model)
        shrunk = _quality(exam, source.model)
    stages.console.say(f"shrunk: KL {shrunk.kl:.3f} on {exam.text.name}, {validation_kl:.3f} on the validation split")
    recovered = shrunk
    recovery_kls: tuple[float, ...] = ()
    if lessons is not None:
        recovery_kls = _recover_(stages, lessons)
        recovered = _quality(exam, source.model)
    with workspace.stage("save the checkpoint"):
        save_checkpoint(source.model, source.tokenizer, workspace.folder / "checkpoint")
    folders = workspace.dense, workspace.folder / "artifact"
    artifacts = stages.bench.read_artifact(folders[0]), stages.artifact(folders[1], plan)
    with workspace.stage("measure for the claim"):
        paths = [folder / one.path for folder, one in zip(folders, artifacts, strict=True)]
        before, after = stages.bench.measure(paths, final=True)
    dense = _side(stages, artifacts[0], before, exam.dense)
    side = _side(stages, artifacts[1], after, recovered)
    result = _result(stages, goal, pruned, text, dense=dense, side=side, shrunk=shrunk, validation_kl=validation_kl)
    return replace(result, recovery_kls=recovery_kls)


def _exam(stages: Stages, calibration: Calibration) -> _Exam:
    options, source = stages.options, stages.source
    text = evaluation_text(
        options.evaluation_text,
        source.tokenizer,
        num_sequences=options.evaluation_sequences,
        length=options.calibration.sequence_length,
    )
    reference = stages.teacher("unseen", text.tokens)
    return _Exam(
        text=text,
        reference=reference,
        validation=stages.teacher("validation", calibration.validation),
        dense=_scored(text, kl=0.0, perplexity=reference.perplexity),
    )


def _recover_(stages: Stages, lessons: Teacher) -> tuple[float, ...]:
    """Distil in place; the KL of every step."""
    options = stages.options.recovery
    with stages.workspace.stage("recover"), stages.console.bar("recover", total=options.steps, unit="step") as bar:

        def show(kl: float) -> None:
            bar.set_postfix(kl=f"{kl:.3f}")
            bar.update(1)

        losses = distil(stages.source.model, lessons, options, progress=show)
    stages.console.say(f"recovery ({options.mode}): KL on its own text {losses[0]:.3f} -> {losses[-1]:.3f}")
    return tuple(losses)


def _quality(exam: _Exam, model: PreTrainedModel) -> Quality:
    scores = exam.reference.scores(model)
    return _scored(exam.text, kl=scores.kl, perplexity=scores.perplexity)


def _scored(text: EvaluationText, *, kl: float, perplexity: float) -> Quality:
    return Quality(text=text.name, text_sha256=text.sha256, tokens=text.tokens.numel(), kl=kl, perplexity=perplexity)


def _side(stages: Stages, artifact: Artifact, measurement: Measurement, quality: Quality) -> Side:
    return Side(
        artifact=artifact,
        measurement=measurement,
        seconds=measurement.seconds(stages.options.budget.statistic),
        interval=measurement.interval(),
        parameters=artifact.architecture.num_parameters,
        flops=flops_of(artifact.architecture, stages.options.workload),
        quality=quality,
    )


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
    options = stages.options
    budget, ratio = options.budget, speedup(dense.measurement, side.measurement)
    is_estimate = "estimated" in (dense.measurement.status, side.measurement.status)
    cost, dense_cost = goal.target.cost(pruned.plan), goal.target.predict(pruned.plan.architecture.layers)
    if budget.ratio is None:
        used = budget_share(budget, dense.measurement, side.measurement)
        limit: float | None = budget.limit_seconds(dense_seconds=dense.seconds)
        predicted: float | None = cost / dense_cost * dense.seconds
    else:
        used, limit, predicted = cost / goal.target.limit, None, None
    notes = tuple(
        f"the {name} model's measurement is {one.measurement.status}: {one.measurement.note}"
        for name, one in (("dense", dense), ("pruned", side))
        if one.measurement.status != "ok"
    )
    return PruneResult(
        status="estimated" if is_estimate else "kept" if used <= 1.0 else "missed",
        budget_used=used,
        target=options.target,
        backend=options.backend,
        model=stages.source.name,
        model_digest=stages.source.digest,
        method=options.method,
        layout=goal.layout,
        budget=budget,
        workload=options.workload,
        limit_seconds=limit,
        floor_seconds=goal.floor_seconds,
        fastest_seconds=goal.fastest_seconds,
        predicted_seconds=predicted,
        dense=dense,
        pruned=side,
        speedup=ratio,
        speedup_shown=is_shown(ratio) and not is_estimate,
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
        versions=versions(),
        seed=options.seed,
        notes=notes,
    )

"""The end of a prune job: from the plan to a measured artifact and what can be claimed of it."""

from dataclasses import asdict, dataclass

from dilap.cli.result import PruneResult, Quality, Side, flops_of, versions
from dilap.cli.stages import Found, Goal, Stages
from dilap.codec import encode, write_json
from dilap.library import LevelFit
from dilap.profilers.profiler import budget_share, is_shown, speedup
from dilap.recover import distil
from dilap.refit import best_refit
from dilap.shrink import shrink_
from dilap.source import save_checkpoint
from dilap.space import plan_of
from dilap.supernet import Supernet
from dilap.teacher import Teacher, perplexity
from dilap.text import Calibration, EvaluationText, evaluation_text
from dilap.types import Artifact, Measurement, Plan

Library = list[list[LevelFit]]


@dataclass(frozen=True, kw_only=True)
class _Exam:
    """Text that no search saw, with what the dense model says about it."""

    text: EvaluationText
    reference: Teacher
    dense_perplexity: float


def claim(stages: Stages, goal: Goal, library: Library, found: Found, text: Calibration) -> PruneResult:
    """Refit, shrink, recover, export, measure with fresh starts, and score on text that no stage has seen.

    The source's model becomes the pruned one on the way, so what is asked of the dense one is asked first.
    """
    source, workspace, config = stages.source, stages.workspace, found.result.config
    units = [levels[level].units for levels, level in zip(library, config, strict=True)]
    plan = plan_of(goal.space, units, base=source.digest)
    write_json(workspace.folder / "plan.json", encode(plan))
    with workspace.stage("score the dense model"):
        exam = _exam(stages)
        lessons = Teacher.of(source.model, text.train) if stages.options.recovery.mode != "none" else None
    _refit_and_shrink_(stages, library, found, text, plan)
    kl_refitted = exam.reference.kl(source.model)
    stages.console.say(f"refitted and shrunk: KL {kl_refitted:.3f} on {exam.text.name}")
    if lessons is not None:
        _recover_(stages, lessons)
    with workspace.stage("save the checkpoint"):
        save_checkpoint(source.model, source.tokenizer, workspace.folder / "checkpoint")
    artifacts = stages.bench.read_artifact(workspace.folder / "dense"), stages.artifact("artifact", plan)
    with workspace.stage("score the pruned model"):
        kl, pruned_perplexity = exam.reference.kl(source.model), perplexity(source.model, exam.text.tokens)
    with workspace.stage("measure for the claim"):
        paths = [stages.file(name, one) for name, one in zip(("dense", "artifact"), artifacts, strict=True)]
        before, after = stages.bench.measure(paths, final=True)
    dense = _side(stages, artifacts[0], before, _quality(exam, kl=0.0, perplexity=exam.dense_perplexity))
    pruned = _side(stages, artifacts[1], after, _quality(exam, kl=kl, perplexity=pruned_perplexity))
    return _result(stages, goal, found, text, dense=dense, pruned=pruned, kl_refitted=kl_refitted)


def _exam(stages: Stages) -> _Exam:
    options, source = stages.options, stages.source
    text = evaluation_text(
        options.evaluation_text,
        source.tokenizer,
        num_sequences=options.evaluation_sequences,
        length=options.calibration.sequence_length,
    )
    reference = Teacher.of(source.model, text.tokens)
    return _Exam(text=text, reference=reference, dense_perplexity=perplexity(source.model, text.tokens))


def _refit_and_shrink_(stages: Stages, library: Library, found: Found, text: Calibration, plan: Plan) -> None:
    """Closed-form recovery on the training split, chosen on the validation split, then the cut."""
    options, model = stages.options, stages.source.model
    tokens = text.train[: options.calibration.train_sequences]
    total = len(plan.architecture.layers) * tokens.numel()  # of the first correction, which mostly does
    with stages.workspace.stage("closed-form refit"), stages.console.bar("refit", total=total, unit="tok") as bar:
        refit = best_refit(
            Supernet(model, library),
            found.result.config,
            tokens,
            teacher=Teacher.of(model, text.validation),
            options=options.refit,
            progress=bar.update,
        )
    stages.console.say(f"refit: KL on the validation split {found.result.kl:.3f} -> {refit.kl:.3f}")
    shrink_(model, plan, weights=refit.weights)
    model.config.dilap_plan = plan.digest


def _recover_(stages: Stages, lessons: Teacher) -> None:
    """Distil in place."""
    options = stages.options.recovery
    with stages.workspace.stage("recover"), stages.console.bar("recover", total=options.steps, unit="step") as bar:

        def show(kl: float) -> None:
            bar.set_postfix(kl=f"{kl:.3f}")
            bar.update(1)

        losses = distil(stages.source.model, lessons, options, progress=show)
    stages.console.say(f"recovery ({options.mode}): KL on its own text {losses[0]:.3f} -> {losses[-1]:.3f}")


def _quality(exam: _Exam, *, kl: float, perplexity: float) -> Quality:
    return Quality(
        text=exam.text.name,
        text_sha256=exam.text.sha256,
        tokens=exam.text.tokens.numel(),
        kl=kl,
        perplexity=perplexity,
    )


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
    stages: Stages, goal: Goal, found: Found, text: Calibration, *, dense: Side, pruned: Side, kl_refitted: float
) -> PruneResult:
    options = stages.options
    limit = options.budget.limit_seconds(dense_seconds=dense.seconds)
    ratio = speedup(dense.measurement, pruned.measurement)
    used = budget_share(options.budget, dense.measurement, pruned.measurement)
    is_estimate = "estimated" in (dense.measurement.status, pruned.measurement.status)
    predicted_ratio = goal.space.seconds(found.result.config) / goal.space.seconds(goal.space.dense)
    notes = tuple(
        f"the {name} model's measurement is {side.measurement.status}: {side.measurement.note}"
        for name, side in (("dense", dense), ("pruned", pruned))
        if side.measurement.status != "ok"
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
        budget=options.budget,
        workload=options.workload,
        limit_seconds=limit,
        floor_seconds=goal.floor_seconds,
        fastest_seconds=goal.fastest_seconds,
        predicted_seconds=predicted_ratio * dense.seconds,
        dense=dense,
        pruned=pruned,
        speedup=ratio,
        speedup_shown=is_shown(ratio) and not is_estimate,
        plan_digest=pruned.artifact.plan_digest,
        validation_kl=found.result.kl,
        kl_without_recovery=kl_refitted,
        recovery=options.recovery.mode,
        calibration=text.name,
        calibration_sha256=text.sha256,
        calibration_sequences=len(text.train) + len(text.validation),
        calibration_sequence_length=text.train.shape[1],
        options=asdict(options),
        stage_seconds=dict(stages.workspace.stage_seconds),
        versions=versions(),
        seed=options.search.seed,
        notes=notes,
    )

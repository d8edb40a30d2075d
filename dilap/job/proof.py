"""The last part of a decoder's prune job: from the plan to a measured artifact, and what can be claimed of it."""

from dataclasses import replace

from dilap.core.codec import encode, remove, write_json
from dilap.core.plan import Plan
from dilap.core.vocabulary import VocabularyCut
from dilap.job.answers import answers, continuations, kept_continuations
from dilap.job.claims import Calibrated, Claim, claimed, result_of
from dilap.job.exam import Exam
from dilap.job.formats import Files, dense_formats
from dilap.job.quality import Quality
from dilap.job.recovery import UNDONE, of_dense, recover
from dilap.job.result import PruneResult, flops_of
from dilap.job.stages import DecoderGoal, Stages
from dilap.models.anatomy import decoder_layers
from dilap.models.cut import shrink_
from dilap.models.load import save_checkpoint
from dilap.models.rounded_model import round_model_
from dilap.models.rounding import FLOATS
from dilap.models.text import Calibration
from dilap.search.method import Pruned
from dilap.search.plan_scores import PlanScores, scores_of_plan


def claim(stages: Stages, goal: DecoderGoal, pruned: Pruned, text: Calibration, files: Files) -> PruneResult:
    """Shrink, recover and export the model, score it on unseen text, measure it with fresh starts; return the result.

    `files` are those of the dense model in every precision, which are measured and scored beside it. The model in
    `stages.source` becomes the pruned one on the way, so everything that is asked of the dense model is asked first.
    """
    source, workspace, plan = stages.source, stages.workspace, pruned.plan
    write_json(workspace.folder / "plan.json", encode(plan))
    with workspace.stage("score the dense model"):
        exam = Exam.of(stages, text)
        dense_model = of_dense(stages, text)
        unpruned = kept_continuations(
            workspace.common / "answers.json", source.model, source.tokenizer, exam.text.tokens
        )
    scores = _scores_of_plan(stages, plan, text, exam)
    parameters = pruned.parameters
    if scores is not None and stages.options.refit == "use" and not plan.precisions:
        parameters = scores.parameters
    if plan.precisions:
        source.model.float()  # half precision has too few values for rounded weights
    shrink_(source.model, plan, parameters=parameters)
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
    with workspace.stage("answer"):
        pruned_answers = continuations(source.model, source.tokenizer, exam.text.tokens)
        said = answers(source.tokenizer, exam.text.tokens, dense=unpruned, pruned=pruned_answers)
    with workspace.stage("save the checkpoint"):
        remove(workspace.folder / "checkpoint")  # left by an earlier start
        save_checkpoint(source.model, source.tokenizer, workspace.folder / "checkpoint")
    claim = claimed(
        stages,
        goal,
        plan,
        exam,
        in_torch=(exam.dense, recovered),
        sizes=lambda one: (one.decoder.num_parameters, flops_of(one.decoder, stages.bench.workload)),
    )
    formats = dense_formats(stages, files, exam, in_torch=exam.dense)
    result = _result(stages, goal, pruned, text, claim, shrunk=shrunk, validation_kl=validation_kl)
    if done is not None:
        notes = (*result.notes, *[UNDONE] * (done.best_step == 0))
        curve = tuple(sorted(done.validation.items()))
        result = replace(result, notes=notes, recovery_kls=tuple(done.kls), recovery_validation_kls=curve)
    if scores is not None:
        result = replace(result, kl_cut=scores.kl_cut, kl_refit=scores.kl_refit)
    return replace(
        result,
        formats=formats,
        precisions=plan.pruned_precisions(),
        answers=said,
    )


def _scores_of_plan(stages: Stages, plan: Plan, text: Calibration, exam: Exam) -> PlanScores | None:
    """Return what the plan is worth whichever method chose it, None where that is not asked for.

    The model in `stages.source` must not be pruned yet.
    """
    if stages.options.refit == "none":
        return None
    model, tokens = stages.source.model, text.train[: stages.options.calibration.train_sequences]
    total = len(decoder_layers(model)) * tokens.numel()
    with stages.workspace.stage("refit"), stages.workspace.log.bar("refit", total=total, unit="tok") as bar:
        scores = scores_of_plan(
            model, plan, tokens, validation=exam.validation, unseen=exam.reference, progress=bar.update
        )
    refitted = "" if scores.kl_refit is None else f", refitted in closed form {scores.kl_refit:.3f}"
    stages.workspace.log.say(f"these units alone: KL {scores.kl_cut:.3f} on {exam.text.name}{refitted}")
    return scores


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


def _vocabulary(stages: Stages) -> VocabularyCut | None:
    """Return what was cut from the vocabulary, and what the text on which all models are scored loses by it."""
    cut = stages.source.vocabulary
    return None if cut is None else cut.facts_on(stages.options.evaluation_text)


def _result(
    stages: Stages,
    goal: DecoderGoal,
    pruned: Pruned,
    text: Calibration,
    claim: Claim[Quality],
    *,
    shrunk: Quality,
    validation_kl: float,
) -> PruneResult:
    vocabulary = _vocabulary(stages)
    result = result_of(
        stages,
        goal,
        pruned,
        claim,
        source=(stages.source.name, stages.source.digest),
        dense_cost=goal.cost_limit.predict(pruned.plan.architecture.layers),
        calibrated=Calibrated(
            name=text.name,
            sha256=text.sha256,
            sequences=len(text.train) + len(text.validation),
            length=text.train.shape[1],
        ),
        validation_distance=validation_kl,
        without_recovery=shrunk.kl,
        recovery=stages.options.recovery.mode,
        notes=() if vocabulary is None else (*vocabulary.notes, vocabulary.note_on_quality),
    )
    return replace(
        result,
        layout=goal.layout,
        perplexity_without_recovery=shrunk.perplexity,
        vocabulary=vocabulary,
        ffn_multiple=goal.rules.ffn_multiple,
    )

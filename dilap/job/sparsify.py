"""Zeros inside matrices: the job behind `dilap-prune --pattern`. No latency is claimed for it."""

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from dilap import __version__, methods
from dilap.core.codec import encode, remove, write_json
from dilap.core.errors import VerificationFailed
from dilap.core.printable import joined
from dilap.core.progress import Progress
from dilap.core.vocabulary import VocabularyCut
from dilap.evaluation.subject import DTYPES
from dilap.job.calibration import calibration_text
from dilap.job.evaluate import EvaluationOptions, evaluate, load_tasks
from dilap.job.inputs import inputs_of
from dilap.job.quality import Quality
from dilap.job.result import versions
from dilap.job.run_folder import Workspace
from dilap.models.anatomy import decoder_layers
from dilap.models.builtin import DEFAULT_MODEL
from dilap.models.compute_device import AUTO
from dilap.models.context import require_sequences
from dilap.models.load import Source, load, save_checkpoint
from dilap.models.options import CalibrationOptions
from dilap.models.reference import Teacher, perplexity
from dilap.models.statistics import Propagate
from dilap.models.text import evaluation_text, require_texts
from dilap.sparsity.barber import OWN, PUBLISHED, Barber, Granularity, Metric, decoder_matrices
from dilap.sparsity.pattern import Pattern
from dilap.sparsity.pruner import Pruner
from dilap.sparsity.rules import RULES, Rule, require_matrices, sparsify_

NO_CLAIM = (
    "no latency is claimed: llama.cpp, ONNX Runtime and ExecuTorch have no kernels for zeros inside matrices, so size, "
    "memory and speed stay those of the dense model"
)


@dataclass(frozen=True, kw_only=True)
class SparseOptions:
    """Everything that a job for zeros inside matrices is asked for.

    `dtype` is the type in which the model is pruned and saved (f32, f16, bf16), by default its own. `rebuild` swaps
    zeros after the first pass; its `granularity` and `threshold` are by default those published for the method, see
    `Barber` for `metric` and `retain`. Of the result lm-eval's `tasks` are scored, whose data lie in `data_dir` or on
    the hub; `delete_model` keeps only what was found, and no checkpoint.
    """

    pattern: str
    method: str = "wanda"
    settings: dict[str, str] = field(default_factory=dict)
    model: str = DEFAULT_MODEL
    merge_adapter: str | None = None
    vocabulary: str | None = None
    dtype: str | None = None
    propagate: Propagate = "pruned"
    rebuild: bool = False
    granularity: Granularity | None = None
    threshold: float | None = None
    metric: Metric = "WD"
    retain: bool = False
    tasks: tuple[str, ...] = ()
    data_dir: str | None = None
    delete_model: bool = False
    calibration: CalibrationOptions = field(default_factory=CalibrationOptions)
    evaluation_text: str = "python-docs"
    evaluation_sequences: int = 32
    compute: str = AUTO


@dataclass(frozen=True, kw_only=True)
class SparseResult:
    """The result of a job for zeros inside matrices.

    `linear_sparsity` is the share of zeros in the decoder layers' matrices, `model_sparsity` that in all parameters.
    `tasks` has the metrics of lm-eval's tasks; all that is known of them stands in evaluation-torch.json.
    """

    pattern: str
    method: str
    model: str
    model_digest: str
    linear_sparsity: float
    model_sparsity: float
    dense: Quality
    sparse: Quality
    claim: str
    calibration: str
    calibration_sha256: str
    options: dict[str, Any]
    stage_seconds: dict[str, float]
    versions: dict[str, str]
    vocabulary: VocabularyCut | None = None  # None where the model has all its tokens
    tasks: dict[str, dict[str, float]] = field(default_factory=dict)


def sparsify(options: SparseOptions, *, out: Path, progress: Progress) -> SparseResult:
    """Run the whole job and write its results into the folder `out`.

    Raises DilapError; InvalidInput, for one, where the pattern does not fit the model.
    """
    pattern, rule = Pattern.parse(options.pattern), _rule(options)
    load_tasks(_evaluation(options, out))  # so that mistakes in their data are found before anything is pruned
    workspace = Workspace(out, progress)
    with workspace.stage("load the model"):
        source = load(
            options.model,
            merge_adapter=options.merge_adapter,
            vocabulary=options.vocabulary,
            compute=options.compute,
        )
        for note in source.notes:
            workspace.log.say(note)
    if options.dtype is not None:
        source.model.to(DTYPES[options.dtype])
    require_matrices(source.model, pattern)
    require_sequences(source.model.config, options.calibration.sequence_length)
    require_texts(options.calibration, options.evaluation_text, source.tokenizer)
    inputs = inputs_of(
        source.tokenizer,
        calibration=options.calibration,
        evaluation=options.evaluation_text,
        method=options.method,
        vocabulary=source.vocabulary,
    )
    identity = {"options": asdict(options), "model": source.digest, "dilap": __version__, "inputs": inputs}
    with workspace.opened(identity):
        result = _run(options, source, pattern, rule, workspace)
        write_json(workspace.folder / "result.json", encode(result))
        if options.tasks:
            result = replace(result, tasks=_evaluated(options, workspace))
            write_json(workspace.folder / "result.json", encode(result))
        if options.delete_model:
            remove(workspace.folder / "checkpoint")
        workspace.finish()
    return result


def _evaluation(options: SparseOptions, run: Path) -> EvaluationOptions:
    folder = None if options.data_dir is None else Path(options.data_dir).expanduser()
    return EvaluationOptions(subject=str(run), tasks=options.tasks, backend="torch", data_dir=folder)


def _evaluated(options: SparseOptions, workspace: Workspace) -> dict[str, dict[str, float]]:
    """Return the metrics of lm-eval's tasks on the run's checkpoint; the whole evaluation is kept in the run."""
    kept = workspace.folder / "evaluation-torch.json"
    asked = _evaluation(options, workspace.folder)
    with workspace.stage("score tasks"):
        found = evaluate(asked, progress=workspace.log)
    write_json(kept, encode(replace(found, model=str(workspace.out))))
    return dict(found.tasks)


def _rule(options: SparseOptions) -> Rule | Pruner:
    rule: Rule | Pruner = methods.get(options.method, options.settings, table=RULES)
    return rule


def _run(
    options: SparseOptions, source: Source, pattern: Pattern, rule: Rule | Pruner, workspace: Workspace
) -> SparseResult:
    model, progress = source.model, workspace.log
    text = calibration_text(source, options.calibration, workspace)
    unseen = evaluation_text(
        options.evaluation_text,
        source.tokenizer,
        num_sequences=options.evaluation_sequences,
        length=options.calibration.sequence_length,
    )

    def quality(kl: float) -> Quality:
        return Quality.on(unseen, kl=kl, perplexity=perplexity(model, unseen.tokens))

    with workspace.stage("score the dense model"):
        reference, dense = Teacher.of(model, unseen.tokens), quality(0.0)
    before = decoder_matrices(model) if options.rebuild else {}
    total = len(decoder_layers(model)) * text.train.numel()
    with workspace.stage("prune"), progress.bar(options.method, total=total, unit="tok") as bar:
        sparsify_(model, text.train, rule, pattern, propagate=options.propagate, progress=bar.update)
    progress.say(f"{options.method}: KL {reference.kl(model):.3f} on {unseen.name}")
    if options.rebuild:
        with workspace.stage("rebuild"), progress.bar("barber", total=total, unit="tok") as bar:
            _barber(options).rebuild_(model, before, text.train, pattern, progress=bar.update)
    _require_pattern(model, pattern)
    with workspace.stage("score the sparse model"):
        sparse = quality(reference.kl(model))
    with workspace.stage("save the checkpoint"):
        remove(workspace.folder / "checkpoint")  # left by an earlier start
        save_checkpoint(model, source.tokenizer, workspace.folder / "checkpoint")
    return SparseResult(
        pattern=str(pattern),
        method=options.method,
        model=source.name,
        model_digest=source.digest,
        linear_sparsity=_share_of_zeros(list(decoder_matrices(model).values())),
        model_sparsity=_share_of_zeros([p.detach() for p in model.parameters()]),
        dense=dense,
        sparse=sparse,
        claim=NO_CLAIM,
        calibration=text.name,
        calibration_sha256=text.sha256,
        options=asdict(options),
        stage_seconds=dict(workspace.stage_seconds),
        versions=versions(),
        vocabulary=None if source.vocabulary is None else source.vocabulary.facts_on(options.evaluation_text),
    )


def _barber(options: SparseOptions) -> Barber:
    granularity, threshold = PUBLISHED.get(options.method, OWN)
    if ":" in options.pattern:  # the only granularity that keeps N:M groups
        granularity = "output1"
    return Barber(
        granularity=options.granularity or granularity,
        threshold=threshold if options.threshold is None else options.threshold,
        metric=options.metric,
        retain=options.retain,
    )


def _require_pattern(model: PreTrainedModel, pattern: Pattern) -> None:
    """Raise VerificationFailed where the model has fewer zeros than the pattern asks for.

    N:M patterns are checked in every group. For others, the zeros of all matrices are counted together, because a
    rebuild may move zeros between matrices.
    """
    matrices = decoder_matrices(model)
    if pattern.group:
        for name, weight in matrices.items():
            pattern.require(weight, name=name)
        return
    zeros = sum(int((weight == 0).sum()) for weight in matrices.values())
    wanted = sum(len(weight) * pattern.num_zeros(weight.shape[1]) for weight in matrices.values())
    if zeros < wanted:
        raise VerificationFailed(f"the model has {zeros} zeros where the pattern {pattern} asks for {wanted}")


def _share_of_zeros(tensors: list[Any]) -> float:
    return float(sum(int((one == 0).sum()) for one in tensors) / sum(one.numel() for one in tensors))


def table(result: SparseResult) -> str:
    """Return the result in a few lines of text."""
    rows, cut = (("dense", result.dense), ("sparse", result.sparse)), result.vocabulary
    return joined(
        [
            f"{result.model}, {result.method}, pattern {result.pattern}: {result.linear_sparsity:.2%} zeros in the "
            f"decoder layers' matrices, {result.model_sparsity:.2%} in the model",
            *(
                f"{name:>6}: KL {one.kl:.3f}, perplexity {one.perplexity:.2f} on {one.text}, scored in torch"
                for name, one in rows
            ),
            *(() if cut is None else (*cut.notes, cut.note_on_quality)),
            *(
                f"{task}: {', '.join(f'{name} {value:.4g}' for name, value in metrics.items())}"
                for task, metrics in result.tasks.items()
            ),
            result.claim,
        ]
    )

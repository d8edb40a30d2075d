"""Evaluate a checkpoint in torch, or the exported artifact itself: lm-eval's tasks, quality on text, and costs."""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from dilap.backends import host
from dilap.core.codec import decode, encode, read_json, write_json
from dilap.core.errors import InvalidInput, Unavailable
from dilap.core.progress import Progress
from dilap.core.workload import Workload
from dilap.evaluation import costs
from dilap.evaluation.document import TASKS, Evaluation, identity
from dilap.evaluation.subject import Subject, is_artifact, is_sparse_run, open_subject
from dilap.evaluation.text_quality import compare
from dilap.job.result import versions
from dilap.models.compute_device import AUTO
from dilap.models.load import require_model
from dilap.models.text_files import read_text
from dilap.profilers.devices.device import Device

if TYPE_CHECKING:
    from dilap.evaluation.tasks import LoadedTask


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """What is scored, and how; `dilap-eval --help` says what each option is.

    `costs_on` is the device where memory and latency are measured, None for no costs. `out` is the file that keeps the
    evaluation, task by task, so that a killed one goes on; by default, the evaluation of a run is kept in its folder.
    `vocabulary` is cut of the reference too, so that both models read the same tokens; beside a reference the subject
    may be an artifact, of which it was cut before. `compute` is the device on which torch computes.
    """

    subject: str
    tasks: tuple[str, ...] = ()
    data_dir: Path | None = None
    num_fewshot: int | None = None
    limit: int | None = None
    max_length: int | None = None
    backend: str | None = None
    precision: str | None = None
    threads: int | None = None
    merge_adapter: str | None = None
    vocabulary: str | None = None
    compute: str = AUTO
    reference: str | None = None
    eval_text: str = "python-docs"
    costs_on: Device | None = None
    force: bool = False
    out: Path | None = None

    @property
    def num_threads(self) -> int:
        return self.threads or host.num_physical_cores()

    @property
    def kept_in(self) -> Path | None:
        """The file that keeps the evaluation; None where `out` names none and the subject is no run."""
        run = Path(self.subject)
        if self.out is not None or not (run / "result.json").is_file():
            return self.out
        return run / ("evaluation-torch.json" if self.backend == "torch" else "evaluation.json")


def evaluate(options: EvaluationOptions, *, progress: Progress) -> Evaluation:
    """Score the tasks that are not kept already, then text beside the reference, then measure costs; return all.

    The models are closed before costs are measured. Raises InvalidInput where the subject cannot be scored or the kept
    evaluation is of something else, and Unavailable where a device, a runtime or lm-eval is missing.
    """
    if not (options.tasks or options.reference or options.costs_on):
        raise InvalidInput("nothing to do: name --tasks or a --reference, or ask for --costs")
    if options.costs_on is not None and (reason := options.costs_on.unavailable()):
        raise Unavailable(reason)
    tasks = load_tasks(options)
    if options.reference is not None:
        _require_comparable(options.reference, options.eval_text)
    if options.backend is None and is_sparse_run(Path(options.subject)):
        options = replace(options, backend="torch")
        progress.say(f"{options.subject} has zeros inside matrices and no artifact: its checkpoint is scored in torch")
    is_cut_before = options.reference is not None and is_artifact(options.subject, options.backend)
    subject = open_subject(
        options.subject,
        backend=options.backend,
        precision=options.precision,
        merge_adapter=options.merge_adapter,
        vocabulary=None if is_cut_before else options.vocabulary,
        threads=options.num_threads,
        compute=options.compute,
    )
    with closing(subject.reader):
        done = _with_tasks(_started(subject, options, progress), subject, tasks, options, progress)
        if options.reference:
            done = _with_reference(done, subject, options, progress)
            _keep(done, options)
    if options.costs_on is not None:
        done = _with_costs(done, subject, options, options.costs_on, progress)
        _keep(done, options)
    return done


def _require_comparable(reference: str, text: str) -> None:
    """Raise InvalidInput where there is no such model or text, before any task is scored."""
    if not is_artifact(reference, None):
        require_model(reference)
    read_text(text)


def load_tasks(options: EvaluationOptions) -> "Sequence[LoadedTask]":
    """Load the tasks with their data, before any model is read, so that mistakes in the data are found first."""
    names = TASKS if "all" in options.tasks else options.tasks
    if not names:
        return []
    try:
        from dilap.evaluation.tasks import load  # noqa: PLC0415 - lm-eval may be missing
    except ImportError as error:
        raise Unavailable(f"tasks need lm-eval ({error}); pip install 'dilap[eval]'") from error
    return load(names, data_dir=options.data_dir, num_fewshot=options.num_fewshot)


def _with_tasks(
    done: Evaluation,
    subject: Subject,
    tasks: "Sequence[LoadedTask]",
    options: EvaluationOptions,
    progress: Progress,
) -> Evaluation:
    """Return `done` with the missing tasks scored; each task is saved as soon as it is scored."""
    if tasks:
        from dilap.evaluation.evaluate import evaluate_task  # noqa: PLC0415 - lm-eval may be missing
    for number, task in enumerate(tasks, start=1):
        if _is_kept(task, done, options, progress):
            continue
        progress.say(f"{number} of {len(tasks)}: {task.name}")
        result = evaluate_task(subject, task, max_tokens=done.max_tokens, limit=options.limit, bar=progress.bar)
        done = replace(
            done, tasks=done.tasks | {task.name: result.metrics}, facts=done.facts | {task.name: result.facts}
        )
        _keep(done, options)
    return done


def _is_kept(task: "LoadedTask", done: Evaluation, options: EvaluationOptions, progress: Progress) -> bool:
    """Whether a task was scored before, on the rows and with the examples that are asked for now, and say so.

    Raises InvalidInput where the rows are others than they were then.
    """
    from dilap.evaluation.evaluate import facts_now  # noqa: PLC0415 - lm-eval may be missing

    if task.name not in done.tasks:
        return False
    now, then = facts_now(task, limit=options.limit), done.facts[task.name]
    if (now.num_rows, now.num_fewshot) != (then.num_rows, then.num_fewshot):
        progress.say(f"{task.name}: its {then.num_rows} rows with {then.num_fewshot} examples each are replaced")
        return False
    if now.data_sha256 != then.data_sha256:
        raise InvalidInput(
            f"the rows of {task.name} changed since {options.kept_in} was begun; put them back as they were, remove it "
            "or choose another --out"
        )
    progress.say(f"{task.name}: done earlier")
    return True


def _started(subject: Subject, options: EvaluationOptions, progress: Progress) -> Evaluation:
    """Return what is kept of this evaluation, or an empty one. Raises InvalidInput where the file is of another."""
    longest, out = subject.reader.max_tokens, options.kept_in
    fresh = Evaluation(
        model=subject.name,
        backend=subject.backend,
        precision=subject.precision,
        digest=subject.digest,
        plan_digest=subject.plan_digest,
        max_tokens=min(options.max_length or longest, longest),
        limit=options.limit,
        num_fewshot=options.num_fewshot,
        threads=options.num_threads,
        versions=versions(),
    )
    if options.max_length and options.max_length > longest:
        progress.say(
            f"--max-length {options.max_length}: the model holds {longest} tokens, so it reads {longest} at once"
        )
    if out is None or not out.exists():
        return fresh
    found = decode(Evaluation, read_json(out), source=str(out))
    if differences := [name for name, value in identity(fresh).items() if identity(found)[name] != value]:
        raise InvalidInput(f"{out} is of another {differences[0]}; remove it or choose another --out")
    return replace(found, limit=options.limit, num_fewshot=options.num_fewshot)


def _with_reference(done: Evaluation, subject: Subject, options: EvaluationOptions, progress: Progress) -> Evaluation:
    assert options.reference is not None
    reference = open_subject(
        options.reference, vocabulary=options.vocabulary, threads=options.num_threads, compute=options.compute
    )
    with closing(reference.reader), progress.bar(f"beside {reference.name}", total=None, unit="tok") as bar:
        return replace(done, text=compare(subject, reference, text=options.eval_text, progress=bar.update))


def _with_costs(
    done: Evaluation, subject: Subject, options: EvaluationOptions, device: Device, progress: Progress
) -> Evaluation:
    run, most = subject.run, subject.reader.max_tokens
    threads = options.threads or (run.threads if run else done.threads)
    workload = Workload(precision=subject.precision, threads=threads, switches=run.switches if run else {})
    workload = replace(
        workload, context=min(workload.context, most - 1), prompt_tokens=min(workload.prompt_tokens, most)
    )
    counted = costs.count(subject, workload)
    with progress.bar("measure", total=None, unit="") as bar:
        found = costs.measure(counted, subject, device, force=options.force, progress=bar.set_postfix_str)
    return replace(done, costs=found)


def _keep(done: Evaluation, options: EvaluationOptions) -> None:
    if (out := options.kept_in) is not None:
        write_json(out, encode(done))

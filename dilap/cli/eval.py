"""dilap-eval: lm-eval's tasks, text and costs, of a checkpoint or of the very artifact that ships."""

import argparse
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from dilap.backends import host
from dilap.cli import arguments, console
from dilap.cli.console import Console
from dilap.core.bounds import MAX_THREADS, MAX_TOKENS
from dilap.core.codec import decode, encode, read_json, write_json
from dilap.core.errors import InvalidInput, Unavailable
from dilap.core.printable import joined
from dilap.core.workload import Workload
from dilap.evaluation.document import Costs, Evaluation, identity
from dilap.job.result import versions
from dilap.profilers import intervals
from dilap.profilers.devices.device import Device

if TYPE_CHECKING:
    from dilap.evaluation.subject import Subject
    from dilap.evaluation.tasks import LoadedTask

TASKS = ("wikitext", "ptb", "arc_easy", "arc_challenge", "openbookqa", "piqa", "hellaswag", "winogrande", "mmlu")
_SUMMARY = ("acc", "acc_norm", "word_perplexity", "window_perplexity")
_EXAMPLES = """\
  dilap-eval smollm2-135m --tasks wikitext,arc_easy
  dilap-eval runs/quickstart --tasks all --data-dir data        # the artifact of a run, through its own runtime
  dilap-eval runs/quickstart --backend torch --tasks piqa       # its checkpoint, in torch
  dilap-eval runs/quickstart --reference smollm2-135m           # KL, perplexity and top-1 beside the dense model
  dilap-eval runs/quickstart --costs                            # memory, prefill and decode latency, FLOPs, bytes
  dilap-eval exported/model.gguf --tasks mmlu --num-fewshot 0 --limit 20 --json
A killed evaluation with --out, or of a run, goes on after the last whole task when the same command is given again."""


def _parser() -> argparse.ArgumentParser:
    made = arguments.parser("Score a checkpoint in torch, or an artifact through its own runtime.", _EXAMPLES)
    made.add_argument(
        "subject", nargs="?", metavar="MODEL_OR_ARTIFACT", help="a run, an artifact's folder, a .gguf or a model"
    )
    made.add_argument(
        "--tasks",
        action=arguments.Several,
        default=[],
        metavar="NAME",
        help=f"all ({' '.join(TASKS)}), or any of lm-eval's that score given text",
    )
    made.add_argument(
        "--limit", type=arguments.whole(1, 1 << 30), metavar="N", help="only the first N rows of every task"
    )
    made.add_argument(
        "--num-fewshot",
        type=arguments.whole(0, 1000),
        metavar="K",
        help="examples before each question (mmlu 5, others 0)",
    )
    made.add_argument("--data-dir", metavar="DIR", help="read DIR/<task>/<split>.jsonl[.gz] instead of the hub")
    made.add_argument(
        "--max-length",
        type=arguments.whole(1, MAX_TOKENS),
        metavar="N",
        help="tokens read at once (what the model holds)",
    )
    made.add_argument("--backend", help="torch for a run's checkpoint or a .gguf file (the artifact's runtime)")
    made.add_argument("--precision", choices=["f32", "bf16", "f16"], help="in torch; the checkpoint's own otherwise")
    made.add_argument("--reference", metavar="DENSE", help="also KL, perplexity and top-1 beside this model")
    made.add_argument("--eval-text", default="python-docs", metavar="TEXT", help="where --reference is compared")
    made.add_argument("--costs", action="store_true", help="also size, FLOPs, bytes, memory and latency of both phases")
    made.add_argument("--device", default="host_cpu", metavar="NAME", help="where --costs are measured (host_cpu)")
    made.add_argument(
        "--threads",
        type=arguments.whole(1, MAX_THREADS),
        metavar="N",
        help="of a runtime; all physical cores by default",
    )
    arguments.add_device_access(made)
    made.add_argument("--out", metavar="FILE", help="keep the evaluation (RUN/evaluation.json for a run)")
    made.add_argument("--json", action="store_true", help="print it as JSON")
    return made


def _command() -> int:
    given = _given()
    names = list(TASKS) if "all" in given.tasks else given.tasks
    if not (names or given.reference or given.costs):
        raise InvalidInput("nothing to do: name --tasks or a --reference, or ask for --costs")
    screen = Console()
    device = _device(given) if given.costs else None
    tasks = _load_tasks(names, given)
    from dilap.evaluation.subject import is_sparse_run

    if given.backend is None and is_sparse_run(Path(given.subject)):
        given.backend = "torch"
        screen.say(f"{given.subject} has zeros inside matrices and so no artifact: its checkpoint is scored in torch")
    out = _out(given)
    subject = _open(given.subject, given)
    with closing(subject.reader):
        done = _evaluate(subject, tasks, given, out, screen)
        if given.reference:
            done = _with_reference(done, subject, given, screen)
            _keep(done, out)
    if device is not None:  # measured alone
        done = _with_costs(done, subject, device, given, screen)
        _keep(done, out)
    if given.json:
        console.show_json(encode(done))
    else:
        console.show(report(done) + (f"\n\nkept in {out}" if out else ""))
    return 0


def _given() -> argparse.Namespace:
    parser = _parser()
    given = parser.parse_args()
    if given.subject is None and len(given.tasks) > 1:  # it followed the tasks, and was taken for one more
        given.subject = given.tasks.pop()
    if given.subject is None:
        parser.error("name what is scored: a run, an artifact's folder, a .gguf or a model")
    return given


def _load_tasks(names: list[str], given: argparse.Namespace) -> "list[LoadedTask]":
    """The data first: its mistakes are found before a model is read."""
    if not names:
        return []
    try:
        from dilap.evaluation.tasks import load  # seconds that bad input should not cost
    except ImportError as error:
        raise Unavailable(f"tasks need lm-eval ({error}); pip install 'dilap[eval]'") from error
    return load(names, data_dir=Path(given.data_dir) if given.data_dir else None, num_fewshot=given.num_fewshot)


def _open(name: str, given: argparse.Namespace) -> "Subject":
    from dilap.evaluation.subject import open_subject

    threads = given.threads or host.num_physical_cores()
    return open_subject(name, backend=given.backend, precision=given.precision, threads=threads)


def _out(given: argparse.Namespace) -> Path | None:
    if given.out:
        return arguments.new_path(given.out)
    run = Path(given.subject)
    if not (run / "result.json").is_file():
        return None
    return run / ("evaluation-torch.json" if given.backend == "torch" else "evaluation.json")


def _evaluate(
    subject: "Subject", tasks: "list[LoadedTask]", given: argparse.Namespace, out: Path | None, screen: Console
) -> Evaluation:
    """Every task that `out` lacks; each is kept when it is whole."""
    done = _started(subject, given, out, screen)
    for number, task in enumerate(tasks, start=1):
        from dilap.evaluation.evaluate import evaluate_task, rows_sha256

        if task.name in done.tasks:
            if rows_sha256(task, limit=given.limit) != done.facts[task.name].data_sha256:
                raise InvalidInput(
                    f"the rows of {task.name} changed since {out} was begun; put them back as they were, remove it or "
                    "choose another --out"
                )
            screen.say(f"{task.name}: done earlier")
            continue
        screen.say(f"{number} of {len(tasks)}: {task.name}")
        result = evaluate_task(subject, task, max_tokens=done.max_tokens, limit=given.limit, bar=screen.bar)
        done = replace(
            done, tasks=done.tasks | {task.name: result.metrics}, facts=done.facts | {task.name: result.facts}
        )
        _keep(done, out)
    return done


def _started(subject: "Subject", given: argparse.Namespace, out: Path | None, screen: Console) -> Evaluation:
    """What `out` holds of the same evaluation, or an empty one. Raises InvalidInput for another's file."""
    longest = subject.reader.max_tokens
    fresh = Evaluation(
        model=subject.name,
        backend=subject.backend,
        precision=subject.precision,
        digest=subject.digest,
        plan_digest=subject.plan_digest,
        max_tokens=min(given.max_length or longest, longest),
        limit=given.limit,
        num_fewshot=given.num_fewshot,
        threads=given.threads or host.num_physical_cores(),
        versions=versions(),
    )
    if given.max_length and given.max_length > longest:
        screen.say(f"--max-length {given.max_length}: the model holds {longest} tokens, so it reads {longest} at once")
    if out is None or not out.exists():
        return fresh
    found = decode(Evaluation, read_json(out), source=str(out))
    if differences := [name for name, value in identity(fresh).items() if identity(found)[name] != value]:
        raise InvalidInput(f"{out} is of another {differences[0]}; remove it or choose another --out")
    return found


def _with_reference(done: Evaluation, subject: "Subject", given: argparse.Namespace, screen: Console) -> Evaluation:
    from dilap.evaluation.text_quality import compare

    reference = _open(given.reference, argparse.Namespace(backend=None, precision=None, threads=given.threads))
    with closing(reference.reader), screen.bar(f"beside {reference.name}", total=None, unit="tok") as bar:
        quality = compare(subject, reference, text=given.eval_text, progress=bar.update)
    return replace(done, text=quality)


def _device(given: argparse.Namespace) -> Device:
    """Where costs are measured. Raises InvalidInput, Unavailable."""
    device = arguments.devices_of(given, given.device)[0]
    if reason := device.unavailable():
        raise Unavailable(reason)
    return device


def _with_costs(
    done: Evaluation, subject: "Subject", device: Device, given: argparse.Namespace, screen: Console
) -> Evaluation:
    from dilap.evaluation import costs

    run, most = subject.run, subject.reader.max_tokens
    threads = given.threads or (run.threads if run else done.threads)
    workload = Workload(precision=subject.precision, threads=threads, switches=run.switches if run else {})
    workload = replace(
        workload, context=min(workload.context, most - 1), prompt_tokens=min(workload.prompt_tokens, most)
    )
    counted = costs.count(subject, workload)
    with screen.bar("measure", total=None, unit="") as bar:
        return replace(
            done, costs=costs.measure(counted, subject, device, force=given.force, progress=bar.set_postfix_str)
        )


def _keep(done: Evaluation, out: Path | None) -> None:
    if out is not None:
        write_json(out, encode(done))


def report(done: Evaluation) -> str:
    """A line a task."""
    lines = [f"{done.model} through {done.backend}, {done.precision}, {done.max_tokens} tokens at once"]
    if done.tasks:
        lines += ["", f"{'task':16}{'rows':>6}{'shots':>6}  " + "  ".join(f"{name:>17}" for name in _SUMMARY)]
    for name, metrics in done.tasks.items():
        facts = done.facts[name]
        cells = "  ".join(f"{_number(metrics, metric):>17}" for metric in _SUMMARY)
        lines.append(f"{name:16}{facts.num_rows:6}{facts.num_fewshot:6}  {cells}")
        if "window_perplexity" in metrics:
            lines.append(
                f"  window_perplexity: {metrics['num_windows']:.0f} windows of {metrics['window_tokens']:.0f} tokens of"
                f" the joined text; top-1 {metrics['top1']:.1%}"
            )
    if (text := done.text) is not None:
        lines += [
            "",
            f"beside {text.reference} on {text.text} ({text.tokens} tokens): KL {text.kl:.4f}, same first token"
            f" {text.agreement:.1%}",
            f"perplexity {text.perplexity:.2f} ({text.reference_perplexity:.2f}), top-1 {text.top1:.1%}"
            f" ({text.reference_top1:.1%})",
        ]
    if done.costs is not None:
        lines += ["", *_cost_lines(done.costs)]
    return joined(lines)


def _cost_lines(costs: Costs) -> list[str]:
    size = "" if costs.file_bytes is None else f", file {costs.file_bytes / 1e6:.1f} MB"
    lines = [f"{costs.parameters / 1e6:.1f} M parameters{size}"]
    for phase in (costs.decode, costs.prefill):
        line = f"{phase.workload.describe()}: {phase.flops / 1e9:.3f} GFLOP, {phase.bytes_moved / 1e6:.1f} MB moved"
        if phase.measurement is not None:
            found = intervals.latency(phase.measurement)
            line += (
                f", {found.value * 1e3:.2f} ms [{found.low * 1e3:.2f}, {found.high * 1e3:.2f}], memory"
                f" {_megabytes(phase.average_memory_bytes)} on average, at most"
                f" {_megabytes(phase.peak_memory_bytes)} ({phase.measurement.words})"
            )
        lines.append(line)
        if phase.measurement is not None:
            lines += [f"  its {caveat}" for caveat in phase.measurement.caveats]
    return lines


def _megabytes(value: int | None) -> str:
    return "unknown" if value is None else f"{value / 1e6:.0f} MB"


def _number(metrics: dict[str, float], name: str) -> str:
    if name not in metrics:
        return ""
    error = metrics.get(f"{name}_stderr")
    return f"{metrics[name]:.4g}" + (f" ± {error:.2g}" if error else "")


def main() -> None:
    console.run(_command)

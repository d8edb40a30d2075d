"""dilap-eval: evaluate a checkpoint or the exported artifact itself on lm-eval's tasks, text, photographs and costs."""

import argparse
from pathlib import Path

from dilap.cli import arguments, console
from dilap.core.bounds import MAX_THREADS, MAX_TOKENS
from dilap.core.codec import encode
from dilap.core.printable import joined, milliseconds
from dilap.evaluation.document import TASKS, Costs, Evaluation, ImageEvaluation
from dilap.job.verdict import percent
from dilap.profilers import intervals
from dilap.profilers.devices.device import Device

_SHARES = ("acc", "acc_norm")
_SUMMARY = (*_SHARES, "word_perplexity", "window_perplexity")
_EXAMPLES = """\
  dilap-eval smollm2-135m --tasks wikitext,arc_easy
  dilap-eval runs/quickstart --tasks all --data-dir data        # the artifact of a run, through its own runtime
  dilap-eval runs/quickstart --backend torch --tasks piqa       # its checkpoint, in torch
  dilap-eval runs/quickstart --reference smollm2-135m           # KL, perplexity and top-1 beside the dense model
  dilap-eval runs/quickstart --costs                            # memory, prefill and decode latency, FLOPs, bytes
  dilap-eval exported/model.gguf --tasks mmlu --num-fewshot 0 --limit 20 --json
  dilap-eval resnet-50-onnxruntime-int8 --images photos/ --reference ./resnet-50   # an image network: top-1, top-5, KL
A killed evaluation with --out, or of a run, goes on after the last whole task when the same command is given again."""


def _parser() -> argparse.ArgumentParser:
    made = arguments.parser("Score a checkpoint in torch, or an artifact through its own runtime.", _EXAMPLES)
    scored = made.add_mutually_exclusive_group()
    scored.add_argument(
        "subject",
        nargs="?",
        default=argparse.SUPPRESS,
        metavar="MODEL_OR_ARTIFACT",
        help="a run, an artifact's folder, a .gguf or a model",
    )
    scored.add_argument("--model", dest="subject", metavar="MODEL_OR_ARTIFACT", help="the same, behind its name")
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
    made.add_argument(
        "--backend", metavar="RUNTIME", help="torch for a run's checkpoint or a .gguf file (the artifact's runtime)"
    )
    made.add_argument("--precision", choices=["f32", "bf16", "f16"], help="in torch; the checkpoint's own otherwise")
    arguments.add_changes(made)
    arguments.add_compute(made)
    made.add_argument("--reference", metavar="DENSE", help="also KL, perplexity and top-1 beside this model")
    made.add_argument("--eval-text", default="python-docs", metavar="TEXT", help="where --reference is compared")
    made.add_argument(
        "--images",
        metavar="PHOTOS",
        help="show an image network photographs: a folder, with a folder for each class or a labels.csv for top-1",
    )
    made.add_argument("--costs", action="store_true", help="also size, FLOPs, bytes, memory and latency of both phases")
    arguments.add_target(made, words=": where --costs are measured (host_cpu)", default="host_cpu")
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
    if given.images is not None:
        return _show_images(given)
    device = _device(given) if given.costs else None
    from dilap.job.evaluate import EvaluationOptions, evaluate  # torch takes seconds: bad input is refused first

    options = EvaluationOptions(
        subject=given.subject,
        tasks=tuple(given.tasks),
        data_dir=Path(given.data_dir) if given.data_dir else None,
        num_fewshot=given.num_fewshot,
        limit=given.limit,
        max_length=given.max_length,
        backend=given.backend,
        precision=given.precision,
        threads=given.threads,
        merge_adapter=given.merge_adapter,
        vocabulary=given.vocabulary,
        compute=given.compute,
        reference=given.reference,
        eval_text=given.eval_text,
        costs_on=device,
        force=given.force,
        out=arguments.new_path(given.out) if given.out else None,
    )
    done = evaluate(options, progress=console.Console())
    if given.json:
        console.show_json(encode(done))
    else:
        console.show(report(done) + (f"\n\nkept in {options.kept_in}" if options.kept_in else ""))
    return 0


def _show_images(given: argparse.Namespace) -> int:
    """Evaluate an image network, and print that."""
    others = set(vars(given)) - {"subject", "images", "reference", "threads", "out", "json"}
    arguments.refuse_given(_parser(), given, others, why="does not apply to an image network (--images): leave it away")
    from dilap.job.evaluate_images import ImageOptions, evaluate_on_images

    out = arguments.new_path(given.out) if given.out else None
    options = ImageOptions(
        subject=given.subject, images=given.images, reference=given.reference, threads=given.threads, out=out
    )
    done = evaluate_on_images(options, progress=console.Console())
    if given.json:
        console.show_json(encode(done))
    else:
        console.show(image_report(done))
    return 0


def image_report(done: ImageEvaluation) -> str:
    """Return the evaluation of an image network as text."""
    quality = done.quality
    lines = [
        f"{done.model} through {done.backend}, {done.precision}: {quality.num_images} photographs of {quality.images}"
    ]
    for name, own, other in (
        ("top-1", quality.top1, quality.reference_top1),
        ("top-5", quality.top5, quality.reference_top5),
    ):
        if own is not None:
            found = intervals.share(own, count=quality.num_images)
            lines.append(f"{name} {percent(found)}" + ("" if other is None else f" ({other:.1%} of {done.reference})"))
    if quality.kl is not None and quality.agreement is not None:
        same = intervals.share(quality.agreement, count=quality.num_images)
        lines.append(f"beside {done.reference}: KL {quality.kl:.4f}, same class {percent(same)}")
    return joined(lines)


def _device(given: argparse.Namespace) -> Device:
    """Return the device on which costs are measured. Raises InvalidInput."""
    return arguments.devices_of(given, given.target)[0]


def _given() -> argparse.Namespace:
    parser = _parser()
    given = parser.parse_args()
    if given.subject is None and len(given.tasks) > 1:  # it came after the tasks and was taken for a task
        given.subject = given.tasks.pop()
    if given.subject is None:
        parser.error("name what is scored: a run, an artifact's folder, a .gguf or a model")
    return given


def report(done: Evaluation) -> str:
    """Return the evaluation as text: a line for each task, then quality on text, then costs."""
    lines = [f"{done.model} through {done.backend}, {done.precision}, {done.max_tokens} tokens at once"]
    if done.tasks:
        lines += ["", f"{'task':16}{'rows':>6}{'shots':>6}  " + "  ".join(f"{name:>20}" for name in _SUMMARY)]
    for name, metrics in done.tasks.items():
        facts = done.facts[name]
        cells = "  ".join(f"{_number(metrics, metric, facts.num_rows):>20}" for metric in _SUMMARY)
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
                f", {milliseconds(found.value)} ms [{milliseconds(found.low)}, {milliseconds(found.high)}], memory"
                f" {_megabytes(phase.average_memory_bytes)} on average, at most"
                f" {_megabytes(phase.peak_memory_bytes)} ({phase.measurement.words})"
            )
        lines.append(line)
        if phase.measurement is not None:
            lines += [f"  its {caveat}" for caveat in phase.measurement.caveats]
    return lines


def _megabytes(value: int | None) -> str:
    return "unknown" if value is None else f"{value / 1e6:.0f} MB"


def _number(metrics: dict[str, float], name: str, num_rows: int) -> str:
    """Format a metric: a share with its 95 % interval, another one with its standard error where lm-eval has it."""
    if name not in metrics:
        return ""
    if name in _SHARES:
        return percent(intervals.share(metrics[name], count=num_rows))
    error = metrics.get(f"{name}_stderr")
    return f"{metrics[name]:.4g}" + (f" ± {error:.2g}" if error else "")


def main() -> None:
    console.run(_command)


if __name__ == "__main__":
    main()

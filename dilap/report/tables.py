"""The tables of a report: what its figures and its summary say, as text."""

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields

from dilap.core.measurement import Interval, Measurement
from dilap.core.printable import csv_cell, markdown, milliseconds
from dilap.evaluation.document import Evaluation, PhaseCosts
from dilap.job.quality import in_words, words
from dilap.job.verdict import percent
from dilap.profilers import intervals
from dilap.report.figure import Cell, Figure
from dilap.report.inputs import Contents, Run
from dilap.report.summary import SummaryRow

# The columns of a summary in their order; one that no row has is left out.
_SUMMARY = (
    "Model", "Method", "Budget", "Latency, 95 %", "Images a second", "Texts a second", "Of dense", "KL", "Perplexity",
    "Accuracy", "Same class", "Top-1", "Top-5", "Cosine similarity", "Reached by 95 %", "Same nearest", "Parameters",
    "FLOPs a token", "Bytes a token", "Prefill FLOPs", "FLOPs an image", "FLOPs a text", "File", "Peak memory",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table of text cells. The first cell of a row is the row's name."""

    caption: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]


def summary_table(rows: Sequence[SummaryRow]) -> Table:
    """Return the summary with the columns that people read."""
    cells = [_summary_cells(row) for row in rows]
    headings = list(dict.fromkeys(heading for row in cells for heading in row))
    headings.sort(key=_SUMMARY.index)
    return Table(
        caption=f"{latency_words(rows)} {quality_words(rows)}",
        headings=headings,
        rows=[[row.get(heading, "") for heading in headings] for row in cells],
    )


def latency_words(rows: Sequence[SummaryRow]) -> str:
    """Say which statistic the latencies are, and whether they were measured or estimated."""
    estimated = "estimated from published numbers, measured on no device, and without an interval"
    if all(row.is_estimate for row in rows):
        return f"Latency is {estimated}."
    names = " and ".join(dict.fromkeys({"p50": "median", "p90": "p90"}[row.statistic] for row in rows))
    some = f"; (estimated): {estimated}" if any(row.is_estimate for row in rows) else ""
    return (
        f"Latency is the {names} measured on the device, with its 95 % interval; its share of the dense model's is "
        f"paired by rounds, that of a p90 by starts{some}."
    )


def quality_words(rows: Sequence[SummaryRow]) -> str:
    """Say whether the numbers of quality are of the artifacts or of the torch models."""
    names = " or ".join(dict.fromkeys(sorted(map(_measures, rows))))
    in_torch = "of the torch model in floats, not of the artifact"
    if all(row.quality_through == "torch" for row in rows):
        return f"{names} are {in_torch}."
    marked = f"; (torch): {in_torch}" if any(row.quality_through == "torch" for row in rows) else ""
    return f"{names} are of the artifact, read through its runtime{marked}."


def _measures(row: SummaryRow) -> str:
    """Return the names of what is known of a model's quality."""
    if row.is_of_sentences:
        return "the similarities of embeddings"
    return "KL and the shares of photographs" if row.is_of_images else "KL and perplexity"


def _summary_cells(row: SummaryRow) -> dict[str, str]:
    """Return the cells of a model, by heading, that its kind of model has."""
    stands = "" if row.status in ("", "kept") else f" ({row.verdict})"
    in_torch = " (torch)" if row.quality_through == "torch" else ""
    found = {
        "Model": row.run,
        "Method": row.method,
        "Budget": row.budget + stands,
        "Latency, 95 %": _summary_latency(row),
        "Of dense": f"{row.of_dense:.1%}",
        "Parameters": f"{row.parameters / 1e6:.1f} M",
        "File": _megabytes(row.file_bytes),
        "Peak memory": _megabytes(row.peak_memory_bytes),
    }
    if row.is_of_sentences:
        return found | _sentence_cells(row, in_torch)
    return found | (_image_cells(row, in_torch) if row.is_of_images else _decoder_cells(row, in_torch))


def _decoder_cells(row: SummaryRow, in_torch: str) -> dict[str, str]:
    return {
        "KL": f"{row.kl:.3f}{in_torch}",
        "Perplexity": f"{row.perplexity:.2f}{in_torch}",
        "Accuracy": _share(row.mean_accuracy),
        "FLOPs a token": f"{(row.decode_flops or 0) / 1e6:.0f} M",
        "Bytes a token": _megabytes(row.decode_bytes),
        "Prefill FLOPs": f"{(row.prefill_flops or 0) / 1e9:.1f} G",
    }


def _image_cells(row: SummaryRow, in_torch: str) -> dict[str, str]:
    shares = {"Same class": row.agreement, "Top-1": row.top1, "Top-5": row.top5}
    return {name: f"{_share(one)}{in_torch}" for name, one in shares.items() if one is not None} | {
        "KL": f"{row.kl:.3f}{in_torch}",
        "Images a second": f"{row.images_per_second:.1f}",
        "FLOPs an image": f"{(row.image_flops or 0) / 1e9:.2f} G",
    }


def _sentence_cells(row: SummaryRow, in_torch: str) -> dict[str, str]:
    return {
        "Cosine similarity": f"{row.cosine:.4f}{in_torch}",
        "Reached by 95 %": f"{row.low_cosine:.4f}{in_torch}",
        "Same nearest": f"{_share(row.same_nearest)}{in_torch}",
        "Texts a second": f"{row.texts_per_second:.1f}",
        "FLOPs a text": f"{(row.text_flops or 0) / 1e9:.2f} G",
    }


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _summary_latency(row: SummaryRow) -> str:
    mark = "" if row.measurement == "ok" else f" ({row.measurement})"
    statistic = "" if row.statistic == "p50" else f"{row.statistic} "
    latency = f"{statistic}{milliseconds(row.seconds)} ms"
    if row.seconds_low is None or row.seconds_high is None:
        return f"{latency}{mark}"
    return f"{latency} [{milliseconds(row.seconds_low)}, {milliseconds(row.seconds_high)}]{mark}"


def figure_table(figure: Figure) -> Table:
    rows = [[_text(row[key]) for key in figure.columns] for row in figure.rows]
    return Table(caption=figure.title, headings=list(figure.columns.values()), rows=rows)


def _text(cell: Cell) -> str:
    if cell is None:
        return ""
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)


def evaluation_tables(evaluations: Sequence[tuple[str, Evaluation]]) -> list[Table]:
    """Return what dilap-eval found: scores by task, quality beside the dense model, and costs, without empty tables."""
    found = [_scores(evaluations), _beside_dense(evaluations), _costs(evaluations)]
    return [table for table in found if table.rows]


def _scores(evaluations: Sequence[tuple[str, Evaluation]]) -> Table:
    metrics = {
        "acc": "Accuracy",
        "acc_norm": "By length",
        "word_perplexity": "Word perplexity",
        "window_perplexity": "Window perplexity",
        "top1": "Top-1",
    }
    rows = [
        [name, task, str(one.facts[task].num_rows), str(one.facts[task].num_fewshot)]
        + [_score(found.get(metric), metric, one.facts[task].num_rows) for metric in metrics]
        for name, one in evaluations
        for task, found in one.tasks.items()
    ]
    caption = (
        "lm-eval's scores, shares with their 95 % intervals. Window perplexity is of the joined text in windows; top-1 "
        "is its share of tokens put first."
    )
    return Table(caption=caption, headings=["Model", "Task", "Rows", "Examples", *metrics.values()], rows=rows)


def _score(value: float | None, metric: str, num_rows: int) -> str:
    """Format a metric, with its 95 % interval where it is a share of rows."""
    if value is not None and metric in ("acc", "acc_norm"):
        return percent(intervals.share(value, count=num_rows))
    return _text(value)


def _beside_dense(evaluations: Sequence[tuple[str, Evaluation]]) -> Table:
    rows = [
        [
            name,
            f"{text.text} ({text.tokens} tokens)",
            f"{text.kl:.4f}",
            f"{text.perplexity:.2f} ({text.reference_perplexity:.2f})",
            f"{text.top1:.1%} ({text.reference_top1:.1%})",
            f"{text.agreement:.1%}",
        ]
        for name, one in evaluations
        if (text := one.text) is not None
    ]
    headings = ["Model", "Text", "KL", "Perplexity", "Top-1", "Same first token"]
    return Table(caption="Beside the dense model, whose own numbers are in brackets.", headings=headings, rows=rows)


def _costs(evaluations: Sequence[tuple[str, Evaluation]]) -> Table:
    rows = [
        [name, f"{costs.parameters / 1e6:.1f} M", _megabytes(costs.file_bytes), *_phase_cells(phase)]
        for name, one in evaluations
        if (costs := one.costs) is not None
        for phase in (costs.decode, costs.prefill)
    ]
    headings = ["Model", "Parameters", "File", "Work", "FLOPs", "Bytes moved", "Latency, 95 %", "Average memory"]
    caption = "What running takes: operations and bytes in closed form; latency and memory measured on the device."
    return Table(caption=caption, headings=[*headings, "Peak memory", "Measurement"], rows=rows)


def _phase_cells(phase: PhaseCosts) -> list[str]:
    counted = [phase.workload.describe(), f"{phase.flops / 1e9:.2f} G", _megabytes(phase.bytes_moved)]
    if (measurement := phase.measurement) is None:
        return [*counted, "", "", "", "not measured"]
    measured = [_latency(intervals.latency(measurement)), _megabytes(phase.average_memory_bytes)]
    said = "; ".join([measurement.words, *measurement.caveats])
    return [*counted, *measured, _megabytes(phase.peak_memory_bytes), said]


def _latency(found: Interval) -> str:
    return f"{milliseconds(found.value)} ms [{milliseconds(found.low)}, {milliseconds(found.high)}]"


def _megabytes(value: int | None) -> str:
    return "" if value is None else f"{value / 1e6:.0f} MB"


def device_tables(runs: Sequence[Run]) -> list[Table]:
    """Return the fingerprint of every device that was measured on, once each; of an estimate, only what is known."""
    found: dict[str, Table] = {}
    for run in runs:
        fingerprint = asdict(run.result.pruned.measurement.fingerprint)
        caption = f"{fingerprint['device']}, {fingerprint['runtime']}"
        known = {**{name: value for name, value in fingerprint.items() if name != "soft"}, **fingerprint["soft"]}
        if run.result.is_estimate:
            caption += ": estimated, no such device was asked"
            known = {name: value for name, value in known.items() if value and value != "estimated"}
        rows = [[name.replace("_", " "), _text(value)] for name, value in known.items()]
        found.setdefault(str(rows), Table(caption=caption, headings=["Property", "Value"], rows=rows))
    return list(found.values())


def facts_table(run: Run) -> Table:
    """Return the facts that a run rests on: its model, plan, texts, seed and versions."""
    result = run.result
    quality, in_torch = result.pruned.quality, result.pruned.in_torch
    rows = [
        ["model", f"{result.model} ({result.model_digest[:12]})"],
        ["plan", result.plan_digest[:12]],
        ["artifact sha256", result.pruned.artifact.sha256[:12]],
        _origin(result.pruned.measurement),
        ["calibration", f"{result.calibration} ({result.calibration_sha256[:12]})"],
        ["quality on", f"{quality.source[0]} ({quality.source[1][:12]}), read through {quality.through}"],
        ["torch model in floats", in_words(in_torch.shown)],
        ["seed", str(result.seed)],
        ["versions", ", ".join(f"{name} {version}" for name, version in result.versions.items())],
    ]
    return Table(caption=f"What {run.name} rests on", headings=["Fact", "Value"], rows=rows)


def _origin(measurement: Measurement) -> list[str]:
    if measurement.status == "estimated":
        return ["estimated", measurement.note]
    said = f"{measurement.started}, {len(measurement.samples_ns)} samples"
    return ["measured", "; ".join([said, *measurement.caveats])]


def notes(contents: Contents) -> list[str]:
    """Return what a reader must know to judge the numbers: their caveats, and which methods failed."""
    return [*(f"{run.name}: {note}" for run in contents.runs for note in _run_notes(run)), *contents.failures]


def _run_notes(run: Run) -> list[str]:
    result = run.result
    found = [*result.all_notes, *(() if run.table is None else run.table.caveats())]
    if result.status == "uncertain":
        found.insert(0, f"budget {result.budget} {result.verdict}")
    if not result.speedup_shown and not result.is_estimate:
        found.append(f"no speed-up is shown: {result.why_not_shown}")
    if reason := result.pruned.quality.reason:
        names = words(result.pruned.quality.shown)
        found.append(f"its {names} are of the torch model in floats, not of the artifact: {reason}")
    return list(dict.fromkeys(found))


def to_csv(rows: Sequence[SummaryRow]) -> str:
    """Return every number of the summary as CSV, in seconds and bytes."""
    text = io.StringIO()
    table = csv.DictWriter(text, [field.name for field in fields(SummaryRow)], lineterminator="\n")
    table.writeheader()
    table.writerows({name: csv_cell(value) for name, value in asdict(row).items()} for row in rows)
    return text.getvalue()


def to_markdown(title: str, lead: str, tables: Sequence[Table], notes: Sequence[str]) -> str:
    """Return the report as Markdown: its tables one below another, then the notes."""
    lines = [f"# {markdown(title)}", markdown(lead)]
    parts = [*lines, *(_markdown(table) for table in tables), *(f"- {markdown(note)}" for note in notes)]
    return "\n\n".join(parts) + "\n"


def _markdown(table: Table) -> str:
    lines = [f"**{markdown(table.caption)}**", "", _line(table.headings), "|---|" + "--:|" * (len(table.headings) - 1)]
    return "\n".join([*lines, *(_line(row) for row in table.rows)])


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(markdown(cell) for cell in cells) + " |"

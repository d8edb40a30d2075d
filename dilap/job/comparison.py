"""The rows of a comparison, and the files and tables that are made of them."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from dilap.core.codec import checked, decode, write_json, written_aside
from dilap.core.measurement import Interval
from dilap.core.printable import csv_cell
from dilap.core.printable import markdown as in_markdown
from dilap.job.format_rows import FormatRow, format_rows
from dilap.job.format_rows import table as format_table
from dilap.job.quality import EmbeddingQuality
from dilap.job.result import PruneResult
from dilap.job.verdict import Verdict, percent, words
from dilap.methods import PUBLISHED_TOKENS, TRAINED

# Rows of earlier versions have only the quality of the torch model, under these shorter names.
_OLD_NAMES = {
    "kl": "torch_kl_before",
    "perplexity": "torch_perplexity_before",
    "kl_recovered": "torch_kl",
    "perplexity_recovered": "torch_perplexity",
    "dense_perplexity": "dense_torch_perplexity",
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """What one method gave at one budget; where the method failed, only `error` is set.

    `torch_*` is the quality of the torch model in floats: `*_cut` of the units that the method chose, with the dense
    model's values, `*_refit` of these units refitted in closed form, both alike for all methods; `*_before` as the
    method left it, with its own values; the others after the recovery that all rows share. `artifact_*` is the quality
    of the exported file, read through its runtime; None where the file cannot be read here. A decoder has a perplexity;
    an image network has `agreement`, the share of photographs in which it prefers the dense network's class, and, with
    labels, `top1` and `top5`; an encoder of texts has the numbers of `dilap.evaluation.document.SentenceQuality`, and
    no KL.
    """

    method: str
    budget: str
    error: str | None = None
    status: Verdict | None = None
    measurement: str | None = None
    seconds: float | None = None
    seconds_ci: tuple[float, float] | None = None
    dense_seconds: float | None = None
    budget_used: float | None = None
    torch_kl_before: float | None = None
    torch_perplexity_before: float | None = None
    torch_kl: float | None = None
    torch_perplexity: float | None = None
    dense_torch_perplexity: float | None = None
    artifact_kl: float | None = None
    artifact_perplexity: float | None = None
    dense_artifact_kl: float | None = None
    dense_artifact_perplexity: float | None = None
    artifact_reader: str | None = None
    parameters: int | None = None
    flops: int | None = None
    peak_memory_bytes: int | None = None
    pruning_seconds: float | None = None
    pruning_peak_memory_bytes: int | None = None
    calibration_tokens: int | None = None
    notes: tuple[str, ...] = ()
    budget_used_ci: tuple[float, float] | None = None
    torch_agreement: float | None = None
    torch_top1: float | None = None
    torch_top5: float | None = None
    dense_torch_top1: float | None = None
    dense_torch_top5: float | None = None
    artifact_agreement: float | None = None
    artifact_top1: float | None = None
    artifact_top5: float | None = None
    dense_artifact_top1: float | None = None
    dense_artifact_top5: float | None = None
    calibration_images: int | None = None
    torch_kl_cut: float | None = None
    torch_kl_refit: float | None = None
    ffn_multiple: int = 1
    training_text: str = ""
    torch_cosine_before: float | None = None
    torch_cosine: float | None = None
    torch_low_cosine: float | None = None
    torch_same_nearest: float | None = None
    artifact_cosine: float | None = None
    artifact_low_cosine: float | None = None
    artifact_same_nearest: float | None = None
    dense_artifact_cosine: float | None = None
    calibration_sentences: int | None = None
    formats: tuple[FormatRow, ...] = ()  # the dense model in every precision, where the method chose precisions

    @property
    def is_of_images(self) -> bool:
        return self.torch_agreement is not None

    @property
    def is_of_sentences(self) -> bool:
        return self.torch_cosine is not None

    @property
    def distances(self) -> tuple[float, float]:
        """What rows are ranked by: how far the file (where it is not known, the torch model) is from the dense one.

        Then how far the torch model is before recovery. Both are KL, or less the cosine similarity.
        """
        if self.is_of_sentences:
            found = self.torch_cosine if self.artifact_cosine is None else self.artifact_cosine
            return -(found or 0.0), -(self.torch_cosine_before or 0.0)
        found = self.torch_kl if self.artifact_kl is None else self.artifact_kl
        return found or 0.0, self.torch_kl_before or 0.0


def row_of(result: PruneResult[Any]) -> Row:
    pruned, text = result.pruned, result.options.get("calibration")
    return Row(
        method=result.method,
        budget=str(result.budget),
        status=result.status,
        measurement=pruned.measurement.words,
        seconds=pruned.seconds,
        seconds_ci=None if pruned.interval is None else (pruned.interval.low, pruned.interval.high),
        dense_seconds=result.dense.seconds,
        budget_used=result.budget_used,
        **_qualities(result),
        parameters=pruned.parameters,
        flops=pruned.flops,
        peak_memory_bytes=pruned.measurement.peak_memory_bytes,
        pruning_seconds=result.pruning_seconds,
        pruning_peak_memory_bytes=result.pruning_peak_memory_bytes,
        calibration_tokens=None if text is None else text["train_sequences"] * text["sequence_length"],
        **(_calibration(result) if text is None else {}),
        notes=result.all_notes,
        budget_used_ci=(result.share.low, result.share.high),
        torch_kl_cut=result.kl_cut,
        torch_kl_refit=result.kl_refit,
        ffn_multiple=result.ffn_multiple,
        training_text=result.options.get("training_text") or "",
        formats=format_rows(result),
    )


def _calibration(result: PruneResult[Any]) -> dict[str, Any]:
    """Return how many examples a network that is no decoder was calibrated on, by what they are."""
    kind = "sentences" if isinstance(result.pruned.quality, EmbeddingQuality) else "images"
    return {f"calibration_{kind}": result.calibration_sequences}


def _qualities(result: PruneResult[Any]) -> dict[str, Any]:
    dense, pruned = result.dense, result.pruned
    found = {f"torch_{name}": value for name, value in pruned.in_torch.numbers.items()}
    found |= {f"dense_torch_{name}": value for name, value in dense.in_torch.numbers.items()}
    if isinstance(pruned.quality, EmbeddingQuality):
        found["torch_cosine_before"] = 1 - result.kl_without_recovery
    else:
        found["torch_kl_before"] = result.kl_without_recovery
        found["torch_perplexity_before"] = result.perplexity_without_recovery
    if pruned.quality.through != "torch":
        found |= {f"artifact_{name}": value for name, value in pruned.quality.numbers.items()}
        found |= {f"dense_artifact_{name}": value for name, value in dense.quality.numbers.items()}
        found["artifact_reader"] = pruned.quality.through
    known = {field.name for field in fields(Row)}  # what the dense model is by itself is not among them
    return {name: value for name, value in found.items() if name in known}


def read_row(document: Mapping[str, Any], *, source: str) -> Row:
    """Return the row in the content of a `row.json`, of earlier versions too. Raises InvalidInput."""
    return decode(Row, _with_todays_names(document), source=source)


def read_rows(found: Any, *, source: str) -> list[Row]:
    """Return the rows in the content of a `compare.json`, of earlier versions too. Raises InvalidInput."""
    rows = checked(tuple[dict[str, Any], ...], found, source=source)
    return [checked(Row, _with_todays_names(row), source=source) for row in rows]


def _with_todays_names(row: Mapping[str, Any]) -> dict[str, Any]:
    if "torch_kl" not in row and row.get("kl_recovered") is None:  # without recovery both are the same
        row = {**row, "kl_recovered": row.get("kl"), "perplexity_recovered": row.get("perplexity")}
    return {_OLD_NAMES.get(name, name): value for name, value in row.items()}


def document(rows: Sequence[Row]) -> dict[str, Any]:
    return {"rows": [asdict(row) for row in rows]}


def write(out: Path, rows: Sequence[Row]) -> None:
    """Write compare.json, compare.csv and compare.md into the folder `out`."""
    write_json(out / "compare.json", document(rows))
    for name, text in (("compare.csv", _csv(rows)), ("compare.md", markdown(rows))):
        with written_aside(out / name) as temporary:
            temporary.write_text(text, encoding="utf-8")


def _csv(rows: Sequence[Row]) -> str:
    text = io.StringIO()
    columns = [field.name for field in fields(Row) if field.name != "formats"]  # which are several rows of their own
    table = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    table.writeheader()
    for row in rows:
        found = {name: getattr(row, name) for name in ("seconds_ci", "budget_used_ci")}
        texts = {name: None if ends is None else f"{ends[0]}-{ends[1]}" for name, ends in found.items()}
        cells = {**asdict(row), **texts, "notes": "; ".join(row.notes)}
        table.writerow({name: csv_cell(value) for name, value in cells.items()})
    return text.getvalue()


def markdown(rows: Sequence[Row]) -> str:
    """Return one table for each budget, what is nearest to the dense model first, then the methods that failed."""
    budgets = list(dict.fromkeys(row.budget for row in rows))
    tables = [_table(budget, [row for row in rows if row.budget == budget]) for budget in budgets]
    formats = format_table(next((row.formats for row in rows if row.formats), ()))
    return "\n".join([*tables, *formats, *_notes(rows)])


def _notes(rows: Sequence[Row]) -> list[str]:
    """Return what a reader has to know to compare the rows."""
    shared = "What does not depend on the budget is computed once: its seconds are in the row that asked first."
    shared = f"{_quality_note(rows)} {shared}"
    if images := {row.calibration_images for row in rows if row.calibration_images}:
        return [f"{shared} Calibrated on the same {max(images):,} photographs."]
    if sentences := {row.calibration_sentences for row in rows if row.calibration_sentences}:
        return [f"{shared} Calibrated on the same {max(sentences):,} sentences."]
    if multiples := sorted({row.ffn_multiple for row in rows if row.error is None} - {1}):
        widths = " or ".join(map(str, multiples))
        shared += f" FFN widths of all methods are rounded to multiples of {widths}, which the runtime needs."
    sizes = {row.calibration_tokens for row in rows if row.calibration_tokens}
    if len(sizes) != 1:
        return [shared]
    (tokens,), names = sizes, dict.fromkeys(row.method for row in rows)
    fewer = [f"{name} ({PUBLISHED_TOKENS[name]:,})" for name in names if PUBLISHED_TOKENS.get(name, 0) > tokens]
    trained = [name for name in names if name in TRAINED]
    text = f"Calibrated on the same {tokens:,} tokens"
    text += f"; published with more: {', '.join(fewer)}" if fewer else ""
    corpus = next((row.training_text for row in rows if row.training_text), "them instead of a corpus")
    text += f"; trained on {corpus}: {', '.join(trained)}" if trained else ""
    return [f"{shared} {text}."]


def _quality_note(rows: Sequence[Row]) -> str:
    """Say which models the columns of quality are about."""
    kind = _kind_of(rows)
    names, measure = kind.names, kind.measure
    torch = (
        f"torch {measure} is of the torch model in floats, the only one that is known before recovery: of the units "
        "that a method keeps with the dense model's values, of the same refitted in closed form (as DiLAP does), and "
        "as the method leaves it, with its own values"
    )
    read = next((row for row in rows if row.artifact_reader is not None), None)
    if read is None:
        return f"{names} are of the torch models in floats, not of the artifacts; {torch}."
    dense = f"{_number(read.dense_artifact_kl, 3)} and {_number(read.dense_artifact_perplexity, 2)}"
    if read.is_of_sentences:
        dense = f"{measure} {_number(read.dense_artifact_cosine, 4)}"
    if read.is_of_images:
        dense = f"KL {_number(read.dense_artifact_kl, 3)}"
        dense += "" if read.dense_artifact_top1 is None else f", top-1 {read.dense_artifact_top1:.1%}"
    return f"{names} are of the artifacts, read through {read.artifact_reader} (dense: {dense}); {torch}."


def _table(budget: str, rows: Sequence[Row]) -> str:
    done = sorted((row for row in rows if row.error is None), key=lambda row: row.distances)
    measure, quality = (kind := _kind_of(done)).measure, kind.columns
    lines = [
        f"Budget {in_markdown(budget)}",
        "",
        f"| method | ms | 95 % interval | budget used | torch KL of the units alone | refitted "
        f"| torch {measure} before recovery | torch {measure} | {quality} "
        "| parameters | FLOPs | peak memory | pruning took | and memory |",
        "|---|" + "--:|" * (13 + quality.count("|")),
        *(_line(row) for row in done),
    ]
    failed = [f"{row.method} failed: {row.error}" for row in rows if row.error is not None]
    caveats = [f"{row.method}: {note}" for row in done for note in row.notes]
    return "\n".join([*lines, "", *(f"{in_markdown(line)}\n" for line in (*failed, *caveats))])


@dataclass(frozen=True, kw_only=True)
class _Kind:
    """How tables call the quality of a kind of model: all numbers, the one that is also known in torch, the columns."""

    names: str
    measure: str
    columns: str


_DECODERS = _Kind(names="KL and perplexity", measure="KL", columns="KL | perplexity")
_IMAGES = _Kind(names="KL and the shares of photographs", measure="KL", columns="KL | same class | top-1")
_SENTENCES = _Kind(
    names="The similarities of embeddings",
    measure="cosine similarity",
    columns="cosine similarity | reached by 95 % | same nearest",
)


def _kind_of(rows: Sequence[Row]) -> _Kind:
    if any(row.is_of_sentences for row in rows):
        return _SENTENCES
    return _IMAGES if any(row.is_of_images for row in rows) else _DECODERS


def _line(row: Row) -> str:
    mark = "" if row.measurement in (None, "ok", "estimated") else f" ({row.measurement})"
    cells = [
        row.method,
        _scaled(row.seconds, 1e-3, 2) + mark,
        "" if row.seconds_ci is None else "-".join(_scaled(bound, 1e-3, 2) for bound in row.seconds_ci),
        _used(row),
        _number(row.torch_kl_cut, 3),
        _number(row.torch_kl_refit, 3),
        *_torch_cells(row),
        *_quality_cells(row),
        _scaled(row.parameters, 1e6, 1, " M"),
        _scaled(row.flops, 1e6, 1, " M"),
        _scaled(row.peak_memory_bytes or None, 1e6, 0, " MB"),
        _scaled(row.pruning_seconds, 1, 0, " s"),
        _scaled(row.pruning_peak_memory_bytes, 1e9, 2, " GB"),
    ]
    return f"| {' | '.join(map(in_markdown, cells))} |"


def _torch_cells(row: Row) -> list[str]:
    """Return the numbers of the torch model before recovery and after it."""
    if row.is_of_sentences:
        return [_number(row.torch_cosine_before, 4), _number(row.torch_cosine, 4)]
    return [_number(row.torch_kl_before, 3), _number(row.torch_kl, 3)]


def _quality_cells(row: Row) -> list[str]:
    """Return the artifact's numbers, or, marked, the torch model's where the artifact was not read."""
    is_read = row.artifact_reader is not None
    mark = "" if is_read else " (torch)"
    kl = row.artifact_kl if is_read else row.torch_kl
    if row.is_of_sentences:
        source = "artifact" if is_read else "torch"
        low, same = (getattr(row, f"{source}_{name}") for name in ("low_cosine", "same_nearest"))
        cells = [_number(-row.distances[0], 4), _number(low, 4), "" if same is None else f"{same:.1%}"]
    elif row.is_of_images:
        agreement = row.artifact_agreement if is_read else row.torch_agreement
        top1 = row.artifact_top1 if is_read else row.torch_top1
        cells = [_number(kl, 3), *("" if one is None else f"{one:.1%}" for one in (agreement, top1))]
    else:
        cells = [_number(kl, 3), _number(row.artifact_perplexity if is_read else row.torch_perplexity, 2)]
    return [f"{cell}{mark}" for cell in cells]


def _scaled(value: float | None, unit: float, digits: int, name: str = "") -> str:
    """Format `value` in multiples of `unit`; empty where the value is not known."""
    return "" if value is None else f"{value / unit:.{digits}f}{name}"


def _used(row: Row) -> str:
    """Format the share of the budget that is used, with a remark where the budget was not shown to be kept."""
    used = row.budget_used or 0.0
    low, high = row.budget_used_ci or (used, used)
    share = Interval(value=used, low=low, high=high)
    remarks = {"missed": " MISSED", "estimated": " ESTIMATED", "uncertain": f" ({words('uncertain', share)})"}
    return f"{percent(share)}{remarks.get(row.status or '', '')}"


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"

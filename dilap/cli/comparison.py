"""The rows of a comparison, and the tables made of them."""

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from dilap.cli.result import PruneResult
from dilap.codec import write_json, written_aside
from dilap.methods import PUBLISHED_TOKENS, TRAINED


@dataclass(frozen=True, kw_only=True)
class Row:
    """One method at one budget; only `error` where it failed.

    `kl` and `perplexity` are those of the method itself, `*_recovered` after the recovery that all rows share.
    """

    method: str
    budget: str
    error: str | None = None
    status: str | None = None
    seconds: float | None = None
    seconds_ci: tuple[float, float] | None = None
    dense_seconds: float | None = None
    budget_used: float | None = None
    kl: float | None = None
    perplexity: float | None = None
    kl_recovered: float | None = None
    perplexity_recovered: float | None = None
    dense_perplexity: float | None = None
    parameters: int | None = None
    flops: int | None = None
    peak_memory_bytes: int | None = None
    pruning_seconds: float | None = None
    pruning_peak_memory_bytes: int | None = None
    calibration_tokens: int | None = None


def row_of(result: PruneResult) -> Row:
    pruned, recovered, text = result.pruned, result.recovery != "none", result.options["calibration"]
    return Row(
        method=result.method,
        budget=str(result.budget),
        status=result.status,
        seconds=pruned.seconds,
        seconds_ci=(pruned.interval.low, pruned.interval.high),
        dense_seconds=result.dense.seconds,
        budget_used=result.budget_used,
        kl=result.kl_without_recovery,
        perplexity=result.perplexity_without_recovery,
        kl_recovered=pruned.quality.kl if recovered else None,
        perplexity_recovered=pruned.quality.perplexity if recovered else None,
        dense_perplexity=result.dense.quality.perplexity,
        parameters=pruned.parameters,
        flops=pruned.flops,
        peak_memory_bytes=pruned.measurement.peak_memory_bytes,
        pruning_seconds=result.pruning_seconds,
        pruning_peak_memory_bytes=result.pruning_peak_memory_bytes,
        calibration_tokens=text["train_sequences"] * text["sequence_length"],
    )


def document(rows: Sequence[Row]) -> dict[str, Any]:
    return {"rows": [asdict(row) for row in rows]}


def write(out: Path, rows: Sequence[Row]) -> None:
    """compare.json, compare.csv and compare.md in the folder `out`."""
    write_json(out / "compare.json", document(rows))
    for name, text in (("compare.csv", _csv(rows)), ("compare.md", markdown(rows))):
        with written_aside(out / name) as temporary:
            temporary.write_text(text, encoding="utf-8")


def _csv(rows: Sequence[Row]) -> str:
    text = io.StringIO()
    table = csv.DictWriter(text, [field.name for field in fields(Row)], lineterminator="\n")
    table.writeheader()
    for row in rows:
        interval = None if row.seconds_ci is None else f"{row.seconds_ci[0]}-{row.seconds_ci[1]}"
        table.writerow({**asdict(row), "seconds_ci": interval})
    return text.getvalue()


def markdown(rows: Sequence[Row]) -> str:
    """One table a budget, the best KL after recovery first; methods that failed at the end, with the reason."""
    budgets = list(dict.fromkeys(row.budget for row in rows))
    tables = [_table(budget, [row for row in rows if row.budget == budget]) for budget in budgets]
    return "\n".join([*tables, *_notes(rows)])


def _notes(rows: Sequence[Row]) -> list[str]:
    """What a reader has to know to compare the rows."""
    shared = "What does not depend on the budget is computed once: its seconds are in the row that asked first."
    sizes = {row.calibration_tokens for row in rows if row.calibration_tokens}
    if len(sizes) != 1:
        return [shared]
    (tokens,), names = sizes, dict.fromkeys(row.method for row in rows)
    fewer = [f"{name} ({PUBLISHED_TOKENS[name]:,})" for name in names if PUBLISHED_TOKENS.get(name, 0) > tokens]
    trained = [name for name in names if name in TRAINED]
    text = f"Calibrated on the same {tokens:,} tokens"
    text += f"; published with more: {', '.join(fewer)}" if fewer else ""
    text += f"; trained on them instead of a corpus: {', '.join(trained)}" if trained else ""
    return [f"{shared} {text}."]


def _table(budget: str, rows: Sequence[Row]) -> str:
    done = sorted((row for row in rows if row.error is None), key=_rank)
    lines = [
        f"Budget {budget}",
        "",
        "| method | ms | 95 % interval | budget used | KL | perplexity | KL recovered | perplexity recovered "
        "| parameters | FLOPs | peak memory | pruning took | and memory |",
        "|---|" + "--:|" * 12,
        *(_line(row) for row in done),
    ]
    failed = [f"{row.method} failed: {row.error}" for row in rows if row.error is not None]
    return "\n".join([*lines, "", *(f"{line}\n" for line in failed)])


def _rank(row: Row) -> tuple[float, float]:
    return (row.kl_recovered or row.kl or 0.0, row.kl or 0.0)


def _line(row: Row) -> str:
    low, high = row.seconds_ci or (0.0, 0.0)
    remark = {"missed": " MISSED", "estimated": " ESTIMATED"}.get(row.status or "", "")
    cells = [
        row.method,
        f"{(row.seconds or 0) * 1e3:.2f}",
        f"{low * 1e3:.2f}-{high * 1e3:.2f}",
        f"{row.budget_used or 0:.1%}{remark}",
        _number(row.kl, 3),
        _number(row.perplexity, 2),
        _number(row.kl_recovered, 3),
        _number(row.perplexity_recovered, 2),
        f"{(row.parameters or 0) / 1e6:.1f} M",
        f"{(row.flops or 0) / 1e6:.1f} M",
        f"{(row.peak_memory_bytes or 0) / 1e6:.0f} MB",
        f"{row.pruning_seconds or 0:.0f} s",
        f"{(row.pruning_peak_memory_bytes or 0) / 1e9:.2f} GB",
    ]
    return f"| {' | '.join(cells)} |"


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"

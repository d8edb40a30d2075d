"""The dense model in every format, as a comparison keeps and shows it: what its methods have to be better than."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dilap.core.printable import markdown, milliseconds
from dilap.job.result import PruneResult


@dataclass(frozen=True, kw_only=True)
class FormatRow:
    """The dense model in one format, rounded by the runtime's own tools; `seconds_ci` is None in an estimate."""

    precision: str
    seconds: float
    seconds_ci: tuple[float, float] | None
    kl: float
    perplexity: float
    file_bytes: int


def format_rows(result: PruneResult[Any]) -> tuple[FormatRow, ...]:
    """Return what a result knows of them: nothing where no precision was chosen."""
    rows = []
    for one in result.formats:
        interval = one.interval(result.dense)
        rows.append(
            FormatRow(
                precision=one.precision,
                seconds=one.seconds(result.dense, result.budget.statistic),
                seconds_ci=None if interval is None else (interval.low, interval.high),
                kl=one.quality.kl,
                perplexity=one.quality.perplexity,
                file_bytes=one.artifact.num_bytes,
            )
        )
    return tuple(rows)


def table(rows: Sequence[FormatRow]) -> list[str]:
    """Return the rows as lines of Markdown; nothing where there are none."""
    if not rows:
        return []
    lines = [
        "The dense model in every format, rounded by the runtime's own tools, beside the first method that chooses one",
        "",
        "| format | ms | 95 % interval | KL | perplexity | file |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for one in rows:
        ends = "" if one.seconds_ci is None else "-".join(map(milliseconds, one.seconds_ci))
        size = f"{one.file_bytes / 1e6:.1f} MB"
        cells = [one.precision, milliseconds(one.seconds), ends, f"{one.kl:.3f}", f"{one.perplexity:.2f}", size]
        lines.append(f"| {' | '.join(map(markdown, cells))} |")
    return [*lines, ""]

"""A report as one self-contained HTML file: Jinja makes text and tables, Vega's JavaScript in it draws the figures."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from dilap import __version__
from dilap.core.codec import to_json
from dilap.core.errors import Unavailable
from dilap.core.printable import milliseconds
from dilap.job import meaning
from dilap.job.command import command_line
from dilap.job.quality import EmbeddingQuality, PhotoQuality, Quality
from dilap.job.result import PruneResult
from dilap.job.verdict import percent
from dilap.report.figure import Figure
from dilap.report.inputs import Run
from dilap.report.tables import Table, facts_table, figure_table

_PAGE = Path(__file__).parent / "page"


@dataclass(frozen=True, kw_only=True)
class Page:
    """What a report says, in the order of reading."""

    title: str
    lead: str
    summary: Table
    notes: Sequence[str]
    figures: Sequence[Figure]
    evaluations: Sequence[Table]
    devices: Sequence[Table]
    runs: Sequence[Run]


def render(page: Page) -> str:
    """Return the page as HTML. Raises Unavailable without the package that carries Vega."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_PAGE), autoescape=True, undefined=jinja2.StrictUndefined
    )
    return environment.get_template("page.html").render(
        title=page.title,
        lead=page.lead,
        claims=[_claim(run) for run in page.runs],
        summary=page.summary,
        notes=page.notes,
        figures=[
            {"name": one.name, "title": one.title, "caption": one.caption, "table": figure_table(one)}
            for one in page.figures
        ],
        evaluations=page.evaluations,
        devices=page.devices,
        reproductions=[
            {
                "run": run.name,
                "command": command_line(run.result),
                "facts": facts_table(run),
            }
            for run in page.runs
        ],
        version=__version__,
        style=Markup((_PAGE / "style.css").read_text(encoding="utf-8")),  # noqa: S704 - our own file
        specs=Markup(_specs(page.figures)),  # noqa: S704 - no tag can end in it
        script=Markup(_script()),  # noqa: S704 - our own file, and Vega
    )


def _claim(run: Run) -> dict[str, str]:
    """Return the headline of a run, its speed-up, and a line with its quality and how its budget stands."""
    result, quality = run.result, run.result.pruned.quality
    asked = str(result.budget) if result.budget.ratio is not None else f"budget {result.budget}"
    stands = f"{asked} {result.verdict}, {percent(result.share)} of it used"
    return {
        "run": run.name,
        "status": "broken" if isinstance(quality, Quality) and meaning.is_broken(quality.kl) else result.status,
        "headline": _headline(result),
        "detail": f"{_interval(result)}{_told(quality)}; {stands}",
    }


def _told(quality: Quality | PhotoQuality | EmbeddingQuality) -> str:
    """Say how far a model is from the dense one, and of a decoder what that means."""
    in_torch = " (torch)" if quality.through == "torch" else ""
    said = f"{quality.DISTANCE} {quality.distance:.2f}{in_torch}"
    return f"{said}, {meaning.of_kl(quality.kl)}" if isinstance(quality, Quality) else said


def _headline(result: PruneResult[Any]) -> str:
    """Return the speed-up in words; it is claimed only where it was measured and is shown to differ from 1."""
    found = result.speedup
    if found is None or result.is_estimate:
        return "estimated"
    if not result.speedup_shown:
        return "no speed-up shown"
    return f"{found.value:.2f}x faster" if found.value > 1 else f"{1 / found.value:.2f}x slower"


def _interval(result: PruneResult[Any]) -> str:
    found, mark = result.speedup, result.pruned.measurement.mark
    if (ends := result.pruned.measurement.range_ns) is not None and result.is_estimate:
        low, high = (milliseconds(one / 1e9) for one in ends)
        return f"{low} to {high} ms, measured on no device; "
    if found is None or result.is_estimate:
        return "measured on no device; "
    return f"[{found.low:.2f}, {found.high:.2f}]{mark}, "


def _specs(figures: Sequence[Figure]) -> str:
    documents = [
        {
            "name": one.name,
            "description": f"{one.title}. {one.caption}",
            "spec": one.spec,
            "rows": list(one.rows),
            "columns": list(one.columns.items()),
        }
        for one in figures
    ]
    return to_json(documents, indent=None).replace("<", "\\u003c")  # so that no name can end the script element


def _script() -> str:
    try:
        import vl_convert  # noqa: PLC0415 - carries a JavaScript engine: only a report that is drawn needs it
    except ImportError as error:
        raise Unavailable("an HTML report needs Vega; pip install 'dilap[report]', or ask for --markdown") from error
    bundle: Any = vl_convert.javascript_bundle((_PAGE / "page.js").read_text(encoding="utf-8"))
    return str(bundle).replace("</script", "<\\/script")

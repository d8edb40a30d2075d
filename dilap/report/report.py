"""The report: what runs, comparisons and evaluations measured, read once and written in any of the formats."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from dilap.core.codec import written_aside
from dilap.core.errors import InvalidInput
from dilap.report import inputs, summary, tables
from dilap.report.figure import Figure
from dilap.report.figures import figures
from dilap.report.inputs import Contents
from dilap.report.summary import SummaryRow
from dilap.report.tables import Table


@dataclass(frozen=True)
class Report:
    """A report: what it shows and its title, and the formats in which it can be written."""

    contents: Contents
    title: str

    @classmethod
    def of(cls, paths: Sequence[Path], *, title: str | None = None) -> "Report":
        """Return the report of folders of runs and comparisons, and of files of evaluations. Raises InvalidInput.

        The title is by default made of the models' names.
        """
        if not paths:
            raise InvalidInput("name at least one run, comparison or evaluation; --help has examples")
        contents = inputs.read(paths)
        return cls(contents, title or _title(contents))

    @cached_property
    def rows(self) -> list[SummaryRow]:
        return summary.rows(self.contents)

    @cached_property
    def notes(self) -> list[str]:
        return tables.notes(self.contents)

    @cached_property
    def _figures(self) -> list[Figure]:
        return figures(self.contents, self.rows)

    @cached_property
    def _evaluations(self) -> list[Table]:
        return tables.evaluation_tables(self.contents.all_evaluations)

    @cached_property
    def _devices(self) -> list[Table]:
        return tables.device_tables(self.contents.runs)

    def html(self) -> str:
        """Return the report as one self-contained page. Raises Unavailable without the packages that draw."""
        from dilap.report.html import Page, render  # noqa: PLC0415 - jinja2 and Vega may be missing

        page = Page(
            title=self.title,
            lead=_lead(self.contents),
            summary=tables.summary_table(self.rows),
            notes=self.notes,
            figures=self._figures,
            evaluations=self._evaluations,
            devices=self._devices,
            runs=self.contents.runs,
        )
        return render(page)

    def markdown(self) -> str:
        parts = [tables.summary_table(self.rows), *map(tables.figure_table, self._figures)]
        parts += [*self._evaluations, *self._devices, *(tables.facts_table(run) for run in self.contents.runs)]
        return tables.to_markdown(self.title, _lead(self.contents), parts, self.notes)

    def csv(self) -> str:
        return tables.to_csv(self.rows)

    def document(self) -> dict[str, Any]:
        """Return the title, the summary and the notes, for programs."""
        return {"title": self.title, "rows": summary.documents(self.rows), "notes": self.notes}


def report(
    *paths: str | os.PathLike[str], out: str | os.PathLike[str] = "report.html", title: str | None = None
) -> Path:
    """Write the page of runs, comparisons and evaluations into the file `out`; returns its path.

    Raises InvalidInput, and Unavailable without the packages that draw.
    """
    text = Report.of([Path(path) for path in paths], title=title).html()
    with written_aside(Path(out)) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return Path(out)


def _title(contents: Contents) -> str:
    models = [Path(run.result.model).name for run in contents.runs] or [one.model for one in contents.evaluations]
    return ", ".join(dict.fromkeys(models)) + ", pruned" * bool(contents.runs)


def _lead(contents: Contents) -> str:
    """Say what was timed, on which device and through which runtime."""
    work = dict.fromkeys(
        f"{run.result.workload.describe()} on {run.result.target} through {run.result.backend}"
        + ", estimated and measured on no device" * run.result.is_estimate
        for run in contents.runs
    )
    return "; ".join(work) or "evaluations alone: no latency was measured"

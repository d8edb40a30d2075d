"""dilap-report: what runs measured, as one HTML file, Markdown, CSV, or the difference between two of them."""

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from dilap.cli import arguments, console
from dilap.core.codec import written_aside
from dilap.core.errors import InvalidInput

if TYPE_CHECKING:
    from dilap.report.inputs import Contents

_EXAMPLES = """\
  dilap-report runs/quickstart                                  # report.html in the current folder
  dilap-report runs/b85 runs/b70 runs/b55 -o budgets.html
  dilap-report runs/compare-smollm2-135m-host_cpu -o methods.html --csv methods.csv --markdown methods.md
  dilap-report runs/b85 dense.json -o report.html               # with an evaluation of the dense model
  dilap-report --diff runs/monday runs/tuesday --json"""


def _parser() -> argparse.ArgumentParser:
    made = arguments.parser("Show what runs, comparisons and evaluations measured.", _EXAMPLES)
    made.add_argument("inputs", nargs="*", metavar="RUN_OR_COMPARISON", help="their folders, and evaluation files")
    made.add_argument("-o", "--out", metavar="FILE", help="the HTML file (report.html, unless another format is asked)")
    made.add_argument("--markdown", metavar="FILE", help="the tables as Markdown; - prints them")
    made.add_argument("--csv", metavar="FILE", help="the summary as CSV, in seconds and bytes; - prints it")
    made.add_argument("--title", metavar="TEXT", help="of the report (the models' names)")
    made.add_argument("--diff", nargs=2, metavar=("A", "B"), help="instead: what differs between two of them")
    made.add_argument("--json", action="store_true", help="print the summary, or the differences, as JSON")
    return made


def _command() -> int:
    given = _parser().parse_args()
    if given.diff:
        return _diff(given)
    if not given.inputs:
        raise InvalidInput("name at least one run, comparison or evaluation; --help has examples")
    from dilap.report import inputs, summary, tables  # scipy and jinja2: a second that bad input should not cost
    from dilap.report.figures import figures

    contents = inputs.read([Path(path) for path in given.inputs])
    rows = summary.rows(contents)
    title, lead = given.title or _title(contents), _lead(contents)
    all_notes, drawn = tables.notes(contents), figures(contents, rows)
    evaluations = tables.evaluation_tables(contents.all_evaluations)
    devices = tables.device_tables(contents.runs)
    if given.out or not (given.markdown or given.csv or given.json):
        from dilap.report.html import Page, render

        page = Page(
            title=title,
            lead=lead,
            summary=tables.summary_table(rows),
            notes=all_notes,
            figures=drawn,
            evaluations=evaluations,
            devices=devices,
            runs=contents.runs,
        )
        _write(given.out or "report.html", render(page))
    if given.markdown:
        parts = [tables.summary_table(rows), *map(tables.figure_table, drawn), *evaluations, *devices]
        parts += [tables.facts_table(run) for run in contents.runs]
        _write(given.markdown, tables.to_markdown(title, lead, parts, all_notes))
    if given.csv:
        _write(given.csv, tables.to_csv(rows))
    if given.json:
        console.show_json({"title": title, "rows": summary.documents(rows), "notes": all_notes})
    return 0


def _diff(given: argparse.Namespace) -> int:
    from dilap.report import diff

    if given.inputs:
        raise InvalidInput("--diff takes two runs or evaluations, and nothing else")
    found = diff.compare(*map(Path, given.diff))
    if given.json:
        console.show_json({"differences": [asdict(one) for one in found]})
    else:
        console.show(diff.text(found))
    return 0


def _title(contents: "Contents") -> str:
    models = [Path(run.result.model).name for run in contents.runs] or [one.model for one in contents.evaluations]
    return ", ".join(dict.fromkeys(models)) + ", pruned" * bool(contents.runs)


def _lead(contents: "Contents") -> str:
    """What was timed, where."""
    work = dict.fromkeys(
        f"{run.result.workload.describe()} on {run.result.target} through {run.result.backend}"
        + ", estimated and measured on no device" * run.result.is_estimate
        for run in contents.runs
    )
    return "; ".join(work) or "evaluations alone: no latency was measured"


def _write(name: str, text: str) -> None:
    if name == "-":
        print(text, end="")
        return
    with written_aside(arguments.new_path(name)) as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(f"written to {name}", file=sys.stderr)


def main() -> None:
    console.run(_command)

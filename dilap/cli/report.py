"""dilap-report: show what runs measured as HTML, Markdown or CSV, or the difference between two of them."""

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

from dilap.cli import arguments, console
from dilap.core.codec import written_aside
from dilap.core.errors import InvalidInput

_EXAMPLES = """\
  dilap-report runs/quickstart                                  # report.html in the current folder
  dilap-report runs/b85 runs/b70 runs/b55 -o budgets.html
  dilap-report runs/compare-smollm2-135m-host_cpu -o methods.html --csv methods.csv --markdown methods.md
  dilap-report runs/b85 dense.json -o report.html               # with an evaluation of the dense model
  dilap-report --diff runs/monday runs/tuesday --json"""


def _parser() -> argparse.ArgumentParser:
    made = arguments.parser("Show what runs, comparisons and evaluations measured.", _EXAMPLES, lists_runtimes=False)
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
    from dilap.report.report import Report  # importing scipy and jinja2 takes a second: bad input is refused first

    made = Report.of([Path(path) for path in given.inputs], title=given.title)
    if given.out or not (given.markdown or given.csv or given.json):
        _write(given.out or "report.html", made.html())
    if given.markdown:
        _write(given.markdown, made.markdown())
    if given.csv:
        _write(given.csv, made.csv())
    if given.json:
        console.show_json(made.document())
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


def _write(name: str, text: str) -> None:
    if name == "-":
        print(text, end="")
        return
    with written_aside(arguments.new_path(name)) as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(f"written to {name}", file=sys.stderr)


def main() -> None:
    console.run(_command)


if __name__ == "__main__":
    main()

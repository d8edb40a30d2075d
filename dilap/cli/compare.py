"""dilap-compare: every method at the same measured latency, before and after the same recovery."""

import argparse
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from dilap.cli import arguments, comparison, console
from dilap.cli.comparison import Row
from dilap.cli.console import Console
from dilap.cli.job_arguments import add_search, add_text_and_recovery, job_options
from dilap.codec import decode, digest, encode, read_json, write_json
from dilap.errors import InvalidInput
from dilap.methods import METHODS
from dilap.profilers.devices import Device
from dilap.types import Budget

if TYPE_CHECKING:
    from dilap.cli.stages import JobOptions

_LARGE = ("checkpoint", "artifact")  # of a run's folder, dropped when its numbers are known
_NOT_COMPARED = ("equal_widths",)  # DiLAP itself where a runtime needs equal widths
_EXAMPLES = """\
  dilap-compare --target host_cpu --budget 85% 70% 55% --methods all
  dilap-compare --target host_cpu --budget 70% --methods dilap flap sleb my_module:MyMethod --recover lora
A killed comparison goes on where it stopped when the same command is given again; failed methods are tried again."""


def _parser() -> argparse.ArgumentParser:
    made = arguments.parser(
        "Prune with several methods to the same measured latency and compare what is left.", _EXAMPLES
    )
    made.add_argument("--target", required=True, help="the device; see dilap-profile --list-devices")
    made.add_argument("--budget", required=True, nargs="+", metavar="B", help="40ms, 70%% (of dense) or 1.4x, several")
    made.add_argument("--stat", choices=["p50", "p90"], default="p50", help="the latency the budgets are about (p50)")
    made.add_argument(
        "--methods",
        nargs="+",
        default=["all"],
        metavar="NAME",
        help=f"all, or some of {', '.join(METHODS)}, or your own as module:attribute (all)",
    )
    arguments.add_model(made)
    made.add_argument("--out", metavar="DIR", help="the comparison's folder (runs/compare-MODEL-TARGET)")
    made.add_argument("--keep-models", action="store_true", help="keep every checkpoint and artifact")
    made.add_argument("--json", action="store_true", help="print compare.json")
    arguments.add_devices(made)
    arguments.add_workload(made)
    add_search(made)
    add_text_and_recovery(made, mode="full", steps=16)
    return made


def _command() -> int:
    given = _parser().parse_args()
    budgets = [Budget.parse(text, statistic=given.stat) for text in given.budget]
    names = _names(given.methods)
    devices = arguments.devices_of(given, given.target)
    base = job_options(given, device=devices[0], budget=budgets[0])
    name = Path(given.model).name.removesuffix(".gguf")
    out = arguments.new_path(given.out or f"runs/compare-{name}-{given.target}")
    screen = Console()
    _open(out, base)
    jobs = [replace(base, budget=budget, method=method) for budget in budgets for method in names]
    rows: list[Row] = []
    with screen.bar("compare", total=len(jobs), unit="run") as bar:
        for row in _rows(jobs, devices, out, screen, keep_models=given.keep_models):
            rows.append(row)
            comparison.write(out, rows)
            bar.update(1)
    if given.json:
        json.dump(comparison.document(rows), sys.stdout, indent=1)
    else:
        print(f"{comparison.markdown(rows)}\neverything is in {out}")
    return 0


def _names(asked: Sequence[str]) -> list[str]:
    """The methods asked for. Raises InvalidInput for an unknown one, before hours are spent on the others."""
    if list(asked) == ["all"]:
        return [name for name in METHODS if name not in _NOT_COMPARED]
    for name in asked:
        if ":" not in name and name not in METHODS:
            raise InvalidInput(f"unknown method {name!r}; known: all, {', '.join(sorted(METHODS))}")
    return list(asked)


def _open(out: Path, base: "JobOptions") -> None:
    """Start, or go on with a comparison of the same options. Raises InvalidInput for another's folder."""
    options = {key: value for key, value in asdict(base).items() if key not in ("budget", "method", "settings")}
    path = out / "shared" / "identity.json"
    if not path.exists():
        write_json(path, options)
    elif digest(read_json(path)) != digest(options):
        raise InvalidInput(f"{out} holds a comparison with other options; remove it or choose another --out")


def _rows(
    jobs: Sequence["JobOptions"], devices: Sequence[Device], out: Path, screen: Console, *, keep_models: bool
) -> Iterator[Row]:
    for number, options in enumerate(jobs, start=1):
        budget = str(options.budget).replace("%", "pct")
        folder = out / "runs" / budget / options.method.replace(":", ".")
        if not (folder / "row.json").exists():
            screen.say(f"\n=== {number} of {len(jobs)}: {options.method} at {options.budget} ===")
            row = _run(options, devices, folder, out, screen)
            if row.error is not None:
                screen.say(f"{options.method} failed: {row.error}")
                yield row
                continue
            write_json(folder / "row.json", encode(row))
            for name in () if keep_models else _LARGE:
                shutil.rmtree(folder / name, ignore_errors=True)
        yield decode(Row, read_json(folder / "row.json"), source=str(folder / "row.json"))


def _run(options: "JobOptions", devices: Sequence[Device], folder: Path, out: Path, screen: Console) -> Row:
    from dilap.cli.job import prune  # torch and transformers: seconds that bad input should not cost

    try:
        if folder.exists():  # killed between the result and its row
            shutil.rmtree(folder)
        result = prune(options, devices=devices, out=folder, console=screen, shared=out / "shared")
    except Exception as error:  # one method's failure, a user's own included, must not lose the others
        text = (str(error) or type(error).__name__).splitlines()[0]
        return Row(method=options.method, budget=str(options.budget), error=text)
    if result is None:
        return Row(method=options.method, budget=str(options.budget), error="the dense model keeps this budget")
    return comparison.row_of(result)


def main() -> None:
    console.run(_command)

"""dilap-compare: every method at the same measured latency, before and after the same recovery."""

import argparse
import copy
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from dilap import __version__, methods
from dilap.cli import arguments, comparison, console
from dilap.cli.comparison import Row
from dilap.cli.console import Console
from dilap.cli.job_arguments import add_search, add_text_and_recovery, job_options
from dilap.cli.workspace import changes, held, remove_leftovers_below, tidy
from dilap.codec import decode, digest, encode, read_json, write_json
from dilap.errors import InvalidInput, reason_of
from dilap.methods import METHODS
from dilap.profilers.devices import Device
from dilap.types import Budget

if TYPE_CHECKING:
    from dilap.cli.result import PruneResult
    from dilap.cli.stages import JobOptions
    from dilap.source import Source

_LARGE = ("checkpoint", "artifact")  # of a run's folder, dropped when its numbers are known
_NOT_COMPARED = ("equal_widths",)  # DiLAP itself where a runtime needs equal widths
_EXAMPLES = """\
  dilap-compare --target host_cpu --budget 85% 70% 55% --methods all
  dilap-compare --target host_cpu --ratio 0.3 0.5 0.8 --methods dilap magnitude --keep-models
  dilap-compare --target host_cpu --budget 70% --methods dilap flap sleb my_module:MyMethod --recover lora
  dilap-compare --target host_cpu --budget 70% --methods flap loraprune --set flap.metric=WIFN --set loraprune.steps=50
  dilap-compare --list-methods
A killed comparison goes on where it stopped when the same command is given again; failed methods are tried again."""


def _parser() -> argparse.ArgumentParser:
    made = arguments.parser(
        "Prune with several methods to the same measured latency and compare what is left.", _EXAMPLES
    )
    made.add_argument("--target", required=True, help="the device; see dilap-profile --list-devices")
    made.add_argument(
        "--budget",
        action=arguments.Several,
        default=[],
        metavar="B",
        help="40ms, 70%% (of dense) or 1.4x, several (needed, or --ratio)",
    )
    made.add_argument(
        "--ratio",
        action=arguments.Several,
        convert=arguments.share,
        default=[],
        metavar="R",
        help="also, or instead: shares of the weights to remove",
    )
    made.add_argument("--stat", choices=["p50", "p90"], default="p50", help="the latency the budgets are about (p50)")
    made.add_argument(
        "--methods",
        action=arguments.Several,
        default=["all"],
        metavar="NAME",
        help=f"all, or some of {', '.join(METHODS)}, or your own as module:attribute (all)",
    )
    arguments.add_model(made)
    made.add_argument("--out", metavar="DIR", help="the comparison's folder (runs/compare-MODEL-TARGET)")
    made.add_argument(
        "--set", action="append", default=[], metavar="METHOD.NAME=VALUE", help="a setting of a method; repeat for more"
    )
    made.add_argument("--list-methods", action=_ListMethods, nargs=0, help="what they do, and their sources")
    made.add_argument("--keep-models", action="store_true", help="keep every checkpoint and artifact")
    made.add_argument("--json", action="store_true", help="print compare.json")
    arguments.add_devices(made)
    arguments.add_workload(made)
    add_search(made)
    add_text_and_recovery(made, mode="full", steps=16)
    return made


class _ListMethods(argparse.Action):
    """Prints the methods and leaves, like --version."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        width = max(map(len, METHODS))
        console.show("\n".join(f"{name:{width}}  {methods.SOURCES[name]}" for name in METHODS))
        parser.exit()


def _command() -> int:
    given = _parser().parse_args()
    budgets = [Budget.parse(text, statistic=given.stat) for text in given.budget]
    budgets += map(Budget.of_ratio, given.ratio)
    if not budgets:
        raise InvalidInput("nothing to compare at: name a --budget or a --ratio; --help has examples")
    names = _names(given.methods)
    settings = _settings(given.set, names)
    devices = arguments.devices_of(given, given.target)
    base = job_options(given, device=devices[0], budget=budgets[0])
    default = f"compare-{arguments.name_of(given.model)}-{given.target}"
    out = arguments.new_path(given.out) if given.out else arguments.home_of(given.model) / "runs" / default
    jobs = [
        replace(base, budget=budget, method=method, settings=settings[method]) for budget in budgets for method in names
    ]
    runs = _Runs(model=given.model, devices=devices, out=out, screen=Console(), keep_models=given.keep_models)
    _require_ours(out)
    with held(out / "shared"):
        _open(out, base, settings)
        rows = runs.rows(jobs)
    if given.json:
        console.show_json(comparison.document(rows))
    else:
        console.show(f"{comparison.markdown(rows)}\neverything is in {out}")
    return 0


def _names(asked: Sequence[str]) -> list[str]:
    """The methods asked for. Raises InvalidInput for an unknown one, before hours are spent on the others."""
    if "all" in asked:
        return [name for name in METHODS if name not in _NOT_COMPARED]
    for name in asked:
        if ":" not in name and name not in METHODS:
            raise InvalidInput(f"unknown method {name!r}; known: all, {', '.join(sorted(METHODS))}")
    return list(asked)


def _settings(pairs: Sequence[str], names: Sequence[str]) -> dict[str, dict[str, str]]:
    """Of every method: `name=value` for all that have a setting of that name, `METHOD.name=value` for one.

    Raises InvalidInput for what no method has, before hours are spent.
    """
    found: dict[str, dict[str, str]] = {name: {} for name in names}
    known = {name: methods.settings_of(name) for name in names}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        method, _, setting = key.rpartition(".")
        chosen = [method] if method else [name for name in names if setting in known[name]]
        if not equals or not chosen or not set(chosen) <= set(names):
            raise InvalidInput(
                f"--set takes METHOD.NAME=VALUE, or NAME=VALUE of a setting that some have, got {pair!r}"
            )
        for name in chosen:
            found[name][setting] = value
    for name in names:
        methods.get(name, found[name])
    return found


def _require_ours(out: Path) -> None:
    """Raises InvalidInput for a folder with content that no comparison began."""
    shared = out / "shared"
    begun = {shared, shared / "lock", *shared.glob(".identity.json.*.part")}  # killed before it said what it is
    if out.exists() and not (shared / "identity.json").exists():
        strange = [one for one in out.rglob("*") if one not in begun]
        if strange or not out.is_dir():
            raise InvalidInput(f"{out} exists and is no comparison; move it away or choose another --out")


def _open(out: Path, base: "JobOptions", settings: Mapping[str, Mapping[str, str]]) -> None:
    """Start, or go on with a comparison of the same options, other budgets and methods perhaps.

    Raises InvalidInput for another's folder.
    """
    options = {key: value for key, value in asdict(base).items() if key not in ("budget", "method", "settings")}
    options["settings"] = {name: chosen for name, chosen in settings.items() if chosen}
    path = out / "shared" / "identity.json"
    if not path.exists():
        write_json(path, options)
    elif digest(read_json(path)) != digest(options):
        raise InvalidInput(f"{out} holds a comparison with other options; remove it or choose another --out")
    remove_leftovers_below(out)


@dataclass(frozen=True, kw_only=True)
class _Runs:
    """The runs of a comparison, in folders below `out`; what they have in common is in `out`/shared."""

    model: str
    devices: Sequence[Device]
    out: Path
    screen: Console
    keep_models: bool

    @cached_property
    def _dense(self) -> "Source":
        from dilap.source import load

        return load(self.model)

    def rows(self, jobs: Sequence["JobOptions"]) -> list[Row]:
        """All rows, those of earlier sittings included; the tables are written anew after each."""
        rows: list[Row] = []
        known = sum(self._row_file(options).exists() for options in jobs)
        if known:
            self.screen.say(f"going on: {known} of {len(jobs)} runs are done")
        if known < len(jobs):
            self._require_possible(jobs[0])
            self._require_same_inputs(jobs)
        with self.screen.bar("compare", total=len(jobs), unit="run") as bar:
            bar.initial = known  # for the time that is left: known rows take none
            for number, options in enumerate(jobs, start=1):
                if not self._row_file(options).exists():
                    self.screen.say(f"=== {number} of {len(jobs)}: {options.method} at {options.budget} ===")
                rows.append(self._row(options))
                comparison.write(self.out, rows)
                bar.update(1)
        if all(row.error is None for row in rows) and not self.keep_models:
            shutil.rmtree(self.out / "shared" / "methods", ignore_errors=True)  # gigabytes that no run will ask for
        return rows

    def _require_possible(self, options: "JobOptions") -> None:
        """What no method could do is told once, not by every row."""
        from dilap.cli.job import require_possible

        require_possible(options, self._dense)

    def _require_same_inputs(self, jobs: Sequence["JobOptions"]) -> None:
        """Raises InvalidInput where something that the rows and shared files came from has another content now.

        A user's own method may be mended as long as it has no rows.
        """
        from dilap.cli.job import named_inputs

        path = self.out / "shared" / "inputs.json"
        begun = read_json(path) if path.exists() else {}
        now = {"DiLAP": __version__, "the model": self._dense.digest}
        for options in jobs:
            now |= named_inputs(options, self._dense)
        mended = {
            f"the code of {options.method}"
            for options in jobs
            if not any(self.out.glob(f"runs/*/{self._row_file(options).parent.name}/row.json"))
        }
        if changed := changes({name: one for name, one in begun.items() if name not in mended}, now):
            raise InvalidInput(
                f"{changed} changed since the comparison in {self.out} began; put it back as it was, or choose another "
                "--out"
            )
        write_json(path, begun | now)

    def _row_file(self, options: "JobOptions") -> Path:
        budget = str(options.budget).replace("%", "pct").replace(" ", "-")
        return self.out / "runs" / budget / options.method.replace(":", ".") / "row.json"

    def _row(self, options: "JobOptions") -> Row:
        path = self._row_file(options)
        if path.exists():
            return comparison.read_row(read_json(path), source=str(path))
        row = self._run(options, path.parent)
        if row.error is not None:
            self.screen.say(f"{options.method} failed: {row.error}")
            return row
        for name in () if self.keep_models else _LARGE:
            shutil.rmtree(path.with_name(name), ignore_errors=True)
        write_json(path, encode(row))  # at last, so that a kill leaves nothing that is dropped
        return row

    def _result(self, options: "JobOptions", folder: Path) -> "PruneResult":
        """Of a run that is whole. Raises InvalidInput for a folder that is anything else than this very run."""
        from dilap.cli.result import PruneResult

        path = folder / "result.json"
        if not path.is_file():
            raise InvalidInput(f"{folder} exists and is no run of this comparison; move it away and run again")
        result = decode(PruneResult, read_json(path), source=str(path))
        if (digest(result.options), result.model_digest) != (digest(asdict(options)), self._dense.digest):
            raise InvalidInput(f"{folder} is another run's, of other options or another model; move it away")
        tidy(folder)
        return result

    def _run(self, options: "JobOptions", folder: Path) -> Row:
        from dilap.cli.job import prune  # torch and transformers: seconds that bad input should not cost

        try:
            if folder.exists():  # killed between the result and its row
                return comparison.row_of(self._result(options, folder))
            result = prune(
                options,
                devices=self.devices,
                out=folder,
                console=self.screen,
                shared=self.out / "shared",
                source=replace(self._dense, model=copy.deepcopy(self._dense.model)),  # the run will shrink it
            )
        except Exception as error:  # one method's failure, a user's own included, must not lose the others
            return Row(method=options.method, budget=str(options.budget), error=reason_of(error))
        if result is None:
            return Row(method=options.method, budget=str(options.budget), error="the dense model keeps this budget")
        return comparison.row_of(result)


def main() -> None:
    console.run(_command)

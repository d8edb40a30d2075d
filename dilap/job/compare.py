"""Compare pruning methods at the same measured latency, before and after the same recovery."""

import copy
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from dilap import __version__, methods
from dilap.core.codec import decode, digest, encode, read_json, write_json
from dilap.core.errors import InvalidInput, reason_of
from dilap.core.progress import Progress
from dilap.core.workload import Budget
from dilap.job import comparison
from dilap.job.comparison import Row
from dilap.job.kinds import Kind, kind_of
from dilap.job.options import CommonOptions
from dilap.job.result import PruneResult
from dilap.job.run_folder import changes, foreign_content, held, remove_leftovers_below, tidy
from dilap.job.shards import Shard, take_over
from dilap.profilers.devices.device import Device

Options = TypeVar("Options", bound=CommonOptions)
_LARGE = ("checkpoint", "artifact")  # folders of a run, removed when its numbers are known


def compare(
    base: CommonOptions,
    *,
    budgets: Sequence[Budget],
    settings: Mapping[str, Mapping[str, str]],
    devices: Sequence[Device],
    out: Path,
    progress: Progress,
    keep_models: bool = False,
    tables: Path | None = None,
    shard: Shard | None = None,
) -> list[Row]:
    """Prune with every method in `settings` at every budget, and return one row for each of them.

    `settings` has the settings of each method by its name; `base` has all other options. `out` keeps what is done, also
    by methods that fail: the same call goes on in it. With a `shard` only its runs are done, in a folder beside `out`;
    without, those that shards have finished are taken over. Raises InvalidInput where the folder was begun by a
    comparison with other options, or by anything else.
    """
    jobs = jobs_of(base, budgets=budgets, settings=settings, shard=shard)
    if shard is not None:
        out = shard.folder(out)
    runs = _Runs(base=base, devices=devices, out=out, progress=progress, keep_models=keep_models, tables=tables)
    if foreign_content(out, out / "shared"):
        raise InvalidInput(f"{out} exists and is no comparison; move it away or choose another --out")
    with held(out / "shared"):
        _open(out, base, settings)
        if shard is None:
            take_over(out, progress)
        return runs.rows(jobs)


def jobs_of(
    base: Options,
    *,
    budgets: Sequence[Budget],
    settings: Mapping[str, Mapping[str, str]],
    shard: Shard | None,
) -> list[Options]:
    """Return the jobs of a comparison, or of its `shard`. Raises InvalidInput for a setting that a method lacks."""
    for method, chosen in settings.items():  # before hours are spent on the others
        methods.get(method, chosen, table=kind_of(base).methods)
    jobs = [
        replace(base, budget=budget, method=method, settings=dict(chosen))
        for budget in budgets
        for method, chosen in settings.items()
    ]
    return jobs if shard is None else shard.of(jobs)


def _open(out: Path, base: CommonOptions, settings: Mapping[str, Mapping[str, str]]) -> None:
    """Start a comparison in `out`, or go on with one of the same options; its budgets and methods may be others.

    Raises InvalidInput where the comparison in `out` has other options.
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
    """The runs of a comparison, in folders below `out`; what they have in common is in the folder `out`/shared."""

    base: CommonOptions
    devices: Sequence[Device]
    out: Path
    progress: Progress
    keep_models: bool
    tables: Path | None

    @property
    def _kind(self) -> Kind:
        return kind_of(self.base)

    @cached_property
    def _dense(self) -> Any:
        return self._kind.load(self.base)

    def rows(self, jobs: Sequence[CommonOptions]) -> list[Row]:
        """Return all rows, after doing the runs that have none yet; the tables are rewritten after each row."""
        rows: list[Row] = []
        known = sum(self._row_file(options).exists() for options in jobs)
        if known:
            self.progress.say(f"going on: {known} of {len(jobs)} runs are done")
        if known < len(jobs):
            self._require_possible(jobs[0])
            self._require_same_inputs(jobs)
        with self.progress.bar("compare", total=len(jobs), unit="run") as bar:
            bar.initial = known  # known rows take no time, and must not count in the time left
            for number, options in enumerate(jobs, start=1):
                if not self._row_file(options).exists():
                    self.progress.say(f"=== {number} of {len(jobs)}: {options.method} at {options.budget} ===")
                rows.append(self._row(options))
                comparison.write(self.out, rows)
                bar.update(1)
        if all(row.error is None for row in rows) and not self.keep_models:
            shutil.rmtree(self.out / "shared" / "methods", ignore_errors=True)  # gigabytes that no run needs any more
        return rows

    def _require_possible(self, options: CommonOptions) -> None:
        """Raise for what no method could do, so that it is reported once and not in every row."""
        self._kind.require_possible(options, self._dense)

    def _require_same_inputs(self, jobs: Sequence[CommonOptions]) -> None:
        """Raise InvalidInput where an input has changed since the rows and shared files were made from it.

        The code of a user's own method may change as long as the method has no rows.
        """
        path = self.out / "shared" / "inputs.json"
        begun = read_json(path) if path.exists() else {}
        now = {"DiLAP": __version__, "the model": self._dense.digest}
        for options in jobs:
            now |= self._kind.named_inputs(options, self._dense)
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

    def _row_file(self, options: CommonOptions) -> Path:
        budget = str(options.budget).replace("%", "pct").replace(" ", "-")
        return self.out / "runs" / budget / options.method.replace(":", ".") / "row.json"

    def _row(self, options: CommonOptions) -> Row:
        path = self._row_file(options)
        if path.exists():
            return comparison.read_row(read_json(path), source=str(path))
        row = self._run(options, path.parent)
        if row.error is not None:
            self.progress.say(f"{options.method} failed: {row.error}")
            return row
        for name in () if self.keep_models else _LARGE:
            shutil.rmtree(path.with_name(name), ignore_errors=True)
        write_json(path, encode(row))  # last: a run with a row has no large folders left, whenever it is killed
        return row

    def _result(self, options: CommonOptions, folder: Path) -> PruneResult[Any]:
        """Read the result of a finished run. Raises InvalidInput where `folder` is anything else than this run."""
        path = folder / "result.json"
        if not path.is_file():
            raise InvalidInput(f"{folder} exists and is no run of this comparison; move it away and run again")
        result = decode(PruneResult, read_json(path), source=str(path))
        if (digest(result.options), result.model_digest) != (digest(asdict(options)), self._dense.digest):
            raise InvalidInput(f"{folder} is another run's, of other options or another model; move it away")
        tidy(folder)
        return result

    def _run(self, options: CommonOptions, folder: Path) -> Row:
        try:
            if folder.exists():  # an earlier call was killed between the run and its row
                return comparison.row_of(self._result(options, folder))
            result = self._kind.prune(
                options,
                devices=self.devices,
                out=folder,
                progress=self.progress,
                shared=self.out / "shared",
                tables=self.tables,
                source=replace(self._dense, model=copy.deepcopy(self._dense.model)),  # a copy: the run shrinks it
            )
        except Exception as error:  # one method's failure, a user's own included, must not lose the others
            return Row(method=options.method, budget=str(options.budget), error=reason_of(error))
        if result is None:
            return Row(method=options.method, budget=str(options.budget), error="the dense model keeps this budget")
        return comparison.row_of(result)

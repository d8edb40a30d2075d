"""Read the runs, comparisons and evaluations that a report is about."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dilap.core.codec import decode, read_json
from dilap.core.errors import InvalidInput
from dilap.core.graph import Network
from dilap.core.plan import Plan
from dilap.core.shape import LayerWidths
from dilap.evaluation.document import Evaluation
from dilap.job.comparison import read_rows
from dilap.job.result import PruneResult, read_result
from dilap.profilers.tables.table import LatencyTable


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a report shows of a prune job's folder.

    `name` is unique in a report. `widths` are those of all layers of the dense decoder, the deleted ones included; an
    image network has none, but `channels`: how many units of every group are left, and how many there were. `table` and
    `evaluation` are None where the folder has none.
    """

    name: str
    result: PruneResult[Any]
    widths: tuple[LayerWidths, ...] = ()
    channels: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    table: LatencyTable | None = None
    evaluation: Evaluation | None = None


@dataclass(frozen=True, kw_only=True)
class Contents:
    """Everything that a report shows.

    `evaluations` are those that belong to no run, like the dense model's. `failures` say, a sentence each, which
    methods of a comparison failed and why.
    """

    runs: tuple[Run, ...]
    evaluations: tuple[Evaluation, ...]
    failures: tuple[str, ...]

    @property
    def all_evaluations(self) -> list[tuple[str, Evaluation]]:
        """All evaluations, each with the name under which it is shown: first those of the runs, then the others."""
        runs = [(run.name, run.evaluation) for run in self.runs if run.evaluation is not None]
        return [*runs, *((f"{one.model} ({one.backend}, {one.precision})", one) for one in self.evaluations)]


def read(paths: Sequence[Path]) -> Contents:
    """Read the folders of runs and comparisons, and the files of evaluations, and give every run a unique name.

    Raises InvalidInput, naming the file, for anything else.
    """
    found = Contents(runs=(), evaluations=(), failures=())
    for path in paths:
        more = _read(path)
        found = Contents(
            runs=found.runs + more.runs,
            evaluations=found.evaluations + more.evaluations,
            failures=found.failures + more.failures,
        )
    return replace(found, runs=_named_apart(found.runs))


def _read(path: Path) -> Contents:
    if (path / "result.json").is_file():
        return Contents(runs=(_run(path),), evaluations=(), failures=())
    if (path / "compare.json").is_file():
        return _comparison(path)
    if path.is_file():
        evaluation = decode(Evaluation, read_json(path), source=str(path))
        return Contents(runs=(), evaluations=(evaluation,), failures=())
    raise InvalidInput(f"{path} is no run (result.json), comparison (compare.json) or evaluation file")


def _run(folder: Path) -> Run:
    path = folder / "plan.json"
    result, plan = read_result(folder), decode(Plan, read_json(path), source=str(path))
    return _network_run(folder, result, plan) if result.is_of_network else _decoder_run(folder, result, plan)


def _network_run(folder: Path, result: PruneResult[Any], plan: Plan[Network]) -> Run:
    if plan.digest != result.plan_digest:
        raise InvalidInput(f"{folder}: its plan.json is not that of its result.json")
    channels = {group.name: (plan.counts[group.name], group.num_units) for group in plan.architecture.groups}
    return Run(name=folder.resolve().name, result=result, channels=channels)


def _decoder_run(folder: Path, result: PruneResult[Any], plan: Plan) -> Run:
    table, evaluation = folder / "table.jsonl", folder / "evaluation.json"
    widths = plan.all_widths()
    if len(widths) != len(result.dense.artifact.decoder.layers):
        raise InvalidInput(f"{folder}: its plan.json is of another model than its result.json")
    return Run(
        name=folder.resolve().name,
        result=result,
        widths=widths,
        table=LatencyTable.read(table) if table.is_file() else None,
        evaluation=decode(Evaluation, read_json(evaluation), source=str(evaluation)) if evaluation.is_file() else None,
    )


def _comparison(folder: Path) -> Contents:
    source = str(folder / "compare.json")
    rows = read_rows(read_json(folder / "compare.json").get("rows", []), source=source)
    runs = tuple(_run(path.parent) for path in sorted(folder.glob("runs/*/*/result.json")))
    failures = tuple(f"{row.method} at {row.budget} failed: {row.error}" for row in rows if row.error is not None)
    return Contents(runs=runs, evaluations=(), failures=failures)


def _named_apart(runs: Sequence[Run]) -> tuple[Run, ...]:
    """Return the runs under unique names: equal names get the budget added, and then a number where needed."""
    names = [run.name for run in runs]
    named = [replace(run, name=f"{run.name} {run.result.budget}") if names.count(run.name) > 1 else run for run in runs]
    names = [run.name for run in named]
    return tuple(
        replace(run, name=f"{run.name} ({names[:at].count(run.name) + 1})") if names.count(run.name) > 1 else run
        for at, run in enumerate(named)
    )

"""lm-eval's tasks by name, from its hub data sets or from local files."""

import difflib
import functools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from lm_eval.tasks import TaskManager
from lm_eval.tasks._factory import TaskFactory

from dilap.core.errors import InvalidInput, Unavailable
from dilap.evaluation.document import SEED
from dilap.evaluation.local_task import LocalTask

_OWN = Path(__file__).parent / "tasks"
NUM_FEWSHOT = {"mmlu": 5}  # where papers take another number than lm-eval


@dataclass(frozen=True, kw_only=True)
class LoadedTask:
    """A task, or a group of them, as `lm_eval.evaluate` takes it."""

    name: str
    task_dict: dict[str, Any]

    @property
    def tasks(self) -> Mapping[str, Any]:
        """The parts of the task by name: the task itself, or the members of a group."""
        found: Mapping[str, Any] = self.task_dict["tasks"]
        return found


def load(names: Sequence[str], *, data_dir: Path | None, num_fewshot: int | None) -> list[LoadedTask]:
    """Return the tasks of these names with their data, from the hub or from `data_dir`.

    Raises InvalidInput for an unknown task or wrong files, and Unavailable where the data cannot be had from the hub.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # otherwise it explains its defaults at length
    datasets.disable_progress_bars()
    manager = _manager()
    for name in names:
        if name not in manager.task_index:
            close = difflib.get_close_matches(name, manager.all_tasks, n=3)
            hint = f"; did you mean {', '.join(close)}?" if close else ""
            raise InvalidInput(f"lm-eval has no task {name!r}{hint}")
    if data_dir is not None and not data_dir.is_dir():
        raise InvalidInput(f"{data_dir}: no such folder; --data-dir has a folder for each task")
    return [_load(manager, name, data_dir, num_fewshot) for name in names]


@functools.cache
def _manager() -> TaskManager:
    """Return lm-eval's index of tasks, made once: listing 14,000 tasks takes seconds."""
    return TaskManager(include_path=str(_OWN))


def _load(manager: TaskManager, name: str, data_dir: Path | None, num_fewshot: int | None) -> LoadedTask:
    changes: dict[str, Any] = {}
    if data_dir is not None:
        changes |= {"class": LocalTask, "dataset_kwargs": {"data_dir": str(data_dir), "asked": name}}
    if (shots := num_fewshot if num_fewshot is not None else NUM_FEWSHOT.get(name)) is not None:
        changes["num_fewshot"] = shots
    try:
        # lm-eval's public loader takes no changes of the tasks that it knows by name.
        built = TaskFactory().build(manager.task_index[name], overrides=changes, registry=manager.task_index)
        loaded: dict[str, Any] = manager.load(built if isinstance(built, list) else [built])
    except InvalidInput:
        raise
    except Exception as error:  # the hub client and the data sets raise many types
        reason = (str(error) or type(error).__name__).partition("\n")[0][:200]
        raise Unavailable(f"the data of {name} cannot be had: {reason}; see --data-dir") from error
    for task in loaded["tasks"].values():
        if isinstance(task, LocalTask):
            task.require_schema()
        if task.get_config("num_fewshot") is None or task.OUTPUT_TYPE == "loglikelihood_rolling":
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=SEED)
    return LoadedTask(name=name, task_dict=loaded)

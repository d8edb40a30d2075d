"""lm-eval's tasks on local files: `DIR/<task>/<split>.jsonl[.gz]`, one row of the task's data set a line."""

import json
import zlib
from pathlib import Path
from typing import Any

import datasets
from lm_eval.api.task import ConfigurableTask

from dilap.core.documents import content_of
from dilap.core.errors import InvalidInput, reason_of

_SPLITS = ("test", "validation", "train")  # tried in this order where the task's own split has no file


class LocalTask(ConfigurableTask):  # type: ignore[misc]
    """A task of lm-eval that reads local files.

    Its `dataset_kwargs` have the folder `data_dir`, and the task that was `asked` for, of which it may be a part. It is
    scored on the split that lm-eval would take, or else on the first of test, validation and train that has a file.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        """Raise InvalidInput, naming the file, where the first row, with which lm-eval begins, is not of this task."""
        try:
            super().__init__(config={name: value for name, value in config.items() if name != "class"})
        except Exception as error:  # whatever templates and the task's own functions raise
            if isinstance(error, InvalidInput) or not hasattr(self, "path"):
                raise
            raise InvalidInput(self._not_of_this_task(1, self.dataset["scored"][0], error)) from error

    def download(self, dataset_kwargs: dict[str, Any] | None = None, **_: object) -> None:
        """Read the task's files into `dataset`; lm-eval calls this. Raises InvalidInput, naming file and line."""
        given = dataset_kwargs or {}
        data_dir, config = Path(given["data_dir"]), self.config
        own = data_dir / config.task
        folder = own if own.is_dir() else data_dir / given["asked"]
        wanted = (config.test_split or config.validation_split, *_SPLITS)
        path = next((found for split in wanted if (found := _file_of(folder, split))), None)
        if path is None:
            raise InvalidInput(f"{config.task}: no {folder / 'test.jsonl'}, validation or train (.gz too)")
        examples = self.fewshot_cfg.split or config.training_split
        examples_path = _file_of(folder, examples) if examples else None
        is_text = config.output_type == "loglikelihood_rolling"  # such a task takes no examples
        if config.num_fewshot and not is_text and examples_path is None:
            raise InvalidInput(f"{config.task}: its {config.num_fewshot} examples need {folder / f'{examples}.jsonl'}")
        self.path = path
        self.dataset = {"scored": self._rows(path), "examples": self._rows(examples_path or path)}
        config.test_split, config.validation_split, config.training_split = "scored", None, "examples"
        if self.fewshot_cfg.split is not None:
            self.fewshot_cfg.split = "examples"

    def _rows(self, path: Path) -> datasets.Dataset:
        """Return the rows of a file; where all rows name a subject, only those of this task's subject."""
        rows = _read(path)
        subject = self.config.dataset_name
        if all("subject" in row for row in rows):
            rows = [row for row in rows if row["subject"] == subject]
        if not rows:
            raise InvalidInput(f"{path}: it holds no row" + (f" of the subject {subject!r}" if subject else ""))
        try:
            return datasets.Dataset.from_list(rows)
        except Exception as error:  # Arrow raises errors of its own types
            reason = str(error).partition("\n")[0]
            raise InvalidInput(f"{path}: its rows are not alike: {reason}") from error

    def require_schema(self) -> None:
        """Raise InvalidInput, naming file and row, where lm-eval's templates cannot read a row."""
        for number, row in enumerate(self.eval_docs, start=1):
            if error := self._complaint(row):
                raise InvalidInput(self._not_of_this_task(number, row, error)) from error

    def _complaint(self, row: dict[str, Any]) -> Exception | None:
        """Return what is wrong with a row; None where lm-eval can read it."""
        try:
            text, target = self.doc_to_text(row), self.doc_to_target(row)
            choices = self.doc_to_choice(row) if self.config.doc_to_choice is not None else None
        except Exception as error:  # whatever templates and the task's own functions raise
            return error
        answer = text if self.multiple_input else target  # then contexts are chosen for one target (winogrande)
        if choices is not None and not (isinstance(answer, int) and 0 <= answer < len(choices)):
            return ValueError(f"its answer {answer!r} is none of {len(choices)} choices")
        return None

    def _not_of_this_task(self, number: int, row: dict[str, Any], error: Exception) -> str:
        reason = (str(error) or type(error).__name__).partition("\n")[0]
        columns = ", ".join(row)
        return f"{self.path}: row {number} is not of {self.config.task}: it has {columns}, and lm-eval says: {reason}"


def _file_of(folder: Path, split: str) -> Path | None:
    """Return the file of a split: `<split>.jsonl`, or a part of it like `validation_1k.jsonl`, either also with .gz."""
    found = [path for pattern in (f"{split}.jsonl*", f"{split}_*.jsonl*") for path in sorted(folder.glob(pattern))]
    return next((path for path in found if path.name.endswith((".jsonl", ".jsonl.gz"))), None)


def _read(path: Path) -> list[dict[str, Any]]:
    """Return the JSON objects in a file; raw line feeds inside strings are accepted, since a row of MMLU has one."""
    try:
        text = content_of(path).decode("utf-8")
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise InvalidInput(f"{path}: not readable ({reason_of(error)})") from error
    rows, decoder, at = [], json.JSONDecoder(strict=False), _next(text, 0)
    while at < len(text):
        start = at
        try:
            row, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:  # ValueError: also an integer of thousands of digits
            reason = getattr(error, "msg", reason_of(error))
            raise InvalidInput(f"{path}: line {_line(text, start)} is not JSON ({reason})") from error
        if not isinstance(row, dict):
            raise InvalidInput(f"{path}: line {_line(text, start)} is not a JSON object")
        rows.append(row)
        at = _next(text, at)
    return rows


def _line(text: str, at: int) -> int:
    return text.count("\n", 0, at) + 1


def _next(text: str, at: int) -> int:
    """Return the position from `at` on where the next object begins, past white space."""
    while at < len(text) and text[at].isspace():
        at += 1
    return at

"""Score a single task, so that an evaluation that was killed between two tasks goes on with the next."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import lm_eval
from lm_eval.utils import handle_non_serializable, hash_string

from dilap.core.codec import digest
from dilap.evaluation.document import TaskFacts
from dilap.evaluation.lm import Bar, ReaderLM
from dilap.evaluation.plain_text import TEXTS, WINDOW_TOKENS, window_perplexity
from dilap.evaluation.subject import Subject
from dilap.evaluation.tasks import LoadedTask


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """The scores of one task, or of a group of tasks as a whole, and what they rest on."""

    metrics: dict[str, float]
    facts: TaskFacts


def evaluate_task(subject: Subject, task: LoadedTask, *, max_tokens: int, limit: int | None, bar: Bar) -> TaskResult:
    """Return lm-eval's metrics of one task; for one that is a single text, also its perplexity in windows.

    Windows have 2,048 tokens, or `max_tokens` where that is less.
    """
    model = ReaderLM(subject.reader, subject.words, max_tokens=max_tokens, bar=bar)
    found: Any = lm_eval.evaluate(lm=model, task_dict=task.task_dict, limit=limit, log_samples=True)
    metrics = _metrics(found["results"][task.name])
    if task.name in TEXTS:
        metrics |= _text_metrics(subject, task, max_tokens=max_tokens, limit=limit, bar=bar)
    return TaskResult(metrics=metrics, facts=_facts(task, found["samples"]))


def facts_now(task: LoadedTask, *, limit: int | None) -> TaskFacts:
    """Return the facts that the task would have if it were scored now, without its answers."""
    rows = [row for part in task.tasks.values() for _, row in part.doc_iterator(limit=limit)]
    words = [json.dumps(row, indent=2, default=handle_non_serializable, ensure_ascii=False) for row in rows]
    return _described(task, hashes=[hash_string(one) for one in words], choices={})


def _metrics(result: Mapping[str, Any]) -> dict[str, float]:
    """Return a task's metrics, those like `acc,none` without the filter's name; what is no number is left out."""
    return {
        name.removesuffix(",none"): float(value)
        for name, value in result.items()
        if name.endswith(",none") and isinstance(value, int | float)
    }


def _text_metrics(
    subject: Subject, task: LoadedTask, *, max_tokens: int, limit: int | None, bar: Bar
) -> dict[str, float]:
    (documents,) = (one.eval_docs for one in task.tasks.values())
    text = TEXTS[task.name]([row["page"] for row in documents][:limit])
    with bar("windows", total=None, unit="tok") as shown:
        found = window_perplexity(
            subject.reader,
            subject.words,
            text,
            name=task.name,
            window_tokens=min(WINDOW_TOKENS, max_tokens),
            progress=shown.update,
        )
    return {
        "window_perplexity": found.perplexity,
        "window_tokens": found.window_tokens,
        "num_windows": found.num_windows,
        "top1": found.top1,
    }


def _facts(task: LoadedTask, samples: Mapping[str, list[Mapping[str, Any]]]) -> TaskFacts:
    rows = {name: sorted(samples[name], key=lambda row: int(row["doc_id"])) for name in task.tasks}
    choices = {
        name: tuple(_choice(row["filtered_resps"]) for row in part)
        for name, part in rows.items()
        if task.tasks[name].OUTPUT_TYPE == "multiple_choice"
    }
    return _described(task, hashes=[row["doc_hash"] for part in rows.values() for row in part], choices=choices)


def _described(task: LoadedTask, *, hashes: Sequence[str], choices: dict[str, tuple[int, ...]]) -> TaskFacts:
    config = next(iter(task.tasks.values()))
    return TaskFacts(
        num_fewshot=int(config.get_config("num_fewshot")),
        num_rows=len(hashes),
        data=str(getattr(config, "path", config.DATASET_PATH)),
        data_sha256=digest(list(hashes)),
        choices=choices,
    )


def _choice(responses: list[tuple[float, bool]]) -> int:
    """Return the index of the most likely answer, the first of equals, as lm-eval's `acc` does."""
    return max(range(len(responses)), key=lambda index: responses[index][0])

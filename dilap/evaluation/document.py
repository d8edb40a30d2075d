"""An evaluation as it is kept: scores with what they rest on, so that two can be compared by a machine."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dilap.core.measurement import Measurement
from dilap.core.workload import Workload

# The tasks that papers on pruning report; lm-eval has thousands more.
TASKS = ("wikitext", "ptb", "arc_easy", "arc_challenge", "openbookqa", "piqa", "hellaswag", "winogrande", "mmlu")
SEED = 1234  # lm-eval's own, of the examples drawn


@dataclass(frozen=True, kw_only=True)
class TextQuality:
    """KL to the reference in nats a token; `top1` is the share of tokens that were put first, `agreement` the share
    where both put the same one first."""

    text: str
    text_sha256: str
    tokens: int
    reference: str
    reference_digest: str
    kl: float
    perplexity: float
    top1: float
    agreement: float
    reference_perplexity: float
    reference_top1: float


@dataclass(frozen=True, kw_only=True)
class TaskFacts:
    """What a number rests on. `choices` is the answer given to every row of a multiple choice task, by part."""

    num_fewshot: int
    num_rows: int
    data: str
    data_sha256: str
    choices: dict[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class PhaseCosts:
    """One decoded token, or one prompt: operations and bytes in closed form; what a device measured, where one did."""

    workload: Workload
    flops: int
    bytes_moved: int
    measurement: Measurement | None = None
    average_memory_bytes: int | None = None
    peak_memory_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What a model takes. A checkpoint has no runtime, so that nothing of it is measured."""

    parameters: int
    file_bytes: int | None
    decode: PhaseCosts
    prefill: PhaseCosts


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Scores by task and metric, with lm-eval's names. `max_tokens` is the longest sequence that was read."""

    model: str
    backend: str
    precision: str
    digest: str
    plan_digest: str
    max_tokens: int
    limit: int | None
    num_fewshot: int | None
    threads: int
    versions: dict[str, str]
    seed: int = SEED
    tasks: dict[str, dict[str, float]] = field(default_factory=dict)
    facts: dict[str, TaskFacts] = field(default_factory=dict)
    text: TextQuality | None = None
    costs: Costs | None = None

    def __post_init__(self) -> None:
        if without := set(self.tasks) - set(self.facts):
            raise ValueError(f"the task {min(without)!r:.80} has scores and no facts")


def identity(evaluation: Evaluation) -> Mapping[str, Any]:
    """What two evaluations must share for the tasks of one to belong to the other."""
    names = ("backend", "precision", "digest", "max_tokens", "limit", "num_fewshot", "seed", "versions")
    return {name: getattr(evaluation, name) for name in names}

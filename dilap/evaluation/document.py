"""An evaluation as it is kept in a file: scores with what they rest on, so that a program can compare two."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dilap.core.measurement import Measurement
from dilap.core.workload import Workload

# The tasks that papers on pruning report; lm-eval has thousands more.
TASKS = ("wikitext", "ptb", "arc_easy", "arc_challenge", "openbookqa", "piqa", "hellaswag", "winogrande", "mmlu")
SEED = 1234  # lm-eval's own seed, for drawing examples


@dataclass(frozen=True, kw_only=True)
class TextQuality:
    """How good a model is on a text, beside a reference model.

    `kl` is to the reference, in nats a token. `top1` is the share of tokens that the model ranked first, `agreement`
    the share of positions where both models ranked the same token first.
    """

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
class ImageQuality:
    """How good a network is on images, beside the dense one where that is the reference.

    `kl` is the mean KL divergence of its class probabilities from the reference's, in nats an image, `agreement` the
    share of images in which both prefer the same class; they are None without a reference. The shares of images whose
    own class is preferred (top 1) or among the five preferred (top 5) are None where the images have no labels.
    """

    images: str
    images_sha256: str
    num_images: int
    kl: float | None = None
    agreement: float | None = None
    top1: float | None = None
    top5: float | None = None
    reference_top1: float | None = None
    reference_top5: float | None = None


@dataclass(frozen=True, kw_only=True)
class SentenceQuality:
    """How near the embeddings of an encoder of texts are to those of the dense one.

    `cosine` is the mean cosine similarity over all sentences, `low_cosine` what 95 % of them reach. `same_nearest` is
    the share of sentences whose most similar other sentence is the same one for both.
    """

    text: str
    text_sha256: str
    num_sentences: int
    cosine: float
    low_cosine: float
    same_nearest: float


@dataclass(frozen=True, kw_only=True)
class TaskFacts:
    """What the scores of a task rest on.

    `choices` has the answers given to all rows of a multiple choice task, by the name of the task's part.
    """

    num_fewshot: int
    num_rows: int
    data: str
    data_sha256: str
    choices: dict[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class PhaseCosts:
    """What one decoded token, or one prompt, costs: operations and bytes by formula, and what a device measured."""

    workload: Workload
    flops: int
    bytes_moved: int
    measurement: Measurement | None = None
    average_memory_bytes: int | None = None
    peak_memory_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What a model costs to run. A checkpoint has no runtime, so nothing of it is measured."""

    parameters: int
    file_bytes: int | None
    decode: PhaseCosts
    prefill: PhaseCosts


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The evaluation of one model: scores by task and metric (lm-eval's names), quality on text, and costs.

    `max_tokens` is the longest sequence that the model was allowed to read at once. `limit` and `num_fewshot` are what
    the latest command asked for; on how many rows and examples the scores of a task rest is in its facts.
    """

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


@dataclass(frozen=True, kw_only=True)
class ImageEvaluation:
    """The evaluation of one image network. `reference` is the network beside which it stands, empty without one."""

    model: str
    backend: str
    precision: str
    digest: str
    plan_digest: str
    threads: int
    versions: dict[str, str]
    quality: ImageQuality
    reference: str = ""
    reference_digest: str = ""


def identity(evaluation: Evaluation) -> Mapping[str, Any]:
    """Return what two evaluations must have in common for the tasks of one to be added to the other."""
    names = ("backend", "precision", "digest", "max_tokens", "seed", "versions")
    return {name: getattr(evaluation, name) for name in names}

"""SPRINT's settings: what its authors' command takes, under names of their own."""

from dataclasses import dataclass, field
from typing import Literal

from dilap.core.errors import InvalidInput
from dilap.methods.sublayer_damage import Direction, Distance, Metric, Norm
from dilap.models.compute_device import compute_device

_EVERY = "every"


@dataclass(frozen=True, kw_only=True)
class SprintSettings:
    """The published settings.

    There are 5 candidates per iteration. The importance of a sublayer is the change at the output of the next
    feed-forward network, divided by the latency saved unless `latency_aware` is false; all of that network's down
    projection is tuned. With several `metrics` (`l1_sentence,cos_token`) the ranks by each are summed; by default there
    is the one of `distance` and `norm`. The sublayer that is `tuned` is the next one of its kind or of any, or `none`:
    the change is then that of the sublayer's own output. `tune=false` scores the same change without tuning, and
    `update_tuned=false` only scores with tuned projections and leaves them out of the model. The share `ratio` of the
    projection's output rows or, by `direction`, of its input columns is tuned. `ridge` is added because the published
    normal equations have no dampening, and our fewer tokens make them singular; 0 is the original.

    By default as many sublayers go as the limit asks for; `num_remove` removes that many, whatever the limit is. The
    perplexity on held-out text is reported after the numbers of removals in `eval_steps` (`4,8` or `every`), and at the
    first predicted speed-ups of at least those in `eval_speedups` (`1.2,1.4`).

    The latencies are those of the latency `table`, measured on the `device`, or those of a torch model that reads
    prompts and generates, as the authors measure them: `batch` prompts of `prompt_tokens` and `new_tokens` more (0: the
    prompt alone), the median of `iterations`.

    `batch_sequences` are scored at once, 0 as many as have 2,048 tokens. The 8 activation checkpoints save memory and
    change no result. Layers compute where the model is, or `compute_on` another device of torch, where all lie but the
    last `host_layers`, which are moved there when they run; streams stay where the model is.
    """

    distance: Distance = "l1"
    norm: Norm = "sentence"
    metrics: str = ""
    latency_aware: bool = True
    candidates: int = 5
    tuned: Literal["ffn", "attention", "next", "none"] = "ffn"
    tune: bool = True
    update_tuned: bool = True
    ratio: float = 1.0
    direction: Direction = "out_channel"
    ridge: float = 0.01
    fit_in: Literal["f32", "f64"] = "f32"
    num_remove: int = 0
    eval_steps: str = ""
    eval_speedups: str = ""
    latency: Literal["table", "device", "generation"] = "table"
    prompt_tokens: int = 1024
    new_tokens: int = field(default=512, metadata={"least": 0})
    batch: int = 1
    iterations: int = 3
    batch_sequences: int = 0
    checkpoints: int = field(default=8, metadata={"least": 0})
    compute_on: str = ""
    host_layers: int = 0

    def __post_init__(self) -> None:
        """Raise InvalidInput for settings that say nothing, before any work."""
        _ = self.every_metric, self.numbers("eval_steps"), self.numbers("eval_speedups")
        if self.compute_on:
            compute_device(self.compute_on)

    @property
    def every_metric(self) -> tuple[Metric, ...]:
        own = Metric(distance=self.distance, norm=self.norm)
        return tuple(map(Metric.parse, self.metrics.split(","))) if self.metrics else (own,)

    def numbers(self, setting: str) -> list[float]:
        """Return the numbers in a setting that is a list, ascending. Raises InvalidInput."""
        text = getattr(self, setting)
        if text == _EVERY and setting == "eval_steps":
            return []
        try:
            return sorted(float(one) for one in text.split(",") if one.strip())
        except ValueError:
            raise InvalidInput(
                f"method sprint: {setting} are numbers with commas between them, got {text!r:.40}"
            ) from None

    @property
    def tunes(self) -> bool:
        return self.tune and self.tuned != "none"

    @property
    def evaluates_every_step(self) -> bool:
        return self.eval_steps == _EVERY

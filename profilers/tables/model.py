"""The fitted cost of every sublayer in every width and precision: what a latency table says.

The seconds of a model are a fixed part, plus the head, plus an attention cost and a feed-forward cost for every layer.
In every precision both costs are monotone, piecewise-linear curves over the sublayer's *work*: the channels of a
feed-forward network; for attention, the bytes that one decoded token streams (weights and KV cache) or the operations
of a prefill. A layer that keeps neither sublayer costs nothing.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from dilap.core.costs import Counts, PairCost, Setting, undominated
from dilap.core.errors import InvalidInput
from dilap.core.groups import Block
from dilap.core.shape import PRECISION_BITS, UNMIXED, Architecture, LayerWidths
from dilap.core.workload import Workload

Work = Callable[[LayerWidths], float]


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A monotone, piecewise-linear cost in seconds over work; beyond its last knot it goes on as its last piece."""

    work: tuple[float, ...]
    seconds: tuple[float, ...]

    def __call__(self, work: float) -> float:
        if work <= self.work[-1] or len(self.work) == 1:
            return float(np.interp(work, self.work, self.seconds))
        slope = (self.seconds[-1] - self.seconds[-2]) / (self.work[-1] - self.work[-2])
        return self.seconds[-1] + slope * (work - self.work[-1])


@dataclass(frozen=True, kw_only=True)
class PrecisionCosts:
    """What sublayers cost in one precision."""

    attention: Curve
    ffn: Curve


@dataclass(frozen=True, kw_only=True)
class Observation:
    """One measured model: its drift-corrected seconds, and the relative half-width of their interval.

    `precisions` has, by the names of blocks and of the head, those of the parts that are not in the workload's own.
    """

    role: str
    widths: tuple[LayerWidths, ...]
    precisions: Mapping[str, str] = field(default_factory=dict)
    seconds: float
    half_width: float

    def precision(self, layer: int, kind: str) -> str:
        """Return the precision of one sublayer, empty where it is the workload's own."""
        return self.precisions.get(f"layers.{layer}.{kind}", "")

    @property
    def main_precision(self) -> str:
        """The precision of most of its sublayers."""
        blocks = [
            self.precision(index, kind)
            for index, layer in enumerate(self.widths)
            for kind, width in (("attention", layer.num_heads), ("ffn", layer.num_channels))
            if width
        ]
        return Counter(blocks).most_common(1)[0][0]


@dataclass(frozen=True, kw_only=True)
class LatencyModel:
    """Predicts the seconds of a model of any widths and precisions on one device.

    `by_precision` has the costs in every measured precision, an empty name standing for the workload's own. `heads` has
    the seconds that a head in some precision takes more than the cheapest one, which is part of `fixed_seconds` like
    the embedding and the launch; an empty name stands for the head that artifacts in the workload's precision have, for
    which some runtimes take more bits. `method` is the fit with the lower
    error (`cross_validation` has the errors of both), `noise_seconds` the difference per layer that the measurements
    cannot tell from none, `head_noise_seconds` that between two heads, `holdout` the models that the fit has not seen,
    and `caveats` what a reader must know of how the probes were measured.
    """

    architecture: Architecture
    workload: Workload
    cache_bits: float  # bits of a number in the KV cache
    method: str
    fixed_seconds: float
    by_precision: Mapping[str, PrecisionCosts]
    heads: Mapping[str, float]
    cross_validation: dict[str, float]
    noise_seconds: float
    head_noise_seconds: float = 0.0
    holdout: tuple[Observation, ...]
    caveats: tuple[str, ...] = ()

    @property
    def attention(self) -> Curve:
        """What attention costs in the workload's own precision."""
        return self.by_precision[""].attention

    @property
    def ffn(self) -> Curve:
        """What the feed-forward network costs in the workload's own precision."""
        return self.by_precision[""].ffn

    def attention_seconds(self, num_heads: int, num_kv_heads: int, precision: str = "") -> float:
        """Return the seconds of one layer's attention; 0 without heads. A level that was not probed is interpolated."""
        if num_heads == 0:
            return 0.0
        level = LayerWidths(num_heads=num_heads, num_kv_heads=num_kv_heads, num_channels=0)
        curve = self._costs(precision).attention
        # below the narrowest measured level nothing is promised to be faster than it
        least = curve.work[1] if len(curve.work) > 1 else 0.0
        return curve(max(least, self._attention_work(precision)(level)))

    def ffn_seconds(self, num_channels: int, precision: str = "") -> float:
        """Return the seconds of the feed-forward network of a layer that is not empty.

        In a layer that keeps attention, 0 channels may still cost something (llama.cpp gets 32 channels of zeros).
        """
        return self._costs(precision if num_channels else "").ffn(num_channels)

    def predict(self, widths: Sequence[LayerWidths], precisions: Mapping[str, str] = UNMIXED) -> float:
        """Return the seconds of a whole model with these layers, and precisions by the names of their parts."""
        return (
            self.fixed_seconds
            + self._head(precisions.get("head", ""))
            + sum(
                self.attention_seconds(
                    layer.num_heads, layer.num_kv_heads, precisions.get(f"layers.{index}.attention", "")
                )
                + self.ffn_seconds(layer.num_channels, precisions.get(f"layers.{index}.ffn", ""))
                for index, layer in enumerate(widths)
                if not layer.is_empty
            )
        )

    @property
    def dense_seconds(self) -> float:
        """Seconds of the model that keeps all widths, in the workload's own precision."""
        return self.predict(self.architecture.layers)

    def holdout_errors(self) -> list[float]:
        """Return the absolute relative errors on the plans that took no part in the fit."""
        return [abs(self.predict(one.widths, one.precisions) / one.seconds - 1) for one in self.holdout]

    def holdout_errors_by_precision(self) -> dict[str, list[float]]:
        """Return the errors on held-out plans by the name of the precision that most of a plan's sublayers have."""
        found: dict[str, list[float]] = {}
        for one, error in zip(self.holdout, self.holdout_errors(), strict=True):
            found.setdefault(one.main_precision or self.workload.precision, []).append(error)
        return dict(sorted(found.items(), key=lambda item: -PRECISION_BITS[item[0]]))

    @property
    def constant(self) -> float:
        """Seconds that no plan changes: those of the embedding, the launch and the cheapest head."""
        return self.fixed_seconds

    @property
    def pairs(self) -> Mapping[tuple[str, str], PairCost]:
        """None: a sublayer of a decoder reads the residual stream, whose width no plan changes."""
        return {}

    def block(self, block: Block, counts: Counts, precision: str = "") -> float:
        """Return the seconds of one block with `counts` units left of its groups; the head's beyond the constant."""
        if block.kind == "head":
            return self._head(precision)
        widths = self.architecture.widths_of(block, counts)
        if block.kind == "attention":
            return self.attention_seconds(widths.num_heads, widths.num_kv_heads, precision)
        return self.ffn_seconds(widths.num_channels, precision)

    def cheaper(self, block: Block, settings: Sequence[Setting]) -> list[Setting]:
        """Return the settings that are measurably faster; see `Costs.cheaper`."""
        offered: dict[str, list[Counts]] = {}
        for counts, precision in settings:
            offered.setdefault(precision, []).append(counts)
        found: list[Setting] = []
        best, step = math.inf, 0.0  # of the full widths in better precisions
        for precision, widths in offered.items():
            kept = self._faster(block, widths, precision)
            if best - self.block(block, *kept[0]) > step:
                found += kept
                best, step = self.block(block, *kept[0]), self._step(block, kept[0])
        return undominated(found, cost=lambda setting: self.block(block, *setting))

    def _faster(self, block: Block, widths: Sequence[Counts], precision: str) -> list[Setting]:
        """Return the widths that are measurably faster than the next larger one kept, largest first."""
        ordered = sorted(widths, key=lambda counts: (-self._work(block, counts), math.prod(counts), counts))
        kept = [(ordered[0], precision)]
        step = self._step(block, kept[0])
        for counts in ordered[1:]:
            if self.block(block, *kept[-1]) - self.block(block, counts, precision) > step:
                kept.append((counts, precision))
        return kept

    def _step(self, block: Block, full: Setting) -> float:
        """Return the seconds by which a setting has to be faster than the block at its full width, to be so at all."""
        noise = self.head_noise_seconds if block.kind == "head" else self.noise_seconds
        return max(noise, 0.005 * self.block(block, *full))

    def _work(self, block: Block, counts: Counts) -> float:
        widths = self.architecture.widths_of(block, counts)
        return self._attention_work("")(widths) if block.kind == "attention" else widths.num_channels

    def _attention_work(self, precision: str) -> Work:
        return attention_work(self.architecture, self.workload, cache_bits=self.cache_bits, precision=precision)

    def _costs(self, precision: str) -> PrecisionCosts:
        """Return the costs in a precision, which may be the workload's own by its name. Raises InvalidInput."""
        own = precision == self.workload.precision
        if (found := self.by_precision.get("" if own else precision)) is None:
            raise self._unknown(precision)
        return found

    def _head(self, precision: str) -> float:
        if precision not in self.heads:
            raise self._unknown(precision)
        return self.heads[precision]

    def _unknown(self, precision: str) -> InvalidInput:
        return InvalidInput(
            f"nothing is known of the latency in {precision}; measure a table with it: dilap-profile --precision "
            f"{','.join(dict.fromkeys([self.workload.precision, precision]))}"
        )


def attention_work(architecture: Architecture, workload: Workload, *, cache_bits: float, precision: str = "") -> Work:
    """Return the function that gives the work of a layer's attention, by default in the workload's own precision.

    For a decode, the work is the bytes that one token streams: weights, and the KV cache with `cache_bits` per number.
    For a prefill, it is the operations of the whole prompt.
    """
    bits = PRECISION_BITS[precision or workload.precision]

    def streamed(layer: LayerWidths) -> float:
        weights = architecture.attention_parameters(layer) * bits / 8
        return weights + 2 * layer.num_kv_heads * architecture.head_dim * cache_bits / 8 * workload.context

    def computed(layer: LayerWidths) -> float:
        tokens = workload.prompt_tokens
        pairs = tokens * (tokens + 1) / 2
        return (
            2 * architecture.attention_parameters(layer) * tokens + 4 * layer.num_heads * architecture.head_dim * pairs
        )

    return streamed if workload.phase == "decode" else computed

"""Fit the cost of every sublayer width to measurements of whole models.

The seconds of a model are a fixed part plus an attention cost and a feed-forward cost for every layer. Both costs are
monotone, piecewise-linear curves over the sublayer's *work*: the channels of a feed-forward network; for attention, the
bytes that one decoded token streams (weights and KV cache) or the operations of a prefill. A layer that keeps neither
sublayer costs nothing.
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression, nnls

from dilap.core.costs import Counts, PairCost
from dilap.core.errors import InvalidInput
from dilap.core.groups import Block
from dilap.core.shape import PRECISION_BITS, Architecture, LayerWidths
from dilap.core.workload import Workload

Vector = NDArray[np.float64]
Work = Callable[[LayerWidths], float]
# How strongly least squares is drawn to the costs of the slopes: moving a cost by 10 % of the latency weighs as much as
# missing a model by 1 %.
_RIDGE = 0.01


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
class Observation:
    """One measured model: its drift-corrected seconds, and the relative half-width of their interval."""

    role: str
    widths: tuple[LayerWidths, ...]
    seconds: float
    half_width: float


@dataclass(frozen=True, kw_only=True)
class LatencyModel:
    """Predicts the seconds of a model of any widths on one device.

    `method` is the fit with the lower error (`cross_validation` has the errors of both), `noise_seconds` the difference
    per layer that the measurements cannot tell from none, `holdout` the models that the fit has not seen, and `caveats`
    what a reader must know of how the probes were measured.
    """

    architecture: Architecture
    workload: Workload
    cache_bits: float  # bits of a number in the KV cache
    method: str
    fixed_seconds: float
    attention: Curve
    ffn: Curve
    cross_validation: dict[str, float]
    noise_seconds: float
    holdout: tuple[Observation, ...]
    caveats: tuple[str, ...] = ()

    def attention_seconds(self, num_heads: int, num_kv_heads: int) -> float:
        """Return the seconds of one layer's attention; 0 without heads. A level that was not probed is interpolated."""
        if num_heads == 0:
            return 0.0
        level = LayerWidths(num_heads=num_heads, num_kv_heads=num_kv_heads, num_channels=0)
        # below the narrowest measured level nothing is promised to be faster than it
        least = self.attention.work[1] if len(self.attention.work) > 1 else 0.0
        work = attention_work(self.architecture, self.workload, cache_bits=self.cache_bits)
        return self.attention(max(least, work(level)))

    def ffn_seconds(self, num_channels: int) -> float:
        """Return the seconds of the feed-forward network of a layer that is not empty.

        In a layer that keeps attention, 0 channels may still cost something (llama.cpp gets 32 channels of zeros).
        """
        return self.ffn(num_channels)

    def predict(self, widths: Sequence[LayerWidths]) -> float:
        """Return the seconds of a whole model with these layers."""
        return self.fixed_seconds + sum(
            self.attention_seconds(layer.num_heads, layer.num_kv_heads) + self.ffn_seconds(layer.num_channels)
            for layer in widths
            if not layer.is_empty
        )

    def holdout_errors(self) -> list[float]:
        """Return the absolute relative errors on the plans that took no part in the fit."""
        return [abs(self.predict(one.widths) / one.seconds - 1) for one in self.holdout]

    @property
    def constant(self) -> float:
        """Seconds that no plan removes, such as those of the embedding and the head."""
        return self.fixed_seconds

    @property
    def pairs(self) -> Mapping[tuple[str, str], PairCost]:
        """None: a sublayer of a decoder reads the residual stream, whose width no plan changes."""
        return {}

    def block(self, block: Block, counts: Counts) -> float:
        """Return the seconds of one block with `counts` units left of its groups."""
        widths = self.architecture.widths_of(block, counts)
        attention = self.attention_seconds(widths.num_heads, widths.num_kv_heads)
        return {"attention": attention, "ffn": self.ffn_seconds(widths.num_channels)}[block.kind]

    def cheaper(self, block: Block, levels: Sequence[Counts]) -> list[Counts]:
        """Return the levels that are measurably faster than the next larger one kept, largest first."""
        ordered = sorted(levels, key=lambda level: (-self._work(block, level), math.prod(level), level))
        seconds = [self.block(block, level) for level in ordered]
        kept: list[int] = []
        for index, cost in enumerate(seconds):
            step = max(self.noise_seconds, 0.005 * seconds[0])
            if not kept or seconds[kept[-1]] - cost > step:
                kept.append(index)
        return [ordered[index] for index in kept]

    def _work(self, block: Block, counts: Counts) -> float:
        widths = self.architecture.widths_of(block, counts)
        work = attention_work(self.architecture, self.workload, cache_bits=self.cache_bits)
        return {"attention": work(widths), "ffn": widths.num_channels}[block.kind]


def attention_work(architecture: Architecture, workload: Workload, *, cache_bits: float) -> Work:
    """Return the function that gives the work of a layer's attention.

    For a decode, the work is the bytes that one token streams: weights, and the KV cache with `cache_bits` per number.
    For a prefill, it is the operations of the whole prompt.
    """

    def streamed(layer: LayerWidths) -> float:
        weights = architecture.attention_parameters(layer) * PRECISION_BITS[workload.precision] / 8
        return weights + 2 * layer.num_kv_heads * architecture.head_dim * cache_bits / 8 * workload.context

    def computed(layer: LayerWidths) -> float:
        tokens = workload.prompt_tokens
        pairs = tokens * (tokens + 1) / 2
        return (
            2 * architecture.attention_parameters(layer) * tokens + 4 * layer.num_heads * architecture.head_dim * pairs
        )

    return streamed if workload.phase == "decode" else computed


def fit(
    observations: Sequence[Observation], *, architecture: Architecture, workload: Workload, cache_bits: float
) -> LatencyModel:
    """Fit a model by slopes or by least squares, whichever has the lower error on the `random` observations.

    The error of least squares is cross-validated; the slopes need no `random` observations. Raises InvalidInput without
    the dense or the depth probe.
    """
    used = [one for one in observations if one.role != "holdout"]
    work = attention_work(architecture, workload, cache_bits=cache_bits)
    _require_anchors(used)
    grid = _Grid.of(used, work)
    slopes = _slopes(used, grid, work)
    random = [one for one in used if one.role == "random"]
    errors = {"slopes": _mean_error(grid, slopes, random)}
    if random:
        left_out = []
        for fold in range(min(5, len(random))):
            tested = random[fold::5]
            trained = [one for one in used if one not in tested]
            left_out.extend([_mean_error(grid, _least_squares(grid, trained, slopes), tested)] * len(tested))
        errors["least squares"] = statistics.fmean(left_out)
    method = min(errors, key=lambda name: errors[name])
    costs = slopes if method == "slopes" else _least_squares(grid, used, slopes)
    dense = next(one for one in used if one.role == "dense")
    noise = statistics.median(one.half_width * one.seconds for one in used)
    attention, ffn = grid.curves(costs)
    return LatencyModel(
        architecture=architecture,
        workload=workload,
        cache_bits=cache_bits,
        method=method,
        fixed_seconds=float(costs[0]),
        attention=attention,
        ffn=ffn,
        cross_validation=errors,
        noise_seconds=2**0.5 * noise / len(dense.widths),  # a difference of two, spread over the layers
        holdout=tuple(one for one in observations if one.role == "holdout"),
    )


def _require_anchors(observations: Sequence[Observation]) -> None:
    """Raise InvalidInput where the dense or the depth probe is missing, from which all costs are computed."""
    if not {"dense", "depth"} <= {one.role for one in observations}:
        raise InvalidInput(
            "the latency table has no dense or no depth probe yet that was measured without other load on the cores; "
            "stop other programs and resume its measurement with dilap-profile"
        )


@dataclass(frozen=True)
class _Grid:
    """The knots of both curves, and the vector of costs that belongs to them.

    The vector is (fixed part, rises of the attention curve, first ffn cost, rises of the ffn curve), a rise being the
    difference between two neighbouring knots. The seconds of a model are linear in it.
    """

    attention: tuple[float, ...]  # starts with 0, which costs nothing
    ffn: tuple[float, ...]
    work: Work

    @classmethod
    def of(cls, observations: Sequence[Observation], work: Work) -> "_Grid":
        """Return the grid with a knot for every width of the dense, attention and ffn probes."""
        probes = [one for one in observations if one.role in ("dense", "attention", "ffn")]
        layers = [layer for one in probes for layer in one.widths if not layer.is_empty]
        attention = {0.0} | {work(layer) for layer in layers}
        return cls(tuple(sorted(attention)), tuple(sorted({float(layer.num_channels) for layer in layers})), work)

    def features(self, widths: Sequence[LayerWidths]) -> Vector:
        """Return the vector whose product with the vector of costs is the seconds of a model."""
        total = np.zeros(1 + len(self.attention) - 1 + len(self.ffn))
        total[0] = 1
        for layer in widths:
            if not layer.is_empty:
                attention = max(self.work(layer), self.attention[1]) if layer.num_heads else 0.0
                total[1:] += np.concatenate(
                    [_rises(self.attention, attention), [1.0], _rises(self.ffn, layer.num_channels)]
                )
        return total

    def curves(self, costs: Vector) -> tuple[Curve, Curve]:
        """Return the curves of attention and ffn that a vector of costs stands for."""
        split = len(self.attention)
        attention = np.concatenate([[0.0], np.cumsum(costs[1:split])])
        ffn = np.cumsum(costs[split:])
        return (
            Curve(work=self.attention, seconds=tuple(map(float, attention))),
            Curve(work=self.ffn, seconds=tuple(map(float, ffn))),
        )


def _rises(knots: Sequence[float], work: float) -> Vector:
    """Return how much of the way between each two neighbouring knots lies below `work`: 0 to 1."""
    low, high = np.array(knots[:-1]), np.array(knots[1:])
    return np.asarray(np.clip((work - low) / (high - low), 0, 1), dtype=np.float64)


def _slopes(observations: Sequence[Observation], grid: _Grid, work: Work) -> Vector:
    """Return the vector of costs computed from the probes alone: what a probe saves, divided by its changed layers.

    The dense and the depth probe give the cost of a whole layer. Attention's part of it is what the narrowest probed
    level saves, extended in proportion to no work at all; the rest is the feed-forward network's.
    """
    dense, shallow = (next(one for one in observations if one.role == role) for role in ("dense", "depth"))
    per_layer = (dense.seconds - shallow.seconds) / (len(dense.widths) - len(shallow.widths))
    per_layer = min(max(per_layer, 0.0), dense.seconds / len(dense.widths))
    saved_attention, saved_ffn = _savings(observations, dense, work)
    full, narrowest = max(saved_attention), min(saved_attention)
    share = full / (full - narrowest) if full > narrowest else 0.0
    attention = min(max(saved_attention[narrowest] * share, 0.0), per_layer)
    fixed = dense.seconds - per_layer * len(dense.widths)
    return np.concatenate(
        [
            [fixed],
            np.diff(_monotone(grid.attention, saved_attention, attention), prepend=0.0)[1:],
            np.diff(_monotone(grid.ffn, saved_ffn, per_layer - attention), prepend=0.0),
        ]
    )


def _savings(
    observations: Sequence[Observation], dense: Observation, work: Work
) -> tuple[dict[float, float], dict[float, float]]:
    """Return the seconds that a layer saves at each attention work and number of channels; dense ones save none."""
    layer = dense.widths[-1]
    attention, ffn = {work(layer): 0.0}, {float(layer.num_channels): 0.0}
    for one in observations:
        if one.role in ("attention", "ffn"):
            # the first layer may have to keep its attention, so the last one shows the level
            changed = sum(a != b for a, b in zip(one.widths, dense.widths, strict=True))
            level, store = (
                (work(one.widths[-1]), attention)
                if one.role == "attention"
                else (float(one.widths[-1].num_channels), ffn)
            )
            store[level] = (dense.seconds - one.seconds) / changed
    return attention, ffn


def _monotone(knots: Sequence[float], saved: dict[float, float], full: float) -> Vector:
    """Return costs at the knots that never fall with work: `full` minus what is saved, made monotone.

    A knot that was not probed, which is one at 0 work, costs nothing.
    """
    costs = [full - saved[knot] if knot in saved else 0.0 for knot in knots]
    return np.asarray(np.maximum(isotonic_regression(costs).x, 0.0), dtype=np.float64)


def _least_squares(grid: _Grid, observations: Sequence[Observation], prior: Vector) -> Vector:
    """Return the non-negative costs with the least squares of relative errors, drawn a little towards `prior`."""
    seconds = np.array([one.seconds for one in observations])
    rows = np.stack([grid.features(one.widths) for one in observations]) / seconds[:, None]
    dense = next(one for one in observations if one.role == "dense")
    pull = _RIDGE**0.5 * np.diag(grid.features(dense.widths) / dense.seconds)
    solution, _ = nnls(np.concatenate([rows, pull]), np.concatenate([np.ones(len(rows)), pull @ prior]))
    return np.asarray(solution, dtype=np.float64)


def _mean_error(grid: _Grid, costs: Vector, observations: Sequence[Observation]) -> float:
    if not observations:
        return 0.0
    return statistics.fmean(abs(float(grid.features(one.widths) @ costs) / one.seconds - 1) for one in observations)

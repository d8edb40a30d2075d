"""Fit the costs of all widths and precisions to measurements of whole models."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression, nnls

from dilap.core.errors import InvalidInput
from dilap.core.shape import Architecture
from dilap.core.workload import Workload
from dilap.profilers.tables.model import Curve, LatencyModel, Observation, PrecisionCosts, Work, attention_work

Vector = NDArray[np.float64]
# How strongly least squares is drawn to the costs of the slopes: moving a cost by 10 % of the latency weighs as much as
# missing a model by 1 %.
_RIDGE = 0.01


def fit(
    observations: Sequence[Observation],
    *,
    architecture: Architecture,
    workload: Workload,
    cache_bits: float,
    precisions: Sequence[str] = (),
) -> LatencyModel:
    """Fit a model by slopes or by least squares, whichever has the lower error on the `random` observations.

    The error of least squares is cross-validated; the slopes need no `random` observations. `precisions` are those that
    were measured beside the workload's own. Raises InvalidInput without the dense or the depth probe, or without those
    of the whole model or the head in one of the precisions.
    """
    used = [one for one in observations if one.role != "holdout"]
    _require_anchors(used, precisions, [workload.precision, *precisions] if precisions else [])
    works = {
        precision: attention_work(architecture, workload, cache_bits=cache_bits, precision=precision)
        for precision in ("", *precisions)
    }
    grid = _Grid.of(used, works)
    slopes = _slopes(used, grid)
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
    noise = 2**0.5 * statistics.median(one.half_width * one.seconds for one in used)  # of a difference of two
    return LatencyModel(
        architecture=architecture,
        workload=workload,
        cache_bits=cache_bits,
        method=method,
        fixed_seconds=float(costs[0]),
        by_precision=grid.costs_by_precision(costs),
        heads=grid.head_seconds(costs),
        cross_validation=errors,
        noise_seconds=noise / len(_dense(used).widths),  # spread over the layers
        head_noise_seconds=noise,
        holdout=tuple(one for one in observations if one.role == "holdout"),
    )


def _require_anchors(observations: Sequence[Observation], precisions: Sequence[str], heads: Sequence[str]) -> None:
    """Raise InvalidInput where a probe is missing from which costs are computed."""
    found = {(one.role, "") for one in observations if not one.precisions}
    found |= {("precision", one.precision(0, "ffn")) for one in observations if one.role == "precision"}
    found |= {("head", one.precisions["head"]) for one in observations if one.role == "head"}
    wanted = [("dense", ""), ("depth", ""), *(("precision", name) for name in precisions)]
    wanted += [("head", name) for name in heads]
    for role, precision in wanted:
        if (role, precision) not in found:
            kind = f"{role} probe in {precision}" if precision else f"{role} probe"
            raise InvalidInput(
                f"the latency table has no {kind} yet that was measured without other load on the cores; "
                "stop other programs and resume its measurement with dilap-profile"
            )


def _dense(observations: Sequence[Observation]) -> Observation:
    return next(one for one in observations if one.role == "dense")


@dataclass(frozen=True)
class _Knots:
    """The knots of both curves of one precision.

    Their costs are a vector: (rises of the attention curve, first ffn cost, rises of the ffn curve), a rise being the
    difference between two neighbouring knots.
    """

    attention: tuple[float, ...]  # starts with 0, which costs nothing
    ffn: tuple[float, ...]
    work: Work

    @classmethod
    def of(cls, observations: Sequence[Observation], precision: str, work: Work) -> "_Knots":
        """Return knots for every width that is probed in that precision."""
        probes = [one for one in observations if one.role in ("dense", "attention", "ffn", "precision")]
        layers = [(one, index, layer) for one in probes for index, layer in enumerate(one.widths) if not layer.is_empty]
        attention = {work(layer) for one, index, layer in layers if one.precision(index, "attention") == precision}
        ffn = {float(layer.num_channels) for one, index, layer in layers if one.precision(index, "ffn") == precision}
        return cls(tuple(sorted({0.0} | attention)), tuple(sorted(ffn)), work)

    @property
    def first_ffn(self) -> int:
        """The index of the first ffn cost."""
        return len(self.attention) - 1

    @property
    def size(self) -> int:
        return self.first_ffn + len(self.ffn)

    def curves(self, costs: Vector) -> PrecisionCosts:
        """Return the curves that a vector of costs stands for."""
        attention = np.concatenate([[0.0], np.cumsum(costs[: self.first_ffn])])
        ffn = np.cumsum(costs[self.first_ffn :])
        return PrecisionCosts(
            attention=Curve(work=self.attention, seconds=tuple(map(float, attention))),
            ffn=Curve(work=self.ffn, seconds=tuple(map(float, ffn))),
        )


@dataclass(frozen=True)
class _Grid:
    """All knots, and the vector of costs that belongs to them.

    The vector is (fixed part, heads, costs of the knots of one precision after the other). The fixed part includes the
    head in the precision `cheapest`, and `heads` are the precisions of all others. The seconds of a model are linear in
    the vector.
    """

    cheapest: str
    heads: tuple[str, ...]
    knots: Mapping[str, _Knots]

    @classmethod
    def of(cls, observations: Sequence[Observation], works: Mapping[str, Work]) -> "_Grid":
        """Return the grid with knots for every width of the dense, attention, ffn and precision probes."""
        seconds = _head_seconds(observations)
        cheapest = min(seconds, key=lambda precision: seconds[precision])
        knots = {precision: _Knots.of(observations, precision, work) for precision, work in works.items()}
        return cls(cheapest, tuple(precision for precision in seconds if precision != cheapest), knots)

    @property
    def starts(self) -> dict[str, int]:
        """The index of the first cost of every precision's knots."""
        found, start = {}, 1 + len(self.heads)
        for precision, knots in self.knots.items():
            found[precision] = start
            start += knots.size
        return found

    def features(self, one: Observation) -> Vector:
        """Return the vector whose product with the vector of costs is the seconds of a model."""
        starts = self.starts
        total = np.zeros(1 + len(self.heads) + sum(knots.size for knots in self.knots.values()))
        total[0] = 1
        if (head := one.precisions.get("head", "")) in self.heads:
            total[1 + self.heads.index(head)] = 1
        for index, layer in enumerate(one.widths):
            if layer.num_heads:
                precision = one.precision(index, "attention")
                knots, start = self.knots[precision], starts[precision]
                work = max(knots.work(layer), knots.attention[1])
                total[start : start + knots.first_ffn] += _rises(knots.attention, work)
            if not layer.is_empty:
                precision = one.precision(index, "ffn")
                knots, start = self.knots[precision], starts[precision]
                ffn = np.concatenate([[1.0], _rises(knots.ffn, layer.num_channels)])
                total[start + knots.first_ffn : start + knots.size] += ffn
        return total

    def costs_by_precision(self, costs: Vector) -> dict[str, PrecisionCosts]:
        """Return the curves that a vector of costs stands for."""
        starts = self.starts
        return {
            precision: knots.curves(costs[starts[precision] : starts[precision] + knots.size])
            for precision, knots in self.knots.items()
        }

    def head_seconds(self, costs: Vector) -> dict[str, float]:
        """Return what heads cost more than the cheapest one by a vector of costs."""
        others = costs[1 : 1 + len(self.heads)]
        return {self.cheapest: 0.0} | dict(zip(self.heads, map(float, others), strict=True))


def _head_seconds(observations: Sequence[Observation]) -> dict[str, float]:
    """Return the seconds of the dense model by the precision of its head, an empty one where nothing is said of it."""
    own = {"": _dense(observations).seconds}
    return own | {one.precisions["head"]: one.seconds for one in observations if one.role == "head"}


def _rises(knots: Sequence[float], work: float) -> Vector:
    """Return how much of the way between each two neighbouring knots lies below `work`: 0 to 1."""
    low, high = np.array(knots[:-1]), np.array(knots[1:])
    return np.asarray(np.clip((work - low) / (high - low), 0, 1), dtype=np.float64)


def _slopes(observations: Sequence[Observation], grid: _Grid) -> Vector:
    """Return the vector of costs computed from the probes alone: what a probe saves, divided by its changed layers.

    The dense and the depth probe give the cost of a whole layer. Attention's part of it is what the narrowest probed
    level saves, extended in proportion to no work at all; the rest is the feed-forward network's. What the whole model
    saves in another precision is divided in the same proportion.
    """
    dense, shallow = (next(one for one in observations if one.role == role) for role in ("dense", "depth"))
    per_layer = (dense.seconds - shallow.seconds) / (len(dense.widths) - len(shallow.widths))
    per_layer = min(max(per_layer, 0.0), dense.seconds / len(dense.widths))
    saved_attention, saved_ffn = _savings(observations, dense, "", grid.knots[""].work)
    full, narrowest = max(saved_attention), min(saved_attention)
    share = full / (full - narrowest) if full > narrowest else 0.0
    attention = min(max(saved_attention[narrowest] * share, 0.0), per_layer)
    heads = _head_seconds(observations)
    cheapest = min(heads.values())
    fixed = max(0.0, cheapest - per_layer * len(dense.widths))
    costs = [np.array([fixed]), np.array([heads[precision] - cheapest for precision in grid.heads])]
    for precision, knots in grid.knots.items():
        if precision:
            saved_attention, saved_ffn = _savings(observations, dense, precision, knots.work)
            saved = _saved_by_all(observations, dense, precision)
            saved_attention.setdefault(knots.attention[-1], saved * attention / per_layer if per_layer else 0.0)
            saved_ffn.setdefault(knots.ffn[-1], saved - saved_attention[knots.attention[-1]])
        costs.append(np.diff(_monotone(knots.attention, saved_attention, attention), prepend=0.0)[1:])
        costs.append(np.diff(_monotone(knots.ffn, saved_ffn, per_layer - attention), prepend=0.0))
    return np.concatenate(costs)


def _savings(
    observations: Sequence[Observation], dense: Observation, precision: str, work: Work
) -> tuple[dict[float, float], dict[float, float]]:
    """Return the seconds that a layer saves in a precision at each attention work and number of channels.

    Dense layers in the workload's own precision save none.
    """
    attention: dict[float, float] = {}
    ffn: dict[float, float] = {}
    if not precision:
        layer = dense.widths[-1]
        attention[work(layer)] = ffn[float(layer.num_channels)] = 0.0
    for one in observations:
        if one.role in ("attention", "ffn") and one.precision(len(one.widths) - 1, one.role) == precision:
            # the first layer may have to keep its attention, so the last one shows the level
            level = work(one.widths[-1]) if one.role == "attention" else float(one.widths[-1].num_channels)
            store = attention if one.role == "attention" else ffn
            store[level] = (dense.seconds - one.seconds) / _num_changed(one, dense)
    return attention, ffn


def _num_changed(one: Observation, dense: Observation) -> int:
    """Return how many layers of a probe differ from the dense one in width or precision."""
    return sum(
        theirs != mine or bool(one.precision(index, one.role))
        for index, (mine, theirs) in enumerate(zip(one.widths, dense.widths, strict=True))
    )


def _saved_by_all(observations: Sequence[Observation], dense: Observation, precision: str) -> float:
    """Return the seconds that a layer saves in a precision at its full width."""
    whole = next(one for one in observations if one.role == "precision" and one.precision(0, "ffn") == precision)
    return (dense.seconds - whole.seconds) / len(dense.widths)


def _monotone(knots: Sequence[float], saved: Mapping[float, float], full: float) -> Vector:
    """Return costs at the knots that never fall with work: `full` minus what is saved, made monotone.

    A knot that was not probed, which is one at 0 work, costs nothing.
    """
    costs = [full - saved[knot] if knot in saved else 0.0 for knot in knots]
    return np.asarray(np.maximum(isotonic_regression(costs).x, 0.0), dtype=np.float64)


def _least_squares(grid: _Grid, observations: Sequence[Observation], prior: Vector) -> Vector:
    """Return the non-negative costs with the least squares of relative errors, drawn a little towards `prior`."""
    seconds = np.array([one.seconds for one in observations])
    features = np.stack([grid.features(one) for one in observations])
    pull = _RIDGE**0.5 * np.diag(features.max(axis=0) / _dense(observations).seconds)
    rows = features / seconds[:, None]
    solution, _ = nnls(np.concatenate([rows, pull]), np.concatenate([np.ones(len(rows)), pull @ prior]))
    return np.asarray(solution, dtype=np.float64)


def _mean_error(grid: _Grid, costs: Vector, observations: Sequence[Observation]) -> float:
    if not observations:
        return 0.0
    return statistics.fmean(abs(float(grid.features(one) @ costs) / one.seconds - 1) for one in observations)

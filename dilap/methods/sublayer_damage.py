"""What removing a sublayer does to the residual stream, and the projection that makes up for it, as SPRINT has them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from dilap.core.errors import InvalidInput
from dilap.models.compute_device import HOST
from dilap.models.statistics import State

Distance = Literal["l1", "l2", "cos"]
Norm = Literal["sentence", "token", "channel", "element", "none"]
Direction = Literal["out_channel", "in_channel"]
_DIMS: dict[Norm, tuple[int, ...]] = {"sentence": (1, 2), "token": (2,), "channel": (1,), "element": (), "none": ()}


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A distance of two streams, summed over the vectors that `norm` says."""

    distance: Distance
    norm: Norm

    @classmethod
    def parse(cls, text: str) -> "Metric":
        """Parse the name of a metric as the authors write it, `cos_token` for one. Raises InvalidInput."""
        kind, _, norm = text.strip().partition("_")
        for distance in get_args(Distance):
            for known in get_args(Norm):
                if (kind, norm.lower() or "none") == (distance, known):
                    return cls(distance=distance, norm=known)
        raise InvalidInput(
            f"metric {text!r:.40} is none of {', '.join(get_args(Distance))} with _ and {', '.join(get_args(Norm))}"
        )


def distance(wanted: State, found: State, *, kind: Distance, norm: Norm) -> float:
    """Return the distance of two streams (sequences x tokens x hidden), summed over the vectors that `norm` says.

    What the authors call "l2" is called l1 here.
    """
    y, x = wanted.float(), found.float()
    if kind == "cos":
        dims = _DIMS[norm] or (2,)
        cosine = (y * x).sum(dims) / (y.square().sum(dims).sqrt() * x.square().sum(dims).sqrt()).clamp_min(1e-30)
        return float((1 - cosine).double().sum())
    power = 1 if kind == "l1" else 2
    difference, size = (y - x).abs() ** power, y.abs() ** power
    if dims := _DIMS[norm]:
        difference, size = difference.sum(dims), size.sum(dims)
    if norm == "none":
        return float(difference.double().sum() ** (1 / power))
    return float((difference / size.clamp_min(1e-30)).double().pow(1 / power).sum())


def ranked(damages: Mapping[int, Sequence[float]]) -> list[int]:
    """Return sublayers from the least damage to the most, given the damage of each by every metric.

    With several metrics the ranks by each are summed; of equals the earlier sublayer comes first.
    """
    total = dict.fromkeys(damages, 0)
    for metric in zip(*damages.values(), strict=True):
        values = dict(zip(damages, metric, strict=True))
        for rank, sublayer in enumerate(sorted(damages, key=lambda s, values=values: (values[s], s))):  # type: ignore[misc]
            total[sublayer] += rank
    return sorted(damages, key=lambda s: (total[s], s))


def tuned_projection(
    weight: torch.Tensor,
    inputs: torch.Tensor,
    wanted: torch.Tensor,
    *,
    ridge: float,
    ratio: float = 1.0,
    direction: Direction = "out_channel",
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Return the projection W (outputs x inputs) with the least |A W' - B|^2, kept near to `weight` by a penalty.

    A are the `inputs` (tokens x inputs), B is the output `wanted` (tokens x outputs). The penalty on the squared
    difference from `weight` is `ridge` times the mean diagonal of A'A; without ridge it is the least-squares solution
    of least norm. Only the share `ratio` of the output rows is tuned, those with the largest sums of weight times
    activation norm, or, in the direction `in_channel`, of the input columns. What the other columns give is then
    subtracted from B, which the authors leave out. Their dampening is another one: its scale is that of the squared
    normal equations.
    """
    old, a, b = weight.detach().to(dtype), inputs.to(dtype), wanted.to(dtype)
    sizes = (old.abs() * a.square().sum(0).sqrt()).sum(1 if direction == "out_channel" else 0)
    chosen = sizes.argsort(descending=True, stable=True)[: int(ratio * len(sizes))]
    result = old.clone()
    if direction == "in_channel":
        others = torch.ones(len(sizes), dtype=torch.bool).index_fill_(0, chosen, False)
        result[:, chosen] = _least_squares(old[:, chosen], a[:, chosen], b - a[:, others] @ old[:, others].T, ridge)
    else:
        result[chosen] = _least_squares(old[chosen], a, b[:, chosen], ridge)
    return (result if torch.isfinite(result).all() else old).float()


def _least_squares(old: torch.Tensor, a: torch.Tensor, b: torch.Tensor, ridge: float) -> torch.Tensor:
    gram, right = a.T @ a, a.T @ b
    if ridge:
        damping = ridge * gram.diagonal().mean()
        factor = torch.linalg.cholesky(gram + damping * torch.eye(len(gram), dtype=gram.dtype, device=gram.device))
        return torch.cholesky_solve(right + damping * old.T, factor).T
    wide = gram.to(HOST, torch.float64), right.to(HOST, torch.float64)  # accelerators have no such driver
    solution: torch.Tensor = torch.linalg.lstsq(*wide, driver="gelsd").solution
    return solution.to(old.device, old.dtype).T

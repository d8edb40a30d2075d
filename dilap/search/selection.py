"""Exact selection of levels where pairs of choices have costs of their own, by mixed-integer programming.

A choice s has a variable x for every level, which is 1 where it is chosen and 0 elsewhere. For every pair of choices
with costs, variables y stand for the products of their x: the y of a level of one choice sum to its x, over the levels
of the other. So costs are linear in x and y, and HiGHS finds the best choice within a limit.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, milp

from dilap.core.space import Space

_SPARE = 1e-7  # of the limit, for the tolerance of HiGHS


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The levels found, None for none; `gap` is how far at most their loss is from the least, as a share of it."""

    config: tuple[int, ...] | None
    gap: float


def select(
    losses: Sequence[NDArray[np.float64]], space: Space[Any], *, limit: float, seconds: float, gap: float = 1e-4
) -> Selection:
    """Return the levels with the least sum of `losses` within `limit`, as far as `seconds` suffice to find them.

    It ends earlier where the loss is known to be no more than a share `gap` above the least.
    """
    sizes = [len(choice.levels) for choice in space.choices]
    starts = np.cumsum([0, *sizes])
    products = np.cumsum([starts[-1], *(sizes[one.first] * sizes[one.second] for one in space.couplings)])
    objective = np.zeros(products[-1])
    objective[: starts[-1]] = np.concatenate(list(losses))
    costs = np.zeros(products[-1])
    costs[: starts[-1]] = [level.cost for choice in space.choices for level in choice.levels]
    rows = [_ones(range(starts[s], starts[s + 1]), products[-1]) for s in range(len(sizes))]
    totals = [1.0] * len(rows)
    for one, start in zip(space.couplings, products, strict=False):
        numbers = start + np.arange(sizes[one.first] * sizes[one.second]).reshape(sizes[one.first], sizes[one.second])
        costs[numbers] = one.costs
        for choice, own in ((one.first, numbers), (one.second, numbers.T)):
            for level, of_level in enumerate(own):
                row = _ones(of_level, products[-1])
                row[0, starts[choice] + level] = -1
                rows.append(row)
        totals += [0.0] * sum(numbers.shape)
    spent = limit - space.fixed_cost
    if spent <= 0:
        return Selection(config=None, gap=np.inf)
    scale = max(float(np.abs(objective).max()), 1e-30)  # HiGHS knows absolute tolerances only
    whole = np.arange(products[-1]) < starts[-1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = milp(
            objective / scale,
            integrality=whole.astype(int),
            bounds=Bounds(0, 1),
            constraints=[
                LinearConstraint(sparse.vstack(rows, format="csr"), totals, totals),
                LinearConstraint(costs[None] / spent, -np.inf, 1 - _SPARE),
            ],
            options={"time_limit": seconds, "mip_rel_gap": gap},
        )
    if found.x is None:
        return Selection(config=None, gap=np.inf)
    chosen = (found.x[starts[s] : starts[s + 1]].argmax() for s in range(len(sizes)))
    return Selection(config=tuple(map(int, chosen)), gap=float(found.mip_gap or 0.0))


def _ones(columns: Any, width: int) -> Any:
    """Return a row of a sparse matrix with ones in some columns."""
    row = sparse.lil_array((1, width))
    row[0, np.asarray(columns)] = 1
    return row

"""Which chunks of units stay, in groups of which each keeps its most important ones: the most value within a budget.

keep_augmented([values, ...], [costs, ...], budget=2.0)  # numbers of chunks that stay, [3, 1, ...]

Of every group there are the values and costs of its chunks, the most important one first.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dilap.search.allocation import solve

Numbers = NDArray[np.float64]
_BUCKETS = 10_000  # of the budget; HALP's are microseconds, and networks take about 10 ms


def keep_augmented(values: Sequence[Numbers], costs: Sequence[Numbers], *, budget: float) -> list[int]:
    """Return how many chunks every group keeps by HALP's augmented knapsack.

    It is a dynamic program over all chunks, in which a chunk may stay only where the choice that it is added to has the
    chunk before it. That choice is the best one without this chunk, so that what is found is not always the best.
    """
    if sum(one.sum() for one in costs) <= budget:
        return [len(one) for one in values]
    bucket = max(budget, 1e-30) / _BUCKETS
    best = np.zeros(_BUCKETS + 1)  # the most value within so many buckets
    tables = []
    for own_values, own_costs in zip(values, costs, strict=True):
        stays = np.ones(_BUCKETS + 1, bool)  # whether the best choice has the chunk before
        # Rounded up, once a group and not once a chunk.
        up_to = np.ceil(np.minimum(own_costs.cumsum() / bucket, _BUCKETS + 1) - 1e-9)
        for value, need in zip(own_values, np.diff(up_to, prepend=0).astype(int).tolist(), strict=True):
            added = np.full(_BUCKETS + 1, -np.inf)
            if need <= _BUCKETS:
                added[need:] = np.where(stays, best + value, -np.inf)[: _BUCKETS + 1 - need]
            stays = added > best
            best = np.where(stays, added, best)
            tables.append((stays, need))
    return _numbers(tables, [len(one) for one in values])


def _numbers(tables: list[tuple[NDArray[np.bool_], int]], sizes: Sequence[int]) -> list[int]:
    """Return how many chunks stay in every group; `tables` say of each whether it stays, and the buckets it takes."""
    left, found = _BUCKETS, []
    for size in reversed(sizes):
        number = 0
        for _ in range(size):
            stays, need = tables.pop()
            if stays[left]:
                number, left = number + 1, left - need
        found.append(number)
    return found[::-1]


def keep_exactly(values: Sequence[Numbers], costs: Sequence[Numbers], *, budget: float) -> list[int]:
    """Return how many chunks every group keeps so that their value is the most that there is."""
    lost = [np.append(0.0, one[::-1].cumsum()) for one in values]  # with one chunk less at every level
    seconds = [np.append(0.0, one.cumsum())[::-1].tolist() for one in costs]
    levels = solve(lost, seconds, limit=budget)
    return [len(one) - level for one, level in zip(values, levels, strict=True)]

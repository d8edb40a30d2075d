"""Choose levels exactly by the output errors of single sublayers, which ZipLM and SPDY start from, without a search."""

import numpy as np

from dilap.search.allocation import solve
from dilap.search.levels import prune_by_levels
from dilap.search.method import Pruned, PruneTask
from dilap.search.task import SearchResult, SearchTask


def prune(task: PruneTask) -> Pruned:
    """Prune by this choice of measured levels, followed by a closed-form refit."""
    return prune_by_levels(task, search)


def search(task: SearchTask) -> SearchResult:
    """Return the config within the limit with the least sum of output errors. Raises Infeasible.

    The error of a level is relative to that of removing its sublayer.
    """
    costs = [np.array([fit.error for fit in levels]) for levels in task.evaluator.net.library]
    config = solve(costs, task.space.level_costs(), limit=task.limit - task.space.fixed_cost)
    return SearchResult(config=config, kl=task.evaluator.kl(config))

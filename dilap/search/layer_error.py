"""Choose levels exactly by the output errors of single sublayers, which ZipLM and SPDY start from, without a search."""

import numpy as np

from dilap.core.errors import Unsupported
from dilap.core.space import Space
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
    require_one_precision(task.space)
    costs = [np.array([fit.error for fit in levels]) for levels in task.evaluator.net.library]
    config = solve(costs, task.space.level_costs(), limit=task.limit - task.space.fixed_cost)
    return SearchResult(config=config, kl=task.evaluator.kl(config))


def require_one_precision(space: Space) -> None:
    """Raise Unsupported where precisions are chosen, whose errors level libraries do not have."""
    if any(len({level.precision for level in one.levels if not level.is_removed}) > 1 for one in space.choices):
        raise Unsupported("this method compares widths and not precisions: use the method dilap, or one precision")

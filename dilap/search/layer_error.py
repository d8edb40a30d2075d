"""Exact dynamic programming on layer reconstruction error (the prior of ZipLM and SPDY, without their search)."""

import numpy as np

from dilap.search.allocation import solve
from dilap.search.levels import prune_by_levels
from dilap.search.method import Pruned, PruneTask
from dilap.search.task import SearchResult, SearchTask


def prune(task: PruneTask) -> Pruned:
    """This allocation of measured levels, then a closed-form refit."""
    return prune_by_levels(task, search)


def search(task: SearchTask) -> SearchResult:
    """The config with the least sum of output errors, each relative to removing its sublayer, within the limit."""
    costs = [np.array([fit.error for fit in levels]) for levels in task.evaluator.net.library]
    seconds = [[level.cost for level in choice.levels] for choice in task.space.choices]
    config = solve(costs, seconds, limit=task.limit - task.space.fixed_cost)
    return SearchResult(config=config, kl=task.evaluator.kl(config))

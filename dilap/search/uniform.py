"""Give every sublayer the same share of its full cost: the baseline that any search has to beat."""

from dilap.core.errors import Infeasible
from dilap.core.space import Space
from dilap.search.allocation import Config
from dilap.search.levels import prune_by_levels
from dilap.search.method import Pruned, PruneTask
from dilap.search.task import SearchResult, SearchTask


def prune(task: PruneTask) -> Pruned:
    """Prune by this choice of measured levels, followed by a closed-form refit."""
    return prune_by_levels(task, search)


def search(task: SearchTask) -> SearchResult:
    """Return the config of `equal_shares` within the limit, with its real KL. Raises Infeasible."""
    config = equal_shares(task.space, limit=task.limit)
    return SearchResult(config=config, kl=task.evaluator.kl(config))


def equal_shares(space: Space, *, limit: float) -> Config:
    """Return the config in which every choice has the same share of its full cost, the largest within `limit`.

    What is then left of the limit makes single sublayers one level wider, in bit-reversed order of their indices, which
    spreads them evenly. Raises Infeasible.
    """
    if (fastest := space.cost(space.fastest)) > limit:
        raise Infeasible(
            f"the smallest levels take {fastest / limit:.1%} of what is allowed: take a larger budget or smaller ratio"
        )
    some = [choice.levels for choice in space.choices if choice.levels[0].cost]  # the cheapest head costs nothing
    shares = sorted({level.cost / levels[0].cost for levels in some for level in levels}, reverse=True)
    fitting = (config for share in shares if space.cost(config := _at_share(space, share)) <= limit)
    config = next(fitting, space.fastest)
    for index in sorted(range(len(config)), key=lambda index: int(f"{index:016b}"[::-1], 2)):
        wider = (*config[:index], max(config[index] - 1, 0), *config[index + 1 :])
        if space.cost(wider) <= limit:
            config = wider
    return config


def _at_share(space: Space, share: float) -> Config:
    """Return the config with the widest level of every choice that costs at most `share` of the full width."""
    return tuple(
        next((k for k, level in enumerate(c.levels) if level.cost <= share * c.levels[0].cost), len(c.levels) - 1)
        for c in space.choices
    )

"""Quantising alone, as a method: all widths stay, and one precision for all blocks and one for the head are chosen."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from dilap.core.errors import Infeasible
from dilap.core.space import Choice, Space
from dilap.search.allocation import Config
from dilap.search.levels import prune_by_levels
from dilap.search.method import Pruned, PruneTask
from dilap.search.task import SearchResult, SearchTask


@dataclass(frozen=True, kw_only=True)
class Quantise:
    """The dense model in the formats that are nearest to it within the limit; `--set compensate=false` rounds plainly.

    With `compensate` the columns of a matrix make up for the rounding of others, as in GPTQ (arXiv 2210.17323);
    without, every weight is rounded as the runtime's own quantiser does.
    """

    compensate: bool = True

    def __call__(self, task: PruneTask) -> Pruned:
        refit = replace(task.levels.refit, corrections=())  # which would be more than rounding
        pruned = prune_by_levels(replace(task, levels=replace(task.levels, refit=refit)), search)
        return pruned if self.compensate else replace(pruned, parameters={})


def search(task: SearchTask) -> SearchResult:
    """Return the pair of formats within the limit that has the least real KL. Raises Infeasible."""
    found = [(task.evaluator.kl(config), config) for config in _configs(task.space, limit=task.limit)]
    if not found:
        raise Infeasible("no format of the dense model keeps this budget: take a larger one, or a method that prunes")
    kl, config = min(found)
    return SearchResult(config=config, kl=kl)


def _configs(space: Space, *, limit: float) -> Iterator[Config]:
    """Yield the configs within `limit` that keep all widths, with one precision for all blocks and one for the head.

    Where a block is not offered a precision, because it is no faster there, it has the reference.
    """
    blocks, heads = ([one for one in space.choices if bool(one.block.groups) == is_block] for is_block in (True, False))
    for precision in dict.fromkeys(name for choice in blocks for name in _full(choice)):
        body = [_full(choice).get(precision, 0) for choice in blocks]
        for of_heads in product(*(range(len(head.levels)) for head in heads)):
            if space.cost(config := (*body, *of_heads)) <= limit:
                yield config


def _full(choice: Choice) -> dict[str, int]:
    """Return the levels of a choice that keep its full width, by their precision."""
    return {one.precision: k for k, one in enumerate(choice.levels) if one.counts == choice.levels[0].counts}

"""DiLAP's search for runtimes that need equal widths in all layers: one pair of widths, and whole layers removed.

Precisions need not be equal: every sublayer has one of its own, and so has the head.
"""

from collections.abc import Iterator
from dataclasses import replace

from dilap.core.costs import Counts
from dilap.core.errors import Infeasible
from dilap.core.space import Choice, Space
from dilap.search.allocation import Config, Quadratic, project, swap
from dilap.search.dilap import linear_model
from dilap.search.levels import prune_by_levels
from dilap.search.method import Pruned, PruneTask
from dilap.search.shortlist import Shortlist
from dilap.search.task import SearchResult, SearchTask

_CANDIDATES = 12  # how many of the width pairs that the quadratic model finds best are scored on the real KL
_ROUNDS = 3  # of choosing precisions again, each around the config before


def prune(task: PruneTask) -> Pruned:
    """Prune by this search over measured levels, followed by a closed-form refit."""
    return prune_by_levels(task, search)


def search(task: SearchTask) -> SearchResult:
    """Return the best pair of widths and set of removed layers that was found within the limit. Raises Infeasible.

    For every pair of widths, layers are removed until the limit is kept, those first whose loss costs least by a
    quadratic model around the dense model, which chooses the precisions too. The best pairs are compared by the real
    KL. Then removed layers are exchanged for others where that lowers the real KL, and the precisions are chosen again
    around the config.
    """
    quadratic = linear_model(task, task.space.dense, number=0)
    candidates = sorted((quadratic.value(config), config) for config in _candidates(quadratic, task))
    if not candidates:
        raise Infeasible("no equal widths keep the limit, whole layers removed included: take a larger one")
    value, config = min((task.evaluator.kl(config), config) for _, config in candidates[:_CANDIDATES])
    task.report(f"equal widths: {len(candidates)} width pairs keep the limit, the best has KL {value:.3f}")
    return _rounded_again(task, _exchange(task, quadratic, SearchResult(config=config, kl=value)))


def _candidates(quadratic: Quadratic, task: SearchTask) -> Iterator[Config]:
    """Yield a config within the limit for every pair of widths that has one."""
    attention, ffn = task.space.choices[:2]
    for heads in _widths(attention):
        for channels in _widths(ffn):
            config = _best_at_widths(quadratic, task, heads, channels)
            if config is not None:
                yield config


def _widths(choice: Choice) -> list[Counts]:
    """Return the different widths of a choice but its removal, in the order of its levels."""
    return list(dict.fromkeys(level.counts for level in choice.levels if not level.is_removed))


def _best_at_widths(quadratic: Quadratic, task: SearchTask, heads: Counts, channels: Counts) -> Config | None:
    """Return the best config for a pair of widths, None where none keeps the limit.

    One layer after another is removed, always the one that costs least in the quadratic, until the limit is kept, and
    then as long as what that allows the precisions is worth more.
    """
    space = task.space
    widths = [heads, channels] * len(space.architecture.layers)
    widths += [()] * (len(space.choices) - len(widths))  # the head has none
    config = tuple(_levels_of(choice, counts)[-1] for choice, counts in zip(space.choices, widths, strict=True))
    best: Config | None = None
    while True:
        if space.cost(config) <= task.limit:
            config = _with_precisions(quadratic, task, config)
            if best is not None and quadratic.value(config) >= quadratic.value(best):
                return best
            best = config
            if config == tuple(own[0] for own in _same_widths(space, config)):
                return best  # nothing is rounded any more
        shorter = [_without(space, config, layer) for layer in _present(space, config)]
        if not shorter:
            return best
        config = min(shorter, key=lambda one: (quadratic.value(one), one))


def _levels_of(choice: Choice, counts: Counts) -> list[int]:
    """Return the levels of a choice with that width, by falling cost: its precisions."""
    return [index for index, level in enumerate(choice.levels) if level.counts == counts]


def _same_widths(space: Space, config: Config) -> list[list[int]]:
    """Return, for every choice, the levels that are as wide as that of `config`."""
    return [_levels_of(one, one.levels[level].counts) for one, level in zip(space.choices, config, strict=True)]


def _with_precisions(quadratic: Quadratic, task: SearchTask, config: Config) -> Config:
    """Return the best config within the limit that has the same widths."""
    same = Shortlist.at(quadratic, task.space, _same_widths(task.space, config))
    found = project(same.quadratic.diagonal_only(), same.space, limit=task.limit)
    return same.full(swap(same.quadratic, same.space, found, limit=task.limit))


def _exchange(task: SearchTask, quadratic: Quadratic, result: SearchResult) -> SearchResult:
    """Exchange one removed layer for another wherever that lowers the real KL, the most promising exchange first."""
    config, value, space = result.config, result.kl, task.space
    tried = {config}
    for _ in range(task.options.evaluations):
        present = _present(space, config)
        absent = [layer for layer in range(1, len(space.architecture.layers)) if layer not in present]
        neighbours = {_exchanged(config, back, layer) for back in absent for layer in present} - tried
        if not neighbours:
            break
        candidate = min(neighbours, key=lambda one: (quadratic.value(one), one))
        tried.add(candidate)
        if (kl := task.evaluator.kl(candidate)) < value:
            config, value = candidate, kl
    return SearchResult(config=config, kl=value)


def _rounded_again(task: SearchTask, result: SearchResult) -> SearchResult:
    """Choose the precisions again by a quadratic model around the config, as long as that lowers the real KL."""
    if all(len(own) == 1 for own in _same_widths(task.space, result.config)):
        return result
    for number in range(1, 1 + _ROUNDS):
        config = _with_precisions(linear_model(task, result.config, number=number), task, result.config)
        kl = task.evaluator.kl(config)
        if kl >= result.kl:
            break
        result = replace(result, config=config, kl=kl)
    task.report(f"equal widths: with the precisions chosen again the KL is {result.kl:.3f}")
    return result


def _present(space: Space, config: Config) -> list[int]:
    """Return the layers that can still be removed: all that are left, apart from the first layer, or none.

    A space of a runtime that loads no model without some layer has no level for that.
    """
    layers = range(1, len(space.architecture.layers))
    return [
        layer
        for layer in layers
        if space.choices[2 * layer].levels[-1].is_removed
        and not space.choices[2 * layer].levels[config[2 * layer]].is_removed
    ]


def _without(space: Space, config: Config, layer: int) -> Config:
    """Return `config` with a whole layer removed: the last level of both its sublayers."""
    removed = tuple(len(choice.levels) - 1 for choice in space.choices[2 * layer : 2 * layer + 2])
    return (*config[: 2 * layer], *removed, *config[2 * layer + 2 :])


def _exchanged(config: Config, one: int, other: int) -> Config:
    """Return `config` with the levels of two layers exchanged."""
    levels = list(config)
    levels[2 * one : 2 * one + 2], levels[2 * other : 2 * other + 2] = (
        levels[2 * other : 2 * other + 2],
        levels[2 * one : 2 * one + 2],
    )
    return tuple(levels)

"""DiLAP's search for runtimes that need equal widths in all layers: one pair of widths, and whole layers removed."""

from collections.abc import Iterator
from itertools import product

from dilap.core.errors import Infeasible
from dilap.core.space import Space
from dilap.search.allocation import Config, Quadratic
from dilap.search.dilap import linear_model
from dilap.search.levels import prune_by_levels
from dilap.search.method import Pruned, PruneTask
from dilap.search.task import SearchResult, SearchTask

_CANDIDATES = 12  # how many of the width pairs that the quadratic model finds best are scored on the real KL


def prune(task: PruneTask) -> Pruned:
    """Prune by this search over measured levels, followed by a closed-form refit."""
    return prune_by_levels(task, search)


def search(task: SearchTask) -> SearchResult:
    """Return the best pair of widths and set of removed layers that was found within the limit. Raises Infeasible.

    For every pair of widths, layers are removed until the limit is kept, those first whose loss costs least by a
    quadratic model around the dense model. The best pairs are compared by the real KL. Then removed layers are
    exchanged for others where that lowers the real KL.
    """
    quadratic = linear_model(task, task.space.dense, number=0)
    candidates = sorted((quadratic.value(config), config) for config in _candidates(quadratic, task))
    if not candidates:
        raise Infeasible("no equal widths keep the limit, whole layers removed included: take a larger one")
    value, config = min((task.evaluator.kl(config), config) for _, config in candidates[:_CANDIDATES])
    task.report(f"equal widths: {len(candidates)} width pairs keep the limit, the best has KL {value:.3f}")
    return _exchange(task, quadratic, SearchResult(config=config, kl=value))


def _candidates(quadratic: Quadratic, task: SearchTask) -> Iterator[Config]:
    """Yield a config within the limit for every pair of levels that has one, with every level of a chosen head."""
    num_layers = len(task.space.architecture.layers)
    first_attention, first_ffn, *heads = task.space.choices[:2] + task.space.choices[2 * num_layers :]
    for attention, ffn, *head in product(*(range(len(one.levels)) for one in (first_attention, first_ffn, *heads))):
        if not first_attention.levels[attention].is_removed and not first_ffn.levels[ffn].is_removed:
            config = _remove_layers(quadratic, task, ((attention, ffn) * num_layers + tuple(head)))
            if task.space.cost(config) <= task.limit:
                yield config


def _remove_layers(quadratic: Quadratic, task: SearchTask, config: Config) -> Config:
    """Remove one layer after another, always the one that costs least in the quadratic, until the limit is kept."""
    while task.space.cost(config) > task.limit:
        shorter = [_without(task.space, config, layer) for layer in _present(task.space, config)]
        if not shorter:
            break
        config = min(shorter, key=lambda one: (quadratic.value(one), one))
    return config


def _exchange(task: SearchTask, quadratic: Quadratic, result: SearchResult) -> SearchResult:
    """Exchange one removed layer for another wherever that lowers the real KL, the most promising exchange first."""
    config, value, space = result.config, result.kl, task.space
    present = _present(space, config)
    widths = config[2 * present[0] : 2 * present[0] + 2] if present else config[:2]
    absent = [layer for layer in range(1, len(space.architecture.layers)) if layer not in present]
    tried = {config}
    for _ in range(task.options.evaluations):
        neighbours = {
            _without(space, (*config[: 2 * back], *widths, *config[2 * back + 2 :]), layer)
            for back in absent
            for layer in present
        } - tried
        if not neighbours:
            break
        candidate = min(neighbours, key=lambda one: (quadratic.value(one), one))
        tried.add(candidate)
        if (kl := task.evaluator.kl(candidate)) < value:
            config, value = candidate, kl
            present = _present(space, config)
            absent = [layer for layer in range(1, len(space.architecture.layers)) if layer not in present]
    return SearchResult(config=config, kl=value)


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

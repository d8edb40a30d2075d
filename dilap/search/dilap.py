"""DiLAP's own search: choose the levels of all sublayers together by a quadratic model of the loss.

The loss is the KL to the dense model on the validation split. Its quadratic model comes from one pass that estimates
gradients and the Fisher matrix. The model is minimised over level probabilities with a differentiable latency, and the
result is projected exactly onto the limit. Because the model is right only nearby, the limit is lowered in steps of
10 % of the dense latency, and a new model is made around the config of every step. The levels themselves are sublayers
whose output projections were refitted in closed form on the training split. At the end the config is polished by swaps
on the real KL.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from dilap.core.space import Space
from dilap.search.allocation import (
    Config,
    Quadratic,
    at_config,
    linear_losses,
    move,
    move_gains,
    project,
    relax,
    swap,
)
from dilap.search.levels import prune_by_levels
from dilap.search.method import Pruned, PruneTask
from dilap.search.options import SearchOptions
from dilap.search.selection import select
from dilap.search.shortlist import Shortlist
from dilap.search.task import Answers, Round, SearchResult, SearchTask

_SELECTIONS = 3
_NEAR = 0.01  # a KL in nats a token that is as good as none: eight bits give 0.005


def prune(task: PruneTask) -> Pruned:
    """Prune by this search over measured levels, followed by a closed-form refit."""
    return prune_by_levels(task, search)


def search(task: SearchTask[Answers]) -> SearchResult:
    """Return the config that the search finds within the limit. Raises Infeasible.

    The result is the same every time for one seed on one machine with one number of threads.
    """
    if task.previous is not None:
        return _revise(task, task.previous)
    space, evaluator = task.space, task.evaluator
    rounds: list[Round] = []
    current, value = _start(task)
    scale = 1.0
    limits = _limits(task, start=space.cost(current))
    while limits:
        limit = limits.pop(0)
        quadratic = linear_model(task, current, number=len(rounds), scale=scale)
        config = allocate(quadratic, space, limit=limit, previous=current, options=task.options, report=task.report)
        predicted, real = value + quadratic.value(config), evaluator.kl(config)
        rounds.append(Round(limit=limit, config=config, predicted_kl=predicted, real_kl=real))
        share = limit / space.cost(space.dense)  # of the dense model's seconds, or of its weights
        found = f"{task.distance} predicted {predicted:.3f}, real {real:.3f}"
        task.report(f"round {len(rounds)}: limit {share:.1%} of dense, {found}")
        scale *= _correction(predicted=predicted - value, real=real - value)
        # A KL that rises more than twice as much as predicted means that the step was too long for the quadratic
        # model: go half of the way first.
        halfway = (space.cost(current) + limit) / 2
        is_surprise = real - value > 2 * max(predicted - value, 0.0) + _NEAR
        if is_surprise and space.cost(current) - halfway > task.options.step / 8 * limit:
            limits = [halfway, limit, *limits]
            continue
        current, value = config, real
    for config in unpruned_configs(space):
        if space.cost(config) <= task.limit and (real := evaluator.kl(config)) < value:
            current, value = config, real
            task.report(f"no pruning: one precision for all parts is nearer, {task.distance} {real:.3f}")
    return polish(task, SearchResult(config=current, kl=value, rounds=tuple(rounds), curvature_scale=scale))


def _start(task: SearchTask[Answers]) -> tuple[Config, float]:
    """Return the config from which the rounds start, and its KL: the cheapest above the limit that loses nothing.

    That is the dense one, or one of those that quantising alone gives, so that no rounds are spent on what eight bits
    give for nothing.
    """
    above = (config for config in unpruned_configs(task.space) if task.space.cost(config) > task.limit)
    near = ((config, kl) for config in above if (kl := task.evaluator.kl(config)) < _NEAR)
    dense = task.space.dense, task.evaluator.kl(task.space.dense)  # not 0 where its batch norms are measured again
    return min([dense, *near], key=lambda one: task.space.cost(one[0]))


def unpruned_configs(space: Space[Any]) -> Iterator[Config]:
    """Yield the configs that keep all widths, and have one precision but the reference wherever it is offered.

    They are what quantising alone gives.
    """
    full = [
        {name: k for k, name in enumerate(choice.precisions) if choice.levels[k].counts == choice.levels[0].counts}
        for choice in space.choices
    ]
    for precision in dict.fromkeys(one for own in full for one in own):
        config = tuple(own.get(precision, 0) for own in full)
        if any(config):
            yield config


def _revise(task: SearchTask[Answers], result: SearchResult) -> SearchResult:
    """Move the result of a search to the task's limit by a new allocation around its config and a new polish."""
    quadratic = linear_model(task, result.config, number=len(result.rounds), scale=result.curvature_scale)
    config = allocate(quadratic, task.space, limit=task.limit, previous=result.config, options=task.options)
    return polish(task, replace(result, config=config, kl=task.evaluator.kl(config)))


def _limits(task: SearchTask[Answers], *, start: float) -> list[float]:
    """Return the limits of the rounds, a step apart, from the latency `start` down to the task's.

    They do not begin at the task's own, so that tasks with nearby limits share all rounds but the last.
    """
    step = task.options.step * start
    count = math.ceil((start - task.limit) / step - 0.25)  # the last step may be a quarter longer
    return [*(start - step * number for number in range(1, count)), task.limit]


def linear_model(task: SearchTask[Answers], config: Config, *, number: int, scale: float = 1.0) -> Quadratic:
    """Return the quadratic model of the KL around `config`, made robust against the noise of its estimate.

    `scale` multiplies the curvature, and `number` is added to the seed of the labels that are drawn for it.
    """
    options = task.options
    curvature = task.evaluator.curvature(config, samples=options.label_samples, seed=options.seed + number)
    # A minimum over hundreds of levels finds slopes that are low by chance, so each is taken at the high end of its
    # error.
    slopes = curvature.b + options.caution * curvature.b_error
    quadratic = Quadratic(b=slopes, Q=scale * curvature.Q, sizes=task.evaluator.sizes)
    if not options.cross_terms:
        return quadratic.diagonal_only()
    return quadratic.shrunk(num_rows=curvature.num_rows, num_changes=curvature.num_changes)


def _correction(*, predicted: float, real: float) -> float:
    """Return the factor by which the curvature was too small, because a step is long for a quadratic model."""
    return min(max(real / predicted, 0.5), 3.0) if predicted > 0 else 1.0


def allocate(
    quadratic: Quadratic,
    space: Space[Any],
    *,
    limit: float,
    previous: Config,
    options: SearchOptions,
    report: Callable[[str], None] = lambda _: None,
) -> Config:
    """Return the best config of the quadratic model within `limit` that was found. Raises Infeasible.

    The candidates are the exact solution without interactions, and relaxations from several starts, each projected onto
    the limit. All of them are improved by swaps. Where pairs of choices have costs of their own, the best one is
    improved by exact selection, and `report` is told how exact that was.
    """
    shortlist = Shortlist.of(quadratic, space, always=previous)
    quadratic, space, previous = shortlist.quadratic, shortlist.space, shortlist.short(previous)
    independent = project(quadratic.diagonal_only(), space, limit=limit)
    candidates = [swap(quadratic, space, independent, limit=limit)]
    if options.cross_terms and options.restarts:
        generator = torch.Generator().manual_seed(options.seed)
        starts: list[Config] = [(), independent, previous][: options.restarts]
        while len(starts) < options.restarts:
            starts.append(tuple(int(torch.randint(size, (1,), generator=generator)) for size in quadratic.sizes))
        for p in relax(quadratic, space, limit=limit, starts=starts, options=options.relaxation):
            projected = project(quadratic, space, limit=limit, probabilities=p)
            candidates.append(swap(quadratic, space, projected, limit=limit))
    best = min(candidates, key=lambda config: (quadratic.value(config), config))
    if space.couplings:
        best = _selected(quadratic, space, best, limit=limit, seconds=options.selection_seconds, report=report)
    return shortlist.full(best)


def _selected(
    quadratic: Quadratic,
    space: Space[Any],
    config: Config,
    *,
    limit: float,
    seconds: float,
    report: Callable[[str], None],
) -> Config:
    """Return a config that is not worse, by exact selection with the interactions as they are beside `config`.

    That is repeated, because better configs have other interactions, as long as it helps.
    """
    gaps = []
    for _ in range(_SELECTIONS):
        losses = linear_losses(quadratic, at_config(quadratic, config))
        selection = select(losses, space, limit=limit, seconds=seconds)
        if selection.config is None or space.cost(selection.config) > limit:
            break
        gaps.append(selection.gap)
        found = swap(quadratic, space, selection.config, limit=limit)
        if quadratic.value(found) > quadratic.value(config) - 1e-9:
            break
        config = found
    said = f"at most {max(gaps):.2%} above the least loss" if gaps else "nothing was found in time"
    report(f"exact selection, {len(gaps)} times: {said}")
    return config


def polish(task: SearchTask[Answers], result: SearchResult) -> SearchResult:
    """Try changes of one or two sublayers and keep those that lower the real KL, like EvoPress (arXiv 2410.14649).

    Those come first from which a quadratic model around the start expects most. Noise is added to what it expects, so
    that not all of the changes tried are variants of one.
    """
    options = task.options
    if options.evaluations == 0:
        return result
    quadratic = linear_model(task, result.config, number=len(result.rounds), scale=result.curvature_scale)
    shortlist = Shortlist.of(quadratic, task.space, always=result.config)
    generator = torch.Generator().manual_seed(options.seed)
    config, values, tried, accepted = result.config, task.evaluator.kls(result.config), {result.config}, 0
    for _ in range(options.evaluations):
        candidate = _proposal(shortlist, config, tried, generator, limit=task.limit)
        if candidate is None:
            break
        tried.add(candidate)
        found = task.evaluator.kls(candidate)
        if _is_better(found, values):
            config, values, accepted = candidate, found, accepted + 1
    changed = sum(a != b for a, b in zip(result.config, config, strict=True))
    kl = float(values.double().mean())
    task.report(
        f"polish: {accepted} of {len(tried) - 1} moves kept, {changed} sublayers changed, {task.distance} {kl:.3f}"
    )
    return replace(result, config=config, kl=kl)


def _is_better(found: torch.Tensor, values: torch.Tensor) -> bool:
    """Return whether the KL fell, as a mean over sequences, by more than the standard error of its fall."""
    fall = (values - found).double()
    return bool(fall.mean() > fall.std() / len(fall) ** 0.5)


def _proposal(
    shortlist: Shortlist, config: Config, tried: set[Config], generator: torch.Generator, *, limit: float
) -> Config | None:
    """Return a neighbour of `config` that was not tried, drawn by a softmax of the expected gains; None for none."""
    quadratic, start = shortlist.quadratic, shortlist.short(config)
    gains = move_gains(quadratic, shortlist.space, start, limit=limit).reshape(-1)
    best = gains.topk(min(2000, len(gains)), largest=False)
    finite = best.values[best.values.isfinite()].float()
    gumbel = -torch.empty(len(finite)).exponential_(generator=generator).log()
    order = (finite - 0.25 * finite.std() * gumbel).argsort()
    moves = (shortlist.full(move(quadratic, start, int(best.indices[index]))) for index in order)
    return next((moved for moved in moves if moved not in tried), None)

"""The level library: for every sublayer and width, the units that stay and the projection that makes up for the rest.

A sublayer's output is W x, with x the inputs of its output projection. Removing units removes entries of x; the
projection that is left is refitted in closed form so that W_kept x_kept is as near to W x as it can be. Setting the
removed entries to zero gives the same output as cutting them out.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from typing import Literal

import torch
from transformers import PreTrainedModel

from dilap.core.groups import Kept
from dilap.core.space import Level, Space
from dilap.models.anatomy import Sublayer, sublayers
from dilap.models.statistics import OUTPUTS, layer_statistics

Order = Literal["wanda", "obs"]
Progress = Callable[[int], None]


@dataclass(frozen=True, kw_only=True)
class LevelFit:
    """A level with its values: the units that stay, the columns of the projection that stay, the refitted projection.

    `error` is the mean squared output error, relative to that of removing the sublayer (0 full, 1 removed).
    """

    units: Kept
    columns: torch.Tensor
    weight: torch.Tensor
    error: float


@dataclass(frozen=True, kw_only=True)
class LibraryOptions:
    """Settings of `build_library`.

    The `order` `wanda` ranks units by weight times activation; `obs` (optimal brain surgery) removes first what costs
    the refitted output least. `ridge` is relative to the mean diagonal of the input covariance.
    """

    # KL of SmolLM2-135M on unseen text at 85 %, 70 % and 55 %: wanda 0.541, 1.331, 2.170, obs 0.591, 1.253, 1.963
    # (tools/bench_search --only "no swaps" --seeds 1).
    order: Order = "obs"
    ridge: float = 0.01
    batch_tokens: int = 2048


def input_covariances(
    model: PreTrainedModel, tokens: torch.Tensor, *, batch_tokens: int, progress: Progress = lambda _: None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the name of every sublayer, in order, and X'X / T of its output projection's inputs (inputs x inputs, f32).

    X are the inputs on the T positions of `tokens` (sequences x length). Only one layer's are held at a time.
    """
    names = {one.name for one in sublayers(model)}
    for step in layer_statistics(model, tokens, covariance=True, batch_tokens=batch_tokens, progress=progress):
        for kind, role in OUTPUTS:
            if (name := f"layers.{step.index}.{kind}") in names:
                yield name, step.statistics[role].covariance


def build_library(
    model: PreTrainedModel,
    space: Space,
    tokens: torch.Tensor,
    *,
    options: LibraryOptions = LibraryOptions(),
    progress: Progress = lambda _: None,
) -> list[list[LevelFit]]:
    """Fit every level of every choice on `tokens` (sequences x length); the result is in the order of `space`."""
    found = {sublayer.name: sublayer for sublayer in sublayers(model)}
    choices, library = {choice.name: choice for choice in space.choices}, {}
    for name, covariance in input_covariances(model, tokens, batch_tokens=options.batch_tokens, progress=progress):
        library[name] = fit_levels(found[name], choices[name].levels, covariance, options=options)
    return [library[choice.name] for choice in space.choices]


def fit_levels(
    sublayer: Sublayer, levels: Sequence[Level], covariance: torch.Tensor, *, options: LibraryOptions
) -> list[LevelFit]:
    """Fit every level of one sublayer; `covariance` is that of its output projection's inputs (inputs x inputs)."""
    weight = sublayer.out.weight.detach().float()
    damped = regularised(covariance, ridge=options.ridge)
    reference = max(float(torch.einsum("di,ij,dj->", weight, covariance, weight)), 1e-30)
    choose = _by_channel if len(sublayer.block.groups) == 1 else _by_head
    fits = []
    for index, units in enumerate(choose(sublayer, levels, weight, damped, order=options.order)):
        columns = sublayer.columns(units)
        kept = weight.clone() if index == 0 else refit(weight, damped, columns)
        error = output_error(weight, kept, columns, covariance) / reference
        fits.append(LevelFit(units=units, columns=columns, weight=kept, error=error))
    return fits


def regularised(covariance: torch.Tensor, *, ridge: float) -> torch.Tensor:
    """Add `ridge` times the mean diagonal to the covariance's diagonal, and 1 for inputs that are never active."""
    diagonal = covariance.diagonal()
    extra = ridge * diagonal.mean() + (diagonal == 0).float()
    return covariance + torch.diag(extra)


def refit(weight: torch.Tensor, damped: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Return the projection over `columns` whose output is nearest to that of `weight`: W H[:,K] H[K,K]^-1.

    W is `weight` (hidden x inputs), H the damped covariance (inputs x inputs), K are the columns; ZipLM and optimal
    brain surgery use the same formula.
    """
    if len(columns) == 0:
        return weight.new_zeros(weight.shape[0], 0)
    factor = torch.linalg.cholesky(damped[columns][:, columns])
    solution: torch.Tensor = torch.cholesky_solve((weight @ damped[:, columns]).T, factor)
    return solution.T.contiguous()


def output_error(weight: torch.Tensor, kept: torch.Tensor, columns: torch.Tensor, covariance: torch.Tensor) -> float:
    """Return the mean squared change of the output, summed over channels, when `kept` over `columns` is the weight."""
    change = weight.clone()
    change[:, columns] -= kept
    return float(((change @ covariance) * change).sum())


def wanda_scores(weight: torch.Tensor, covariance: torch.Tensor) -> torch.Tensor:
    """Return the importance of every input: the norm of its weights times that of its activations (inputs).

    This is Wanda (arXiv 2306.11695) for whole columns.
    """
    norms: torch.Tensor = weight.norm(dim=0)
    return norms * covariance.diagonal().clamp_min(0).sqrt()


def channel_order(weight: torch.Tensor, damped: torch.Tensor, *, order: Order) -> torch.Tensor:
    """Return the channels, the most important first."""
    if order == "wanda":
        return wanda_scores(weight, damped).argsort(descending=True, stable=True)
    return obs_order(weight, damped, step=32)


def obs_order(weight: torch.Tensor, damped: torch.Tensor, *, step: int) -> torch.Tensor:
    """Return the channels, the last removed first, by greedy removal as in ZipLM.

    Again and again the `step` channels are removed that cost the output least when the others are refitted.
    """
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    weight, alive = weight.clone(), torch.ones(damped.shape[0], dtype=torch.bool)
    removed: list[torch.Tensor] = []
    while alive.any():
        scores = weight.square().sum(0) / inverse.diagonal()
        scores[~alive] = torch.inf
        cheapest = scores.argsort(stable=True)[: min(step, int(alive.sum()))]
        factor = torch.linalg.solve(inverse[cheapest][:, cheapest], inverse[cheapest])
        weight -= weight[:, cheapest] @ factor
        inverse -= inverse[:, cheapest] @ factor
        inverse.diagonal()[cheapest] = 1.0  # they are removed; keeps the division above defined
        alive[cheapest] = False
        removed.append(cheapest)
    return torch.cat(removed).flip(0)


def _by_channel(
    sublayer: Sublayer, levels: Sequence[Level], weight: torch.Tensor, damped: torch.Tensor, *, order: Order
) -> Iterator[Kept]:
    """Yield the units that stay at every level of a sublayer that has one group."""
    ranked, group = channel_order(weight, damped, order=order), sublayer.block.main
    for level in levels:
        yield {group.name: _ascending(ranked[: level.counts[0]])}


def _by_head(
    sublayer: Sublayer, levels: Sequence[Level], weight: torch.Tensor, damped: torch.Tensor, *, order: Order
) -> Iterator[Kept]:
    """Yield the KV groups and query slots that stay at every level; the order `obs` tries all their combinations."""
    groups, slots = sublayer.block.groups

    def kept(chosen: Sequence[int], chosen_slots: Sequence[int]) -> Kept:
        return {groups.name: tuple(chosen), slots.name: tuple(chosen_slots)}

    def error(candidate: tuple[tuple[int, ...], tuple[int, ...]]) -> float:
        columns = sublayer.columns(kept(*candidate))
        return output_error(weight, refit(weight, damped, columns), columns, damped)

    for level in levels:
        num_groups, num_slots = level.counts
        if level.is_removed:
            yield kept((), range(slots.num_units))
        elif order == "wanda":
            heads = wanda_scores(weight, damped).square().reshape(groups.num_units, slots.num_units, -1).sum(-1)
            best = _ascending(heads.sum(1).argsort(descending=True, stable=True)[:num_groups])
            yield kept(best, _ascending(heads[list(best)].sum(0).argsort(descending=True, stable=True)[:num_slots]))
        else:
            candidates = product(
                combinations(range(groups.num_units), num_groups), combinations(range(slots.num_units), num_slots)
            )
            yield kept(*min(candidates, key=error))


def _ascending(indices: torch.Tensor) -> tuple[int, ...]:
    return tuple(indices.sort().values.tolist())

"""Convert between the inputs of a sublayer's output projection and its units."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel

from dilap.core.groups import indices_kept
from dilap.core.plan import Plan
from dilap.models.anatomy import Sublayer, blocks_of
from dilap.models.statistics import OUTPUTS, InputStatistics, Step


def by_unit(columns: torch.Tensor, sublayer: Sublayer) -> torch.Tensor:
    """Return scores of an output projection's inputs as (units x inputs of a unit), for the units of the main group.

    The query heads of a KV head lie side by side, so a unit's inputs are consecutive.
    """
    return columns.reshape(sublayer.block.main.num_units, -1)


def unit_scores(columns: torch.Tensor, sublayer: Sublayer) -> dict[str, torch.Tensor]:
    """Return the scores of all units of a sublayer by group, summed over those of their inputs.

    A query slot has inputs beside every KV head.
    """
    sizes = [group.num_units for group in sublayer.block.groups]
    grid = columns.reshape(*sizes, -1).sum(-1)
    every = range(len(sizes))
    return {
        group.name: grid.sum([other for other in every if other != dimension]) if len(sizes) > 1 else grid
        for dimension, group in enumerate(sublayer.block.groups)
    }


def has_heads(sublayer: Sublayer) -> bool:
    """Return whether a sublayer's units are KV groups, which have query slots, and not channels."""
    return len(sublayer.block.groups) > 1


def out_statistics(step: Step, sublayer: Sublayer) -> InputStatistics:
    """Return the statistics of the inputs of a sublayer's output projection."""
    return step.statistics[dict(OUTPUTS)[sublayer.kind]]


def removed_columns(plan: Plan, sublayer: Sublayer) -> torch.Tensor:
    """Return the output projection's inputs that a plan removes, ascending."""
    kept = sublayer.columns(plan.kept)
    mask = torch.ones(sublayer.out.in_features, dtype=torch.bool)
    mask[kept] = False
    return mask.nonzero().squeeze(1)


def zero_columns_(out: nn.Linear, columns: torch.Tensor) -> None:
    """Give an output projection a new matrix with zeros for these inputs."""
    out.weight.data = out.weight.detach().index_fill(1, columns.to(out.weight.device), 0)


@torch.no_grad()
def masked_rows(model: PreTrainedModel, plan: Plan) -> dict[str, torch.Tensor]:
    """Return, in their dense shapes, all tensors in whose rows units lie, with zeros where the plan removes them.

    The outputs of removed units are zero with them, as in a model that is cut.
    """
    found = {}
    for (tensor, axis), kept in indices_kept(
        (g for block in blocks_of(model) for g in block.groups), plan.kept
    ).items():
        dense = model.get_parameter(tensor)
        if axis == 0 and len(kept) < len(dense):
            rows = torch.from_numpy(kept)
            found[tensor] = torch.zeros_like(dense).index_copy_(0, rows, dense[rows])
    return found


def num_units(plan: Plan) -> Mapping[str, int]:
    """Return how many units a plan keeps in every group."""
    return {name: len(units) for name, units in plan.kept.items()}


@contextmanager
def restored(sublayers: list[Sublayer]) -> Iterator[None]:
    """Give the output projections their matrices back at the end of the context.

    Inside, new matrices may be set, but nothing may be written into the old ones.
    """
    weights = [one.out.weight.detach() for one in sublayers]
    try:
        yield
    finally:
        for one, weight in zip(sublayers, weights, strict=True):
            one.out.weight.data = weight

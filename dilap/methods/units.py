"""From scores of an output projection's inputs to scores of units, and back from units to those inputs."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from dilap.core.plan import Plan
from dilap.models.anatomy import Sublayer
from dilap.models.statistics import OUTPUTS, InputStatistics, Step


def by_unit(columns: torch.Tensor, sublayer: Sublayer) -> torch.Tensor:
    """Scores of an output projection's inputs as a row per unit of the sublayer's main group (units x inputs of a
    unit): the query heads of a KV head lie side by side."""
    return columns.reshape(sublayer.block.main.num_units, -1)


def has_heads(sublayer: Sublayer) -> bool:
    """Whether its units are KV groups, each with query slots of its own, and not channels."""
    return len(sublayer.block.groups) > 1


def out_statistics(step: Step, sublayer: Sublayer) -> InputStatistics:
    """Of the inputs of a sublayer's output projection."""
    return step.statistics[dict(OUTPUTS)[sublayer.kind]]


def removed_columns(plan: Plan, sublayer: Sublayer) -> torch.Tensor:
    """The output projection's inputs that a plan removes, ascending."""
    kept = sublayer.columns(plan.kept)
    mask = torch.ones(sublayer.out.in_features, dtype=torch.bool)
    mask[kept] = False
    return mask.nonzero().squeeze(1)


def zero_columns_(out: nn.Linear, columns: torch.Tensor) -> None:
    """Silence inputs of an output projection, by a new matrix."""
    out.weight.data = out.weight.detach().index_fill(1, columns, 0)


def num_units(plan: Plan) -> Mapping[str, int]:
    """How many units a plan keeps of every group."""
    return {name: len(units) for name, units in plan.kept.items()}


@contextmanager
def restored(sublayers: list[Sublayer]) -> Iterator[None]:
    """Give the output projections their matrices back in the end; what runs inside sets others, and overwrites none."""
    weights = [one.out.weight.detach() for one in sublayers]
    try:
        yield
    finally:
        for one, weight in zip(sublayers, weights, strict=True):
            one.out.weight.data = weight

"""Scores of the units of a group, made of numbers that its tensors' entries have."""

import torch

from dilap.core.graph import Network
from dilap.core.groups import Group, Member


def by_unit(values: torch.Tensor, member: Member) -> torch.Tensor:
    """Return the sum over every unit (units) of what the entries of a member's axis have (entries)."""
    grid = values[member.span].reshape(member.grid)
    return grid.sum([axis for axis in range(grid.ndim) if axis != member.dimension]) if grid.ndim > 1 else grid


def over_axis(values: torch.Tensor, axis: int) -> torch.Tensor:
    """Return the sum over all axes of a tensor but one."""
    return values.movedim(axis, 0).flatten(1).sum(1) if values.ndim > 1 else values


def filters_of(network: Network, group: Group) -> list[Member]:
    """Return where the weights lie that compute the outputs of a group: filters of convolutions, rows of matrices."""
    outputs = {(layer.weight, layer.outputs_axis) for layer in network.layers}
    return [one for one in group.members if (one.tensor, one.axis) in outputs]

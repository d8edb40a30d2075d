"""Filters with small weights go first, in equal shares of every group (`uniform`) or wherever they are (`magnitude`).

The L1 norm of a filter as its importance is that of Li et al., Pruning Filters for Efficient ConvNets
(arXiv 1608.08710).
"""

import torch

from dilap.core.graph import Network
from dilap.core.plan import Plan
from dilap.methods.networks.scores import by_unit, filters_of, over_axis
from dilap.search.network_task import NetworkTask


def uniform(task: NetworkTask) -> Plan[Network]:
    """Remove the same share of every group."""
    return task.keep_equal_shares(norms(task))


def magnitude(task: NetworkTask) -> Plan[Network]:
    """Remove the smallest filters of the network, compared by their ratios to the mean of their group."""
    return task.keep_highest({name: scores / scores.mean() for name, scores in norms(task).items()})


def norms(task: NetworkTask) -> dict[str, torch.Tensor]:
    """Return the L1 norm of every unit's filters in all layers that a group couples, by group."""
    parameters = dict(task.model.named_parameters())
    return {
        group.name: torch.stack(
            [
                by_unit(over_axis(parameters[one.tensor].detach().float().abs(), one.axis), one)
                for one in filters_of(task.network, group)
            ]
        ).sum(0)
        for group in task.network.groups
    }

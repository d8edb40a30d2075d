"""The interface of pruning methods for networks that are no decoders; it mirrors that of `dilap.search.method`.

A method is anything that is called with a `NetworkTask` and returns the plan that it chooses, or a `Pruned` where it
has new values for the tensors, too:

    def drop_small_filters(task: NetworkTask) -> Plan[Network]:
        return task.keep_equal_shares({group.name: my_scores(task.model, group) for group in task.network.groups})
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from dilap.core.costs import Costs
from dilap.core.errors import InvalidInput
from dilap.core.graph import Network
from dilap.core.groups import Group
from dilap.core.plan import Plan, full_plan
from dilap.models.network import Examples
from dilap.search.limit import CostLimit
from dilap.search.method import Pruned

Scores = Mapping[str, torch.Tensor]  # of the units of groups, by the groups' names


class LayerCosts(Costs, Protocol):
    """Costs that are also known of every layer."""

    def layer(self, name: str, widths: Mapping[str, int]) -> float:
        """Return the cost of one layer of a network with so many units left in its groups."""


@dataclass(frozen=True, kw_only=True)
class NetworkTask:
    """What a method gets: a network, images to calibrate on, and a limit on its cost.

    `images` are preprocessed (images x channels x height x width), or texts as tokens (texts x 3 x tokens); their
    classes, `labels`, are None where they are not known. `base` is the model's digest. Numbers of channels that stay
    are multiples of `multiple`, which is what the runtime's kernels fill, where a group has as many. `costs` are those
    that the limit is about, for methods that choose among widths by their costs, and `validation` are other examples,
    by which methods judge their choices. `cache` is a folder for what is computed only once, which a killed run reads
    when it goes on, and so do the other budgets of a comparison: what lies there must not depend on the limit. `report`
    takes a line for the log.
    """

    model: nn.Module
    base: str
    network: Network
    images: Examples
    cost_limit: CostLimit
    labels: tuple[int, ...] | None = None
    costs: LayerCosts | None = None
    validation: Examples | None = None
    multiple: int = 1
    cache: Path | None = None
    seed: int = 0
    report: Callable[[str], None] = lambda _: None

    def __post_init__(self) -> None:
        if self.labels is not None and len(self.labels) != len(self.images):
            raise InvalidInput(f"{len(self.images)} images have {len(self.labels)} labels")
        if not len(self.images):
            raise InvalidInput("there are no images to calibrate on; give some")

    def rounded(self, group: Group, wanted: float) -> int:
        """Return the number of units nearest to `wanted` that fills kernels, at least one and at most all."""
        step = self._step(group)
        return min(max(round(wanted / step) * step, step), group.num_units)

    def widths(self, group: Group) -> list[int]:
        """Return the numbers of units that fill kernels, and all units, ascending."""
        step = self._step(group)
        return [*range(step, group.num_units, step), group.num_units]

    def _step(self, group: Group) -> int:
        channels = math.prod(group.members[0].grid) // group.num_units
        return self.multiple // math.gcd(self.multiple, channels)

    def require_costs(self) -> LayerCosts:
        """Return the costs that the limit is about. Raises InvalidInput where the task has none."""
        if self.costs is None:
            raise InvalidInput("this method needs the costs of all widths")
        return self.costs

    def keep(self, scores: Scores, counts: Mapping[str, float]) -> Plan[Network]:
        """Return the plan that keeps, of every group in `scores`, about `counts` units, those with the best scores."""
        kept = dict(full_plan(self.network, base=self.base).kept)
        for group in self.network.groups:
            if group.name in scores:
                order = scores[group.name].argsort(descending=True, stable=True)
                number = self.rounded(group, counts[group.name])
                kept[group.name] = tuple(order[:number].sort().values.tolist())
        return Plan(base=self.base, architecture=self.network, kept=kept)

    def keep_equal_shares(self, scores: Scores) -> Plan[Network]:
        """Return the plan that keeps the limit by removing the same share of every group. Raises Infeasible."""
        return self.cost_limit.bisect(
            lambda share: self.keep(scores, {one.name: (1 - share) * one.num_units for one in self.network.groups})
        )

    def keep_highest(self, scores: Scores) -> Plan[Network]:
        """Return the plan that keeps the limit by removing the units with the lowest scores of all. Raises Infeasible.

        Scores of different groups are compared.
        """
        every = torch.cat([scores[name] for name in sorted(scores)]).sort().values

        def keep(share: float) -> Plan[Network]:
            number = int(share * len(every))
            limit = every[number] if number < len(every) else torch.tensor(math.inf)
            return self.keep(scores, {name: int((one >= limit).sum()) for name, one in scores.items()})

        return self.cost_limit.bisect(keep)


NetworkMethod = Callable[[NetworkTask], Plan[Network] | Pruned[Network]]

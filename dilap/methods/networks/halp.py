"""HALP: the chunks of units of most importance that a latency budget holds, chosen in rounds of training.

Shen et al., Structural Pruning via Latency-Saliency Knapsack (arXiv 2210.06659). While the network is trained for a
round, the importance of every unit is found out; see `halp_training`. Then the least important chunks of units are
removed, so many that the latency falls to the round's budget, and budgets fall geometrically to the limit. What a chunk
takes is looked up: the latency of the layers that give the group's channels, with the chunk and without it, while their
inputs are as many as they are now. That inputs fall too counts in the next round.

As the authors do it, the first layer is worth so much that it keeps its units as long as others can be removed, and
every group keeps its most important chunk at least (their `disable_layer_prune`). The sizes of their chunks are given
for every layer of ResNet-50; here a chunk is as many units as fill the runtime's kernels.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from dilap.core.errors import Infeasible, Unsupported
from dilap.core.graph import Layer, Network
from dilap.core.groups import Group
from dilap.core.plan import Plan, full_plan
from dilap.methods.networks.halp_training import HalpTraining
from dilap.methods.networks.knapsack import Numbers, keep_augmented, keep_exactly
from dilap.models.cut import Parameters
from dilap.models.network import takes_tokens
from dilap.search.method import Pruned
from dilap.search.network_task import NetworkTask, Scores

_OF_FIRST_LAYER = 10_000.0  # the importance of each of its units


@dataclass(frozen=True, kw_only=True)
class Halp:
    """HALP with the settings of its authors: `rounds`, each after `steps` batches of training.

    `scale` is the share of these steps that is taken, one a round at least: on a CPU, all of them take hours. `rate` is
    the learning rate of a batch of 1,024 images, and lower in proportion for those of `batch_size`. The `knapsack` is
    the authors' own, or finds the best choice exactly.
    """

    rounds: int = 30
    steps: int = 40
    scale: float = 1.0
    batch_size: int = 32
    rate: float = 1.024
    knapsack: Literal["augmented", "exact"] = "augmented"

    def __call__(self, task: NetworkTask) -> Pruned[Network]:
        if takes_tokens(task.model):
            raise Unsupported("HALP prunes networks of images, and this one takes texts: choose another method")
        limit, trained = task.cost_limit, list[_Trained]()

        def choose(allowed: float) -> Pruned[Network]:
            # Where the limit is corrected, the last choice is made again, and all rounds only where it has too little
            # left to choose from.
            if not trained or allowed > limit.cost(trained[-1].plan):
                trained.append(self._trained(task, allowed))
            return self._last_choice(task, trained[-1], allowed)

        return limit.meet(
            choose,
            cost=lambda pruned: limit.cost(pruned.plan),
            architecture=lambda pruned: pruned.plan.pruned_architecture(),
        )

    def _trained(self, task: NetworkTask, limit: float) -> "_Trained":
        """Return the network after the training of the last round."""
        steps = max(1, round(self.scale * self.steps))
        training = HalpTraining(task, batch_size=self.batch_size, rate=self.rate, steps=self.rounds * steps)
        plan = full_plan(task.network, base=task.base)
        dense, importance = task.cost_limit.cost(plan), training.run(steps)
        for number in range(1, self.rounds):
            plan = self.selected(task, plan, importance, budget=dense * (limit / dense) ** (number / self.rounds))
            training.remove(plan)
            importance = training.run(steps)
        return _Trained(plan=plan, importance=importance, parameters=training.tensors())

    def _last_choice(self, task: NetworkTask, trained: "_Trained", limit: float) -> Pruned[Network]:
        """Return the network with what the last round keeps. Raises Infeasible where that does not keep the limit."""
        plan = self.selected(task, trained.plan, trained.importance, budget=limit)
        if (cost := task.cost_limit.cost(plan)) > limit:
            raise Infeasible(f"the smallest plan takes {cost / limit:.1%} of what is allowed; HALP cannot prune more")
        return Pruned(plan=plan, parameters=trained.parameters)

    def selected(self, task: NetworkTask, plan: Plan[Network], importance: Scores, *, budget: float) -> Plan[Network]:
        """Return the plan of the most important units of `plan` within a budget, by what chunks take beside them."""
        groups = [_Chunks.of(task, plan, group, importance[group.name]) for group in task.network.groups]
        spare = budget - task.cost_limit.cost(plan) + sum(float(one.costs.sum()) for one in groups)
        keep = keep_exactly if self.knapsack == "exact" else keep_augmented
        numbers = keep([one.values for one in groups], [one.costs for one in groups], budget=max(spare, 0.0))
        kept = {one.group.name: one.kept(number) for one, number in zip(groups, numbers, strict=True)}
        return Plan(base=task.base, architecture=task.network, kept=kept)


@dataclass(frozen=True, kw_only=True)
class _Trained:
    """The plan before the last round's choice, and the importance of units and the tensors after its training."""

    plan: Plan[Network]
    importance: Scores
    parameters: Parameters


@dataclass(frozen=True, kw_only=True)
class _Chunks:
    """The units that are left of a group in chunks, the most important one first.

    `units` are all of them in that order, `ends` how many there are up to the end of every chunk, and `values` and
    `costs` those of all chunks but the first one, which stays.
    """

    group: Group
    units: torch.Tensor
    ends: tuple[int, ...]
    values: Numbers
    costs: Numbers

    @staticmethod
    def of(task: NetworkTask, plan: Plan[Network], group: Group, importance: torch.Tensor) -> "_Chunks":
        left = torch.tensor(plan.kept[group.name])
        sources = _sources(task.network, group)
        costs = task.require_costs()
        scores, order = importance[left].double().sort(descending=True, stable=True)
        if task.network.layers[0] in sources:
            scores = torch.full_like(scores, _OF_FIRST_LAYER)
        ends = (*(width for width in task.widths(group) if width < len(left)), len(left))
        taken = [sum(costs.layer(one.name, {**plan.counts, group.name: end}) for one in sources) for end in ends]
        return _Chunks(
            group=group,
            units=left[order],
            ends=ends,
            values=np.diff(scores.cumsum(0).numpy()[[end - 1 for end in ends]]),
            costs=np.diff(taken),
        )

    def kept(self, number: int) -> tuple[int, ...]:
        """Return the units of the first chunk and `number` others."""
        return tuple(self.units[: self.ends[number]].sort().values.tolist())


def _sources(network: Network, group: Group) -> list[Layer]:
    """Return the layers that give the channels of a group."""
    places = {(one.tensor, one.axis) for one in group.members}
    return [layer for layer in network.layers if (layer.weight, layer.outputs_axis) in places]

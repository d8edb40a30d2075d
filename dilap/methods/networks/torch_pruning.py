"""torch-pruning's own pruner at our limit: its groups, its importance, its choice of channels.

Fang et al., DepGraph: Towards Any Structural Pruning (arXiv 2301.12900); the package is MIT-licensed. It is asked for
ratios until the plan that its choice makes keeps the limit.
"""

import copy
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch_pruning
from torch import nn

from dilap.core.errors import Unsupported
from dilap.core.graph import Network
from dilap.core.groups import Group
from dilap.core.plan import Plan, full_plan
from dilap.methods.networks.scores import by_unit, filters_of
from dilap.models.network import batches_of, outputs_of
from dilap.search.network_task import NetworkTask

# Its arguments whose defaults are dictionaries into which every pruner writes.
_SHARED = ("in_channel_groups", "out_channel_groups", "num_heads")
_STEPS = 100  # ratios that are tried


@dataclass(frozen=True, kw_only=True)
class TorchPruning:
    """The pruner with the defaults of its authors: L2 norms of whole groups, the same share of every group.

    `global_pruning` ranks the channels of all groups together.
    """

    norm: Literal["1", "2"] = "2"
    global_pruning: bool = False

    def __call__(self, task: NetworkTask) -> Plan[Network]:
        # One ratio after another: the pruner leaves a group whole of which it would remove all.
        return task.cost_limit.first(self.plans(task, [step / _STEPS for step in range(_STEPS)]))

    def plans(self, task: NetworkTask, ratios: Iterable[float]) -> Iterator[Plan[Network]]:
        """Yield the plans that remove what the pruner removes when it is asked for these shares of the channels."""
        model = copy.deepcopy(task.model).requires_grad_(True)
        names = {module: name for name, module in model.named_modules()}
        plan = full_plan(task.network, base=task.base)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pruner = self._pruner(task, model)
        for ratio in ratios:
            pruner.per_step_pruning_ratio, pruner.current_step = [0.0, ratio], 0
            gone: dict[str, list[int]] = {}
            for group in pruner.step(interactive=True):
                for dependency, indices in group:
                    name = names.get(dependency.target.module)
                    if name is not None and pruner.DG.is_out_channel_pruning_fn(dependency.handler):
                        gone.setdefault(f"{name}.weight", []).extend(indices)
            yield replace(plan, kept={group.name: _left(task, group, gone) for group in task.network.groups})

    def _pruner(self, task: NetworkTask, model: nn.Module) -> Any:
        cut = {one.tensor for group in task.network.groups for one in filters_of(task.network, group)}
        return torch_pruning.pruner.BasePruner(
            model,
            next(batches_of(task.images, 2, model=model)),
            importance=torch_pruning.importance.GroupMagnitudeImportance(p=int(self.norm)),
            global_pruning=self.global_pruning,
            ignored_layers=[model.get_submodule(one.name) for one in task.network.layers if one.weight not in cut],
            round_to=task.multiple,
            forward_fn=outputs_of,
            **{name: {} for name in _SHARED},
        )


def _left(task: NetworkTask, group: Group, gone: Mapping[str, Sequence[int]]) -> tuple[int, ...]:
    """Return the units that are left, the first one where none are; more where kernels are fuller so.

    Raises Unsupported where only parts of units are left.
    """
    filters = filters_of(task.network, group)[0]
    stays = torch.ones(task.network.size(filters.tensor, filters.axis))
    whole = by_unit(stays, filters)
    stays[list(gone.get(filters.tensor, ()))] = 0
    left = by_unit(stays, filters)
    if ((left > 0) & (left < whole)).any():
        raise Unsupported(
            f"torch-pruning narrows each of the groups that {group.name} gives channels to, and here they are removed"
            " whole: choose another method"
        )
    order = left.argsort(descending=True, stable=True)
    return tuple(order[: task.rounded(group, int((left > 0).sum()))].sort().values.tolist())

"""The training that HALP prunes in: SGD on the classes, while the units that were removed stay zeros.

The authors train on ImageNet with its labels, in batches of 1,024. Pruning takes the first of 90 epochs, in which the
learning rate has risen to 12 % of its highest. The other epochs are what all methods are given as their recovery, and
here the training ends with the pruning. Without labels, the classes that the dense network predicts take their place.
"""

import copy
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from dilap.core.graph import Network
from dilap.core.groups import Member, indices_kept
from dilap.core.plan import Plan
from dilap.methods.networks.scores import by_unit, over_axis
from dilap.methods.networks.taylor import gates_of
from dilap.models.compute_device import HOST
from dilap.models.convolutional.cut import tensors_of
from dilap.models.distil_network import cropped
from dilap.models.network import evaluating, outputs_of
from dilap.search.network_task import NetworkTask, Scores

_BATCH = 1024  # images in a batch of the authors
_REACHED = 30 * 40 / (8 * 1251)  # of the highest rate, by 30 rounds of 40 steps in a warm-up of 8 epochs of ImageNet
_MOMENTUM, _WEIGHT_DECAY, _SMOOTHING, _LEAST_AREA = 0.875, 3.05e-5, 0.1, 0.08


class HalpTraining:
    """A copy of a task's network in training, of which units are removed; there will be so many `steps`."""

    def __init__(self, task: NetworkTask, *, batch_size: int, rate: float, steps: int) -> None:
        self._task, self._size = task, min(batch_size, len(task.images))
        self._model = copy.deepcopy(task.model).float().requires_grad_(True).train()
        self._parameters = dict(self._model.named_parameters())
        self._gates = {group.name: gates_of(self._model, task.network, group) for group in task.network.groups}
        vectors = [one for one in self._parameters.values() if one.dim() <= 1]  # of norms, and biases
        matrices = [one for one in self._parameters.values() if one.dim() > 1]
        groups: list[dict[str, Any]] = [{"params": matrices, "weight_decay": _WEIGHT_DECAY}, {"params": vectors}]
        self._sgd = torch.optim.SGD(groups, lr=_REACHED * rate * self._size / _BATCH, momentum=_MOMENTUM)
        self._schedule = torch.optim.lr_scheduler.LambdaLR(self._sgd, lambda step: (step + 1) / steps)
        self._draw = np.random.default_rng(task.seed)
        self._stays: list[tuple[torch.Tensor, torch.Tensor]] = []  # tensors, and 1 for what stays in them, 0 elsewhere

    def run(self, steps: int) -> Scores:
        """Train for so many batches, and return the importance of every unit in their mean.

        It is the absolute sum, over scale and shift of the unit in its batch norms, of parameter times gradient, or
        without a batch norm over the weights of its filters. A batch whose loss is no number changes nothing.
        """
        found = {group.name: torch.zeros(group.num_units) for group in self._task.network.groups}
        for _ in range(steps):
            self._sgd.zero_grad()
            loss = self._loss()
            loss.backward()
            if math.isfinite(float(loss.detach())):
                for name, gates in self._gates.items():
                    found[name] += torch.stack([self._change(one) for one in gates]).sum(0).abs() / steps
                self._sgd.step()
                self._schedule.step()
                self._zero()
        return found

    def _loss(self) -> torch.Tensor:
        dense, labels = self._task.model, self._task.labels
        weight = next(dense.parameters())
        rows = self._draw.permutation(len(self._task.images))[: self._size]
        crops = cropped(self._task.images[rows].astype(np.float32, copy=False), self._draw, _LEAST_AREA)
        crops = crops.to(weight.device)
        if labels is None:
            with evaluating(dense), torch.no_grad():
                classes = outputs_of(dense, crops.to(weight.dtype))[0].argmax(1)
        else:
            classes = torch.tensor([labels[row] for row in rows], device=weight.device)
        return functional.cross_entropy(outputs_of(self._model, crops)[0], classes, label_smoothing=_SMOOTHING)

    def _change(self, gate: Member) -> torch.Tensor:
        """Return by how much every unit changes the loss through one tensor, to first order."""
        parameter = self._parameters[gate.tensor]
        assert parameter.grad is not None
        return by_unit(over_axis(parameter.detach() * parameter.grad, gate.axis), gate).to(HOST)

    def remove(self, plan: Plan[Network]) -> None:
        """Make zeros of the units that a plan does not keep, and keep them zeros."""
        tensors, self._stays = tensors_of(self._model), []
        for (name, axis), indices in indices_kept(self._task.network.groups, plan.kept).items():
            tensor = tensors[name]
            stays = torch.zeros(tensor.shape[axis], device=tensor.device)
            stays[torch.from_numpy(indices).to(tensor.device)] = 1
            self._stays.append((tensor, stays.view([-1 if one == axis else 1 for one in range(tensor.dim())])))
        self._zero()

    @torch.no_grad()
    def _zero(self) -> None:
        for tensor, stays in self._stays:
            tensor.mul_(stays)

    def tensors(self) -> Mapping[str, torch.Tensor]:
        """Return the parameters and buffers as they are trained, in the dense shape."""
        found = tensors_of(self._model).items()
        return {name: tensor.detach().clone() for name, tensor in found if tensor.is_floating_point()}

"""Apply a plan to a network of any layers: the channels that stay are put into smaller tensors."""

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import nn
from transformers import PreTrainedModel

from dilap.core.errors import Mismatch
from dilap.core.graph import Branch, Network
from dilap.core.groups import Kept, indices_kept
from dilap.core.plan import Plan
from dilap.models.convolutional.describe import describe_
from dilap.models.convolutional.narrowing import remove_modules_
from dilap.models.cut import Parameters, cut_

_NONE: Parameters = MappingProxyType({})


def shrink_network_(model: nn.Module, plan: Plan[Network], *, parameters: Parameters = _NONE) -> nn.Module:
    """Cut `model` in place to the units that `plan` keeps, and return it.

    `parameters` are new values of tensors; what belongs to removed units is cut off. Raises Mismatch when the plan is
    for another network.
    """
    network = plan.architecture
    own, planned = {name: tuple(one.shape) for name, one in tensors_of(model).items()}, network.tensors
    if odd := next((name for name in [*own, *planned] if own.get(name) != planned.get(name)), None):
        raise Mismatch(
            f"the plan is for another network: tensor {odd} is {own.get(odd)} here, {planned.get(odd)} there"
        )
    cut_network_(model, network, plan.kept, parameters=parameters)
    if isinstance(model, PreTrainedModel):
        describe_(model)
    return model


@torch.no_grad()
def cut_network_(model: nn.Module, network: Network, kept: Kept, *, parameters: Parameters = _NONE) -> nn.Module:
    """Cut `model` in place to the units that `kept` names, all of a group that it does not name, and return it."""
    gone = [branch for branch in network.branches if len(kept.get(branch.groups[0], (0,))) == 0]
    indices = indices_kept(network.groups, kept)
    for branch in gone:
        if (outputs := indices.get((f"{branch.last}.weight", 0))) is not None:
            indices[f"{branch.last}.bias", 0] = outputs
        remove_modules_(model, branch.modules, {branch.last: constant_of(model, branch)})
    left = tensors_of(model)
    stays = {place: one for place, one in indices.items() if place[0] in left}
    cut_(model, stays, values={name: value for name, value in parameters.items() if name in left})
    return model


def constant_of(model: nn.Module, branch: Branch) -> torch.Tensor:
    """Return what a residual branch adds at every position when its last layer has no inputs."""
    last = model.get_submodule(branch.last)
    weight, bias = last.get_parameter("weight"), getattr(last, "bias", None)
    value = weight.new_zeros(len(weight)) if bias is None else bias.detach().clone()
    if branch.norm:
        norm = model.get_submodule(branch.norm)
        assert isinstance(norm, nn.BatchNorm2d)
        shape = (1, -1, 1, 1)
        value = nn.functional.batch_norm(
            value.view(shape), norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps
        ).flatten()
    return value


def tensors_of(model: nn.Module) -> Mapping[str, torch.Tensor]:
    """Return all parameters and buffers by name, those that several modules share once."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}

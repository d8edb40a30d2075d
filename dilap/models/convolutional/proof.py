"""Prove the groups of a network: a stand-in with random weights, cut, computes what the masked one computes.

The dependency graph takes operations that it does not know for ones that treat every channel by itself. Where that is
wrong (a norm over channels written out in `forward`, a reshape to a fixed size), the cut network computes something
else, or nothing at all.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from dilap.core.errors import reason_of
from dilap.core.graph import Branch, Network
from dilap.core.groups import Kept, indices_kept
from dilap.models.convolutional.cut import cut_network_

Call = Callable[[nn.Module, torch.Tensor], Sequence[torch.Tensor]]
_TOLERANCE = 1e-8  # of the largest output: the stand-in computes in f64, where sums in another order differ by 1e-13


@torch.no_grad()
def stand_in(model: nn.Module, *, seed: int = 0) -> nn.Module:
    """Return a copy in f64 whose weights are random, so that no channel has no effect, and its batch norms are used."""
    made = copy.deepcopy(model).double().eval().requires_grad_(True)
    generator = torch.Generator().manual_seed(seed)
    for parameter in made.parameters():
        value = torch.rand(parameter.shape, generator=generator, dtype=torch.float64)
        if parameter.ndim > 1:  # keeps the size of what passes through
            value = (value - 0.5) * (12 / max(1, parameter[0].numel())) ** 0.5
        parameter.data = value if parameter.ndim > 1 else value + 0.5
    for name, buffer in made.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
    return made


class Proof:
    """Cuts and masks a stand-in of a network, and compares what they compute of one example."""

    def __init__(self, model: nn.Module, example: torch.Tensor, call: Call) -> None:
        self._model, self._example, self._call = model, example, call

    def proven(self, network: Network) -> tuple[Network, Mapping[str, str]]:
        """Return the network with the groups and branches that can be cut, and why each of the others cannot."""
        refusals: dict[str, str] = {}
        if self._refusal(network, halves(network)):
            refusals = {
                group.name: reason
                for group in network.groups
                if (reason := self._refusal(network, halves(replace(network, groups=(group,), branches=()))))
            }
        groups = tuple(group for group in network.groups if group.name not in refusals)
        possible = [one for one in network.branches if refusals.keys().isdisjoint(one.groups)]
        narrowed = replace(network, groups=groups, branches=tuple(possible))
        if possible and self._refusal(narrowed, without(narrowed, possible)):
            possible = [one for one in possible if not self._refusal(narrowed, without(narrowed, [one]))]
        return replace(narrowed, branches=tuple(possible)), refusals

    def _refusal(self, network: Network, kept: Kept) -> str:
        """Return why the network cannot be cut to these units; empty where it can."""
        masked = masked_(copy.deepcopy(self._model), network, kept)
        try:
            found = self._outputs(cut_network_(copy.deepcopy(self._model), network, kept))
        except Exception as error:  # any that `forward` raises for sizes that it does not expect
            return f"cannot be cut: {reason_of(error)}"
        for one, wanted in zip(found, self._outputs(masked), strict=True):
            if one.shape != wanted.shape or not _is_close(one, wanted):
                return "cannot be cut: the other channels would change"
        return ""

    @torch.no_grad()
    def _outputs(self, model: nn.Module) -> list[torch.Tensor]:
        return [one.detach() for one in self._call(model, self._example)]


def _is_close(one: torch.Tensor, wanted: torch.Tensor) -> bool:
    return bool((one - wanted).abs().max() <= _TOLERANCE * wanted.abs().max())


def halves(network: Network, *, seed: int = 0) -> dict[str, tuple[int, ...]]:
    """Return a random half of the units of every group, at least one."""
    generator = np.random.default_rng(seed)
    kept = {}
    for group in network.groups:
        chosen = generator.permutation(group.num_units)[: max(1, group.num_units // 2)]
        kept[group.name] = tuple(sorted(chosen.tolist()))
    return kept


def without(network: Network, branches: Sequence[Branch]) -> dict[str, tuple[int, ...]]:
    """Return all units but those of some branches."""
    gone = {name for branch in branches for name in branch.groups}
    return {group.name: () if group.name in gone else tuple(range(group.num_units)) for group in network.groups}


@torch.no_grad()
def masked_(model: nn.Module, network: Network, kept: Kept) -> nn.Module:
    """Let no layer of `model` read a channel of a removed unit, in place, and return it; its shapes stay."""
    parameters = dict(model.named_parameters())
    inputs = {layer.weight: 0 if layer.kind == "transposed" else 1 for layer in network.layers if layer.num_groups == 1}
    for (tensor, axis), stays in indices_kept(network.groups, kept).items():
        if inputs.get(tensor) == axis:
            mask = torch.ones(parameters[tensor].shape[axis], dtype=torch.bool)
            mask[torch.from_numpy(stays)] = False
            parameters[tensor].data = parameters[tensor].detach().index_fill(axis, mask.nonzero().squeeze(1), 0)
    return model

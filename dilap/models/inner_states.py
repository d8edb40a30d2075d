"""What a pruned network computes on the way to its outputs, beside what the dense network does there."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from dilap.core.graph import Layer, Network
from dilap.core.groups import Group, indices_kept
from dilap.core.plan import Plan

_LEAST = 0.01  # share of the mean square that a variance is taken to have: channels may be alike everywhere
_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True, kw_only=True)
class State:
    """What a layer takes in, with its channels on `axis`, and which of the dense layer's the pruned one still has."""

    layer: str
    axis: int
    channels: NDArray[np.int64]


def states_of(plan: Plan[Network]) -> tuple[State, ...]:
    """Return what the last layer that reads a group takes in, for every group that the pruned network has.

    Where residual branches add to the same channels, that is what all of them together give.
    """
    pruned, indices = plan.pruned_architecture(), indices_kept(plan.architecture.groups, plan.kept)
    readers = {reader.name: reader for group in pruned.groups for reader in _readers(pruned, group)[-1:]}
    return tuple(
        State(
            layer=one.name,
            axis=-1 if one.kind == "linear" else 1,
            channels=indices[one.weight, _inputs_axis(one)],
        )
        for one in readers.values()
    )


def _readers(network: Network, group: Group) -> list[Layer]:
    """Return the layers that take in the channels of a group, without those whose outputs these are as well."""
    places = {(one.tensor, one.axis) for one in group.members}
    return [one for one in network.layers if one.num_groups == 1 and (one.weight, _inputs_axis(one)) in places]


def _inputs_axis(layer: Layer) -> int:
    return 1 - layer.outputs_axis


@contextmanager
def inputs_seen(model: nn.Module, states: tuple[State, ...]) -> Iterator[Mapping[str, torch.Tensor]]:
    """Yield a mapping that has, after every run of a model, what the layers of `states` took in, by their names."""
    seen: dict[str, torch.Tensor] = {}
    hooks = [model.get_submodule(one.layer).register_forward_pre_hook(partial(_see, seen, one.layer)) for one in states]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _see(seen: dict[str, torch.Tensor], layer: str, _: nn.Module, inputs: tuple[Any, ...]) -> None:
    seen[layer] = inputs[0]


def states_apart(
    states: tuple[State, ...], found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]
) -> list[torch.Tensor]:
    """Return the `relative_error` of every state."""
    return [relative_error(found[one.layer], _left(wanted[one.layer], one), axis=one.axis) for one in states]


def _left(wanted: torch.Tensor, state: State) -> torch.Tensor:
    """Return those channels of what the dense layer takes in that the pruned one still has."""
    return wanted.index_select(state.axis, torch.from_numpy(state.channels).to(wanted.device))


def relative_error(found: torch.Tensor, wanted: torch.Tensor, *, axis: int) -> torch.Tensor:
    """Return the mean square of the differences as a share of the mean variance of channels, which lie on `axis`."""
    wanted = wanted.float()
    others = [other for other in range(wanted.dim()) if other != axis % wanted.dim()]
    variance = (wanted - wanted.mean(others, keepdim=True)).square().mean()
    return (found - wanted).square().mean() / variance.clamp_min(_LEAST * wanted.square().mean() + _TINY)

"""The layers that read the units of a network's groups, and what passes through them.

Without a unit, all layers that read it lack some of their inputs: whatever a smaller network computes otherwise comes
from the weights of these layers. Here every such layer is a matrix (outputs x inputs) that is applied at many
positions. The inputs of a convolution are those under its kernel (channels x kernel); a transposed convolution gives
outputs under its kernel.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from dilap.core.graph import Layer, Network
from dilap.core.groups import Member

_CONVOLUTION = ("input", "weight", "bias", "stride", "padding", "dilation")
_TRANSPOSED = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
_ARGUMENTS: Mapping[Any, tuple[str, ...]] = {
    functional.linear: ("input", "weight", "bias"),
    functional.conv1d: _CONVOLUTION,
    functional.conv2d: _CONVOLUTION,
    functional.conv_transpose1d: _TRANSPOSED,
    functional.conv_transpose2d: _TRANSPOSED,
}


@dataclass(frozen=True, kw_only=True)
class Reader:
    """A layer that reads the units of a group; `columns` are what every unit is of its inputs (units x inputs)."""

    layer: Layer
    columns: torch.Tensor


def readers_of(network: Network) -> dict[str, list[Reader]]:
    """Return the layers that read the units of every group, by the groups' names, in the network's order."""
    found: dict[str, list[Reader]] = {group.name: [] for group in network.groups}
    for layer in network.layers:
        axis, area = 1, prod(network.tensors[layer.weight][2:])
        if layer.num_groups > 1:
            continue
        if layer.kind == "transposed":
            axis, area = 0, 1
        for group in network.groups:
            places = [one for one in group.members if (one.tensor, one.axis) == (layer.weight, axis)]
            if places:
                entries = torch.cat([_entries(one) for one in places], 1)
                columns = (entries[..., None] * area + torch.arange(area)).flatten(1)
                found[group.name].append(Reader(layer=layer, columns=columns))
    return found


def _entries(member: Member) -> torch.Tensor:
    """Return the entries of a member's axis that every unit is (units x entries of a unit)."""
    grid = torch.arange(member.span.start, member.span.stop).reshape(member.grid)
    return grid.movedim(member.dimension, 0).reshape(member.grid[member.dimension], -1)


def matrix_of(weight: torch.Tensor, layer: Layer) -> torch.Tensor:
    """Return the matrix of a layer (outputs x inputs), given its weights."""
    return weight.flatten(1).T if layer.kind == "transposed" else weight.flatten(1)


def weight_of(matrix: torch.Tensor, layer: Layer, shape: torch.Size) -> torch.Tensor:
    """Return the weights of a layer in their shape, given its matrix."""
    return (matrix.T if layer.kind == "transposed" else matrix).reshape(shape)


@dataclass(frozen=True, kw_only=True)
class Passage:
    """One time that examples pass through a layer. `output` is part of the graph that gradients go back through."""

    layer: Layer
    arguments: Mapping[str, Any]
    output: torch.Tensor

    def inputs(self, count: int) -> torch.Tensor:
        """Return the inputs of the layer's matrix for so many examples (examples x inputs x positions)."""
        given = self.arguments["input"].detach()
        if self.layer.kind == "linear":
            return _by_example(given.reshape(-1, given.shape[-1], 1), count)
        return _by_example(given.flatten(2) if self.layer.kind == "transposed" else self._patches(given), count)

    def gradients(self, gradient: torch.Tensor, count: int) -> torch.Tensor:
        """Return the gradients at the outputs of the layer's matrix (examples x outputs x positions)."""
        if self.layer.kind == "linear":
            return _by_example(gradient.reshape(-1, gradient.shape[-1], 1), count)
        return _by_example(self._patches(gradient) if self.layer.kind == "transposed" else gradient.flatten(2), count)

    def _patches(self, given: torch.Tensor) -> torch.Tensor:
        """Return what lies under the kernel at every position (images x channels and kernel x positions)."""
        kernel = self.arguments["weight"].shape[2:]
        stride, dilation = (_sizes(self.arguments.get(name, 1), kernel) for name in ("stride", "dilation"))
        padding = self.arguments.get("padding", 0)
        if isinstance(padding, str):
            spans = [each * (size - 1) if padding == "same" else 0 for each, size in zip(dilation, kernel, strict=True)]
            sides = [(span // 2, span - span // 2) for span in spans]
        else:
            sides = [(size, size) for size in _sizes(padding, kernel)]
        padded = functional.pad(given, [size for both in reversed(sides) for size in both])
        if len(kernel) == 1:
            padded, kernel = padded.unsqueeze(2), (1, *kernel)
            stride, dilation = (1, *stride), (1, *dilation)
        return functional.unfold(padded, tuple(kernel), dilation=dilation, stride=stride)


def _sizes(value: Any, kernel: Any) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, tuple | list) else (value,) * len(kernel)


def _by_example(values: torch.Tensor, count: int) -> torch.Tensor:
    """Return values of examples one by one (examples x channels x positions), where some come several times each."""
    if len(values) == count:
        return values
    return values.reshape(count, -1, *values.shape[1:]).movedim(1, 2).flatten(2)


class Passing(TorchFunctionMode):
    """While it is entered, keeps what passes through layers, in the order in which they run.

    Gradients are those at the outputs of the layers, which begin a graph of their own where the network's weights have
    no gradients.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, Layer], *, with_gradients: bool = False) -> None:
        super().__init__()
        self._layers = {id(model.get_parameter(one.weight)): one for one in layers.values()}
        self._with_gradients = with_gradients
        self.passages: list[Passage] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        output = func(*args, **given)
        if func not in _ARGUMENTS:
            return output
        arguments = dict(zip(_ARGUMENTS[func], args, strict=False)) | given
        layer = self._layers.get(id(arguments["weight"]))
        if layer is None:
            return output
        if self._with_gradients and not output.requires_grad:
            output.requires_grad_(True)
        self.passages.append(Passage(layer=layer, arguments=arguments, output=output))
        # A copy, because what follows may work in place.
        return output.clone() if self._with_gradients else output


@torch.no_grad()
def norms_behind(model: nn.Module, layers: Mapping[str, Layer], run: Callable[[], Any]) -> dict[str, str]:
    """Return the batch norms that take the outputs of layers, by the layers' names; `run` runs the model once."""
    outputs: list[tuple[str, torch.Tensor]] = []
    found: dict[str, str] = {}

    def see_layer(name: str, output: Any) -> None:
        outputs.append((name, output))

    def see_norm(name: str, taken: Any) -> None:
        found.update({layer: name for layer, output in outputs if output is taken})

    hooks = []
    for name, module in model.named_modules():
        if name in layers:
            hooks.append(module.register_forward_hook(lambda _, __, output, name=name: see_layer(name, output)))
        elif isinstance(module, _BatchNorm):
            hooks.append(module.register_forward_pre_hook(lambda _, inputs, name=name: see_norm(name, inputs[0])))
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return found

"""Find out the shape of a network by running it: its layers, the groups that can be cut, its residual branches."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from dilap.core.errors import InvalidInput, Unsupported, reason_of
from dilap.core.graph import Branch, Layer, Network
from dilap.core.groups import Group
from dilap.models.convolutional.branches import branches_of
from dilap.models.convolutional.cut import tensors_of
from dilap.models.convolutional.dependencies import OF_OUTPUTS, Dependencies
from dilap.models.convolutional.encoders import LAYERS, encoder_parts
from dilap.models.convolutional.groups import grouped
from dilap.models.convolutional.proof import Proof, stand_in
from dilap.models.network import outputs_of, random_examples, takes_tokens


@dataclass(frozen=True, kw_only=True)
class Traced:
    """The shape of a network, and for each layer whose outputs no group holds the reason, in words after its name."""

    network: Network
    refusals: Mapping[str, str]


def traced(model: nn.Module, *, input_size: Sequence[int], name: str) -> Traced:
    """Return the shape of `model` for inputs of a size: (channels, height, width), or (3, tokens) of a text.

    Nothing is computed with the model's own weights, and it stays as it is. Raises InvalidInput where the model does
    not take such inputs, Unsupported where no channel of it can be removed.
    """
    probe = stand_in(model)
    example = random_examples(probe, input_size, 2)
    example = example.double() if example.is_floating_point() else example
    sizes = _Sizes(probe, example, name)
    found = _of_encoder(probe, sizes, name) or _in_graph(probe, example, sizes, name)
    network = Network(
        name=name,
        input_size=tuple(input_size),
        tensors={tensor: tuple(value.shape) for tensor, value in tensors_of(probe).items()},
        layers=found.layers,
        groups=found.groups,
        branches=found.branches,
        buffers=tuple(tensor for tensor, _ in probe.named_buffers()),
    )
    network, unproven = Proof(probe, example, outputs_of).proven(network)
    refusals = {**unproven, **found.refusals}
    if not network.groups:
        inner = [one for one in refusals.items() if one[1] != OF_OUTPUTS]
        layer, reason = next(iter(inner), ("it", "has no layer within whose outputs are several channels"))
        raise Unsupported(f"network {name}: no channel can be removed; for example, {layer} {reason}")
    return Traced(network=network, refusals=refusals)


@dataclass(frozen=True, kw_only=True)
class _Parts:
    """The layers of a network, what can go in it by its family or its graph, and why other layers lose nothing."""

    layers: tuple[Layer, ...]
    groups: tuple[Group, ...]
    branches: tuple[Branch, ...]
    refusals: Mapping[str, str]


def _of_encoder(probe: nn.Module, sizes: "_Sizes", name: str) -> _Parts | None:
    """Return the parts of an encoder of a known family; None where a network has to be traced."""
    found = encoder_parts(probe)
    if found is None:
        if takes_tokens(probe):
            known = ", ".join(sorted(one.removesuffix("Layer") for one in LAYERS))
            raise Unsupported(
                f"network {name}: {type(probe).__name__} is no encoder that can be cut; known are {known}"
            )
        return None
    layers = [
        replace(one, num_attended=one.num_positions) if one.name in found.attention else one for one in sizes.layers
    ]
    return _Parts(layers=tuple(layers), groups=found.groups, branches=found.branches, refusals={})


def _in_graph(probe: nn.Module, example: torch.Tensor, sizes: "_Sizes", name: str) -> _Parts:
    try:
        found = Dependencies(probe, example, outputs_of)
    except Exception as error:  # torch-pruning raises many types for graphs that it cannot follow
        raise Unsupported(f"network {name}: its layers cannot be traced: {reason_of(error)}") from error
    made = grouped(found.units(), {layer.name: (layer.weight, layer.outputs_axis) for layer in sizes.layers})
    branches = branches_of(found, made.groups, sizes.crops)
    return _Parts(layers=sizes.layers, groups=made.groups, branches=branches, refusals=made.refusals)


class _Sizes:
    """The layers of a network in the order in which they run, and the rows and columns that its modules take off."""

    def __init__(self, model: nn.Module, example: torch.Tensor, name: str) -> None:
        self.crops: dict[str, tuple[int, ...]] = {}
        self._names = {module: path for path, module in model.named_modules()}
        self._sizes: dict[nn.Module, list[tuple[int, ...]]] = defaultdict(list)
        hooks = [module.register_forward_hook(self._see) for module in model.modules()]
        try:
            with torch.no_grad():
                outputs = outputs_of(model, example)
        except Exception as error:  # any that a user's own `forward` raises
            size = f"{example.shape[-1]} tokens" if takes_tokens(model) else "x".join(map(str, example.shape[1:]))
            raise InvalidInput(f"network {name} takes no input of {size}: {reason_of(error)}") from error
        finally:
            for hook in hooks:
                hook.remove()
        if not outputs:
            raise InvalidInput(f"network {name} gives no tensor of numbers for its input")
        self.layers = tuple(_layer(self._names[one], one, tuple(sizes)) for one, sizes in self._sizes.items())
        own = tensors_of(model)
        if odd := next((layer.name for layer in self.layers if layer.weight not in own), None):
            raise Unsupported(
                f"network {name}: layer {odd} makes its weights of other tensors; give it plain ones first"
                " (torch.nn.utils.parametrize.remove_parametrizations)"
            )

    def _see(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if not isinstance(output, torch.Tensor) or not inputs or not isinstance(inputs[0], torch.Tensor):
            return
        if isinstance(module, nn.Linear):
            self._sizes[module].append(tuple(output.shape[1:-1]))
        elif isinstance(module, _ConvNd):
            self._sizes[module].append(tuple(output.shape[2:]))
            crop = tuple(before - after for before, after in zip(inputs[0].shape[2:], output.shape[2:], strict=True))
            if any(crop):
                self.crops[self._names[module]] = crop


def _layer(name: str, module: nn.Module, output_sizes: tuple[tuple[int, ...], ...]) -> Layer:
    if not isinstance(module, _ConvNd):
        return Layer(name=name, kind="linear", output_sizes=output_sizes)
    return Layer(
        name=name,
        kind="transposed" if module.transposed else "convolution",
        stride=tuple(module.stride),
        num_groups=module.groups,
        output_sizes=output_sizes,
    )

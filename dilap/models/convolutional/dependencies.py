"""Which channels of which tensors of a network must go together, by torch-pruning's dependency graph.

The graph has a node for every layer and every operation between layers, and edges that carry an index of a channel from
one side of a node to a side of another. All that is connected by edges is one unit: whatever loses one of its channels
must lose all of them.
"""

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch_pruning
from numpy.typing import NDArray
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

Place = tuple[str, int]  # a tensor's name and one of its axes
_BY_CHANNEL = (nn.GroupNorm, nn.LayerNorm, _NormBase, nn.PReLU)  # all their tensors have an entry for every channel
_SIZES = (  # the attributes that have the number of inputs, and of outputs
    (_ConvNd, "in_channels", "out_channels"),
    (nn.Linear, "in_features", "out_features"),
    (nn.GroupNorm, "num_channels", "num_channels"),
    (_NormBase, "num_features", "num_features"),
    (nn.PReLU, "num_parameters", "num_parameters"),
)
OF_OUTPUTS = "gives what the network gives"
_BITS = 32  # of an index within a number that says the side of a node as well


@dataclass(frozen=True, kw_only=True)
class Unit:
    """Channels that must go together: for every tensor and axis on which they lie their indices, ascending.

    `refusal` says why they cannot go at all; it is empty where they can.
    """

    pieces: Mapping[Place, tuple[int, ...]]
    refusal: str = ""


class Dependencies:
    """The dependency graph of a network for one example of its input.

    `call` runs a network and returns all tensors that it gives.
    """

    def __init__(
        self, model: nn.Module, example: torch.Tensor, call: Callable[[nn.Module, torch.Tensor], Sequence[torch.Tensor]]
    ) -> None:
        roots: list[Any] = []

        def forward(traced: nn.Module, inputs: torch.Tensor) -> list[torch.Tensor]:
            outputs = list(call(traced, inputs))
            roots.extend(one.grad_fn for one in outputs)
            return outputs

        self.names: Mapping[object, str] = {module: name for name, module in model.named_modules()}
        self._parameters = {parameter: name for name, parameter in model.named_parameters()}
        self._graph = torch_pruning.DependencyGraph()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._graph.build_dependency(model, example, forward_fn=forward, verbose=False)
        self.nodes: list[Any] = list(self._graph.module2node.values())
        self._number = {id(node): index for index, node in enumerate(self.nodes)}
        self._pruners = {id(node): self._graph.get_pruner_of_module(node.module) for node in self.nodes}
        sides = [(node, is_input) for node in self.nodes for is_input in (False, True)]
        self._most = max((self._size(node, is_input=is_input) for node, is_input in sides), default=0)
        self._roots = {id(node) for node in self.nodes if any(node.grad_fn is one for one in roots)}
        self._tied = _tied(model)

    def units(self) -> list[Unit]:
        """Return all units, those that cannot go included."""
        edges = list(self._edges())
        if not edges:
            return []
        starts, ends = (np.concatenate([edge[side] for edge in edges]) for side in (0, 1))
        codes, numbers = np.unique(np.concatenate([starts, ends]), return_inverse=True)
        first, second = np.split(numbers, 2)
        links = coo_matrix((np.ones(len(first), np.int8), (first, second)), shape=(len(codes), len(codes)))
        count, labels = connected_components(links, directed=False)
        pieces: list[dict[Place, list[int]]] = [defaultdict(list) for _ in range(count)]
        refusals = [""] * count
        sides = codes >> _BITS
        for side in np.unique(sides).tolist():
            here = np.flatnonzero(sides == side)
            node, is_input = self.nodes[side // 2], bool(side % 2)
            found, indices = labels[here].tolist(), (codes[here] & ((1 << _BITS) - 1)).tolist()
            size = self._size(node, is_input=is_input)
            refusal = self._refusal(node, is_input)
            if max(indices) >= (size or self._most):
                there = f"{self.name(node)}, which has {size} channels there" if size else "a change of shape"
                refusal = f"is not followed to {there}"
            if refusal:
                for label in set(found):
                    refusals[label] = refusals[label] or refusal
            for place in self._places(node, is_input):
                for label, index in zip(found, indices, strict=True):
                    if index < size:
                        pieces[label][place].append(index)
        return [
            Unit(pieces={place: tuple(sorted(each)) for place, each in sorted(one.items())}, refusal=refusal)
            for one, refusal in zip(pieces, refusals, strict=True)
            if one
        ]

    def name(self, node: Any) -> str:
        """Return the name of a node's module or parameter; empty for an operation between layers."""
        if isinstance(node.module, nn.Parameter):
            return self._parameters.get(node.module, "")
        return self.names.get(node.module, "")

    def _edges(self) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """Yield channels that must go together, as pairs of numbers of (side of a node, index)."""
        seen: dict[int, set[int]] = defaultdict(set)
        waiting: list[tuple[Any, bool, Sequence[int]]] = []
        for node in self.nodes:
            if isinstance(node.module, _ConvNd | nn.Linear) and self._size(node, is_input=False) > 1:
                outputs = np.arange(self._size(node, is_input=False))
                waiting.append((node, False, outputs.tolist()))
                yield (_codes(self._side(node, False), outputs),) * 2  # though nothing may read them
                yield from self._edges_within(node)
            elif isinstance(node.module, nn.GroupNorm | nn.LayerNorm):
                yield from self._edges_within(node)
        for node, is_input, indices in waiting:
            seen[self._side(node, is_input)].update(indices)
        while waiting:
            node, is_input, indices = waiting.pop()
            side = self._side(node, is_input)
            for dependency in node.dependencies:
                if self._side(node, self._is_input(node, dependency.trigger)) != side:
                    continue
                target, at_input = dependency.target, self._is_input(dependency.target, dependency.handler)
                if self._size(target, is_input=at_input) == 1:
                    continue  # one channel for all others, by broadcasting
                sources, mapped = _mapped(dependency, indices)
                there = self._side(target, at_input)
                yield _codes(side, sources), _codes(there, mapped)
                # Beyond a layer's channels nothing is followed: such numbers of a misread reshape could grow for ever.
                limit = self._size(target, is_input=at_input) or self._most
                if fresh := {index for index in mapped.tolist() if index < limit} - seen[there]:
                    seen[there] |= fresh
                    waiting.append((target, at_input, sorted(fresh)))

    def _edges_within(self, node: Any) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """Yield the channels that a grouped convolution or a norm over several channels couples by itself."""
        module = node.module
        if isinstance(module, _ConvNd) and module.groups > 1:
            num_groups = module.groups
        elif isinstance(module, nn.GroupNorm):
            num_groups = module.num_groups
        elif isinstance(module, nn.LayerNorm):
            num_groups = 1
        else:
            return
        firsts = self._side(node, False), self._size(node, is_input=False) // num_groups
        for is_input in (False, True):
            side, size = self._side(node, is_input), self._size(node, is_input=is_input)
            indices = np.arange(size)
            groups = indices // (size // num_groups)
            yield _codes(side, indices), _codes(firsts[0], groups * firsts[1])

    def _is_input(self, node: Any, function: Any) -> bool:
        """Return whether a function of torch-pruning removes inputs of a node, whose outputs are other channels."""
        pruner = self._pruners[id(node)]
        return bool(function == pruner.prune_in_channels and function != pruner.prune_out_channels)

    def _side(self, node: Any, is_input: bool) -> int:
        pruner = self._pruners[id(node)]
        is_two_sided = pruner.prune_in_channels != pruner.prune_out_channels
        return 2 * self._number[id(node)] + (is_input and is_two_sided)

    def _size(self, node: Any, *, is_input: bool) -> int:
        """Return how many channels a layer takes in or gives; 0 for an operation that has no number of its own."""
        module = node.module
        if isinstance(module, nn.Parameter):
            return int(module.shape[node.pruning_dim])
        if isinstance(module, nn.LayerNorm):
            return module.normalized_shape[-1]
        if isinstance(module, nn.PReLU) and module.num_parameters == 1:
            return 0
        names = next((names for kind, *names in _SIZES if isinstance(module, kind)), None)
        return 0 if names is None else int(getattr(module, names[not is_input]))

    def _places(self, node: Any, is_input: bool) -> list[Place]:
        """Return the tensors and axes on which the channels of a node's side lie."""
        name, module = self.name(node), node.module
        if isinstance(module, nn.Parameter):
            return [(name, node.pruning_dim % module.ndim)] if name else []
        if isinstance(module, _ConvNd | nn.Linear):
            axis = _weight_axis(module, is_input=is_input)
            places = [] if axis is None else [(f"{name}.weight", axis)]
            return places if is_input or module.bias is None else [*places, (f"{name}.bias", 0)]
        if isinstance(module, _BY_CHANNEL) and self._size(node, is_input=is_input):
            own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
            return [(f"{name}.{key}", 0) for key, value in own if value.ndim]
        return []

    def _refusal(self, node: Any, is_input: bool) -> str:
        """Return why the channels of a node's side cannot go, in words that follow a layer's name."""
        if id(node) in self._roots and not is_input:
            return OF_OUTPUTS
        name, module = self.name(node), node.module
        if name and not isinstance(module, (nn.Parameter, _ConvNd, nn.Linear, *_BY_CHANNEL)):
            return f"has channels in {name}, a {type(module).__name__}, which is not cut"
        if name in self._tied:
            return f"has channels in {name}, whose tensor another module has too"
        return ""


def _weight_axis(module: _ConvNd | nn.Linear, *, is_input: bool) -> int | None:
    """Return the axis of a weight on which the inputs or outputs lie; None where that axis counts within groups."""
    if isinstance(module, nn.Linear):
        return int(is_input)
    axis = int(is_input != module.transposed)
    return None if axis == 1 and module.groups > 1 else axis


def _mapped(dependency: Any, indices: Sequence[int]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return pairs of indices: of the side where a dependency begins, and of the side where it ends."""
    mappings = [one for one in dependency.index_mapping if one is not None]
    plain = np.asarray(indices, np.int64)
    if not mappings:
        return plain, plain
    found = [torch_pruning._helpers._HybridIndex(idx=index, root_idx=index) for index in indices]
    for mapping in mappings:
        found = mapping(found)
    return np.array([one.root_idx for one in found], np.int64), np.array([one.idx for one in found], np.int64)


def _codes(side: int, indices: NDArray[np.int64]) -> NDArray[np.int64]:
    return (np.int64(side) << _BITS) | indices


def _tied(model: nn.Module) -> set[str]:
    """Return the names of modules and parameters whose tensor is also that of another module."""
    owners: dict[int, list[str]] = defaultdict(list)
    for name, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            owners[id(parameter)] += [name, f"{name}.{key}"]
    return {name for names in owners.values() if len(names) > 2 for name in names}

"""The shape of a network of convolutions and matrices in any order, without its weights, and what follows from it.

A decoder's layers are alike, so that a few numbers say its shape (`dilap.core.shape.Architecture`). The shape of any
other network is its tensors, the groups of units that lie on them, and where its layers compute. `Shape` stands for
either.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, TypeVar

from dilap.core.bounds import MAX_LAYERS, MAX_WIDTH
from dilap.core.groups import Block, Group, Member
from dilap.core.shape import Architecture

_FULL: Mapping[str, int] = MappingProxyType({})  # every group that counts do not name keeps all its units


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A convolution or a matrix, whose weights are the tensor `NAME.weight`.

    `output_sizes` has, for every time that one input passes the layer, the size of what it gives without the channels:
    (height, width) of a convolution, () of a matrix that is applied to one vector. In attention, each vector that a
    layer of queries or of values gives is multiplied with those of `num_attended` positions, too, and not with weights.
    """

    name: str
    kind: Literal["convolution", "transposed", "linear"]
    stride: tuple[int, ...] = ()
    num_groups: int = 1
    output_sizes: tuple[tuple[int, ...], ...] = ((),)
    num_attended: int = 0

    def __post_init__(self) -> None:
        sizes = [size for sizes in self.output_sizes for size in sizes]
        if min(sizes, default=0) < 0 or max(sizes, default=0) > MAX_WIDTH:
            raise ValueError(f"a layer gives sizes between 0 and {MAX_WIDTH:,}, and {self.name:.80} does not")
        if min((*self.stride, self.num_groups)) < 1 or max((*self.stride, self.num_groups)) > MAX_WIDTH:
            raise ValueError(f"a stride and a number of groups is between 1 and {MAX_WIDTH:,}, got {self.name:.80}")

    @property
    def weight(self) -> str:
        return f"{self.name}.weight"

    @property
    def outputs_axis(self) -> int:
        """The axis of the weights on which the outputs lie, or where there are groups of them, the groups."""
        return int(self.kind == "transposed" and self.num_groups == 1)

    @property
    def num_positions(self) -> int:
        """How many vectors of channels the layer gives for one input."""
        return sum(prod(size) for size in self.output_sizes)


@dataclass(frozen=True, kw_only=True)
class Branch:
    """A residual branch whose shortcut is the identity, x + branch(x), so that it can be removed whole.

    `groups` are all groups whose units lie nowhere else. Without any of these units, the layer `last` has no inputs and
    gives a constant, which the batch norm `norm` behind it, where there is one, makes another. `modules` are the paths
    of all modules with tensors that are then not needed, those two included, each with the number of rows and columns
    that it takes off its inputs.
    """

    name: str
    groups: tuple[str, ...]
    modules: dict[str, tuple[int, ...]]
    last: str
    norm: str = ""


@dataclass(frozen=True, kw_only=True)
class Network:
    """The shape of a network for inputs of the size `input_size`.

    The size of an image is (channels, height, width), that of a text (3, tokens); see `dilap.core.network_input`.
    `tensors` are the shapes of all parameters and of the `buffers`, such as the statistics of batch norms; `groups` are
    those units that can be removed, with all their members.
    """

    name: str
    input_size: tuple[int, ...]
    tensors: dict[str, tuple[int, ...]]
    layers: tuple[Layer, ...]
    groups: tuple[Group, ...]
    branches: tuple[Branch, ...] = ()
    buffers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        sizes = [*self.input_size, *(size for shape in self.tensors.values() for size in shape)]
        if not self.input_size or min(sizes) < 0 or max(sizes) > MAX_WIDTH:
            raise ValueError(f"a size is between 0 and {MAX_WIDTH:,}, and an input has some, got {self.input_size}")
        if len(self.layers) > MAX_LAYERS:
            raise ValueError(f"{len(self.layers)} layers")
        if odd := [one.name for one in self.layers if one.weight not in self.tensors]:
            raise ValueError(f"layer {odd[0]} has no tensor {odd[0]}.weight")
        names = [group.name for group in self.groups]
        if len(set(names)) != len(names):
            raise ValueError("two groups have the same name")
        for group in self.groups:
            for one in group.members:
                _require_inside(one, group, self.tensors)
        if odd := sorted({name for branch in self.branches for name in branch.groups} - set(names)):
            raise ValueError(f"a branch has the group {odd[0]!r:.80}, which the network does not have")

    @property
    def blocks(self) -> tuple[Block, ...]:
        """One block for every group, in the order of the network; blocks of a residual branch are removed together."""
        return tuple(
            Block(name=group.name, layer=index, kind="channels", groups=(group,))
            for index, group in enumerate(self.groups)
        )

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of what may have a precision of its own: its blocks."""
        return tuple(block.name for block in self.blocks)

    def parts_left(self, counts: Mapping[str, int]) -> dict[str, str]:
        """Return the parts that have units left, which keep their names."""
        return {part: part for part in self.parts if counts[part]}

    def widths_at(self, counts: Mapping[str, int]) -> Mapping[str, int]:
        """Return what costs of a network are asked for: how many units are left in every group."""
        return {group.name: counts.get(group.name, group.num_units) for group in self.groups}

    def require_network(self, counts: Mapping[str, int]) -> None:
        """Raise ValueError where no network can have `counts` units in its groups."""
        in_branches = {name for branch in self.branches for name in branch.groups}
        for group in self.groups:
            if counts.get(group.name, group.num_units) == 0 and group.name not in in_branches:
                raise ValueError(f"{group.name} keeps no unit, and no shortcut leads around it")
        for branch in self.branches:
            empty = [name for name in branch.groups if counts.get(name) == 0]
            if empty and len(empty) < len(branch.groups):
                kept = next(name for name in branch.groups if name not in empty)
                raise ValueError(f"{empty[0]} keeps no unit and {kept} does: the groups of a branch go together")

    @functools.cached_property
    def units_on(self) -> dict[tuple[str, int], list[tuple[Group, int]]]:
        """The groups whose units lie on an axis of a tensor, and how many of its entries one unit is."""
        found: dict[tuple[str, int], list[tuple[Group, int]]] = {}
        for group in self.groups:
            for one in group.members:
                entries = prod(one.grid) // one.grid[one.dimension]
                found.setdefault((one.tensor, one.axis), []).append((group, entries))
        return found

    def size(self, tensor: str, axis: int, counts: Mapping[str, int] = _FULL) -> int:
        """Return how many entries an axis of a tensor has when `counts` units are left in the groups."""
        units = self.units_on.get((tensor, axis), ())
        removed = sum(each * (group.num_units - counts.get(group.name, group.num_units)) for group, each in units)
        return self.tensors[tensor][axis] - removed

    def shape(self, tensor: str, counts: Mapping[str, int] = _FULL) -> tuple[int, ...]:
        """Return the shape of a tensor when `counts` units are left in the groups."""
        return tuple(self.size(tensor, axis, counts) for axis in range(len(self.tensors[tensor])))

    def channels(self, layer: Layer, counts: Mapping[str, int] = _FULL) -> tuple[int, int]:
        """Return how many channels a layer takes in and gives when `counts` units are left in the groups."""
        first, second = (self.size(layer.weight, axis, counts) for axis in (0, 1))
        if layer.kind == "transposed":
            return first, second * self._num_groups(layer, first)
        return second * self._num_groups(layer, first), first

    def _num_groups(self, layer: Layer, width: int) -> int:
        """Return how many groups a convolution has when the first axis of its weights is so wide: they go whole."""
        return 1 if layer.num_groups == 1 else layer.num_groups * width // self.tensors[layer.weight][0]

    def num_weights(self, layer: Layer, counts: Mapping[str, int] = _FULL) -> int:
        """Return the number of weights of a layer, without its bias, when `counts` units are left in the groups."""
        return prod(self.shape(layer.weight, counts))

    def layer_flops(self, layer: Layer, counts: Mapping[str, int] = _FULL) -> int:
        """Return the FLOPs of a layer on one input, and of attention to what it gives; a multiply-add is two."""
        if layer.kind == "transposed":  # every input is multiplied with all its weights, and is a stride apart
            return 2 * self.num_weights(layer, counts) * layer.num_positions // prod(layer.stride)
        attended = layer.num_attended * self.channels(layer, counts)[1]
        return 2 * (self.num_weights(layer, counts) + attended) * layer.num_positions

    def flops(self, counts: Mapping[str, int] = _FULL) -> int:
        """Return the FLOPs of all layers on one input; a multiply-add is two."""
        return sum(self.layer_flops(layer, counts) for layer in self.layers)

    @property
    def num_parameters(self) -> int:
        """Number of all parameters."""
        return sum(prod(shape) for name, shape in self.tensors.items() if name not in self.buffers)

    def pruned(self, counts: Mapping[str, int]) -> "Network":
        """Return the network in which `counts` units are left in the groups; branches without units are gone."""
        gone = [branch for branch in self.branches if counts.get(branch.groups[0]) == 0]
        inside = tuple(f"{path}." for branch in gone for path in branch.modules)
        tensors = {name: self.shape(name, counts) for name in self.tensors if not name.startswith(inside)}
        # What is left of a branch is the constant that it adds.
        tensors |= {f"{one.last}.bias": (self._outputs_of(one.last, counts),) for one in gone}
        left = [group for group in self.groups if counts.get(group.name, 1)]
        return replace(
            self,
            tensors=tensors,
            layers=tuple(self._pruned_layer(one, counts) for one in self.layers if not one.weight.startswith(inside)),
            groups=tuple(self._pruned_group(group, counts, tensors) for group in left),
            buffers=tuple(name for name in self.buffers if name in tensors),
            branches=tuple(branch for branch in self.branches if branch not in gone),
        )

    def _outputs_of(self, name: str, counts: Mapping[str, int]) -> int:
        layer = next(one for one in self.layers if one.name == name)
        return self.channels(layer, counts)[1]

    def _pruned_layer(self, layer: Layer, counts: Mapping[str, int]) -> Layer:
        return replace(layer, num_groups=self._num_groups(layer, self.size(layer.weight, 0, counts)))

    def _pruned_group(self, group: Group, counts: Mapping[str, int], tensors: Mapping[str, object]) -> Group:
        count = counts.get(group.name, group.num_units)
        members = tuple(self._pruned_member(one, count, counts) for one in group.members if one.tensor in tensors)
        return replace(group, num_units=count, members=members)

    def _pruned_member(self, member: Member, count: int, counts: Mapping[str, int]) -> Member:
        """Return a member where what lies before it on its axis has become shorter as well."""
        grid = tuple(count if i == member.dimension else size for i, size in enumerate(member.grid))
        before = 0
        for group in self.groups:
            for one in group.members:
                if (one.tensor, one.axis) == (member.tensor, member.axis) and one.offset < member.offset:
                    each = prod(one.grid) // one.grid[one.dimension]
                    before += each * (group.num_units - counts.get(group.name, group.num_units))
        return replace(member, grid=grid, offset=member.offset - before)


if TYPE_CHECKING:  # the default is for type checkers: where nothing is said of a plan, it is a decoder's
    import typing_extensions

    Shape = typing_extensions.TypeVar("Shape", Architecture, Network, default=Architecture)
else:
    Shape = TypeVar("Shape", Architecture, Network)


def _require_inside(member: Member, group: Group, tensors: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ValueError unless the grid of a member has the group's units and lies on its tensor."""
    shape = tensors.get(member.tensor)
    if shape is None or not 0 <= member.axis < len(shape) or not 0 <= member.offset <= member.span.stop:
        raise ValueError(f"{group.name}: there is no axis {member.axis} of a tensor {member.tensor!r:.80}")
    if member.span.stop > shape[member.axis] or not 0 <= member.dimension < len(member.grid):
        raise ValueError(f"{group.name}: a member does not lie on axis {member.axis} of {member.tensor}")
    if member.grid[member.dimension] != group.num_units:
        raise ValueError(f"{group.name}: a member has other units than the group")

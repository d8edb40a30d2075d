"""What can be removed from a network: blocks of groups of units, and where the units lie in the tensors.

inner = Member(tensor="up.weight", axis=0, grid=(4,))
channels = Group(name="channels", num_units=4, members=(inner, Member(tensor="down.weight", axis=1, grid=(4,))))
indices_kept([channels], {"channels": (0, 2)})  # {("up.weight", 0): [0, 2], ("down.weight", 1): [0, 2]}
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
from numpy.typing import NDArray

Kept = Mapping[str, Sequence[int]]  # the units that stay, ascending, by the name of their group


@dataclass(frozen=True, kw_only=True)
class Member:
    """One axis of one tensor on which the units of a group lie.

    Starting at `offset`, the entries of the axis are read as an array of the shape `grid`, the last dimension varying
    fastest; a unit is one slice of its dimension `dimension`. For example, the rows of a query projection are a grid of
    (KV heads, query heads per KV head, head_dim): KV groups are slices of dimension 0, query slots of dimension 1.
    Three projections that are fused into one tensor are three members with different offsets.
    """

    tensor: str
    axis: int
    grid: tuple[int, ...]
    dimension: int = 0
    offset: int = 0

    @property
    def span(self) -> slice:
        """The entries of the axis that the grid covers."""
        return slice(self.offset, self.offset + prod(self.grid))


@dataclass(frozen=True, kw_only=True)
class Group:
    """Units that can be removed one by one while `least` of them stay, or all together.

    A unit is its slice of every member. `members` is empty where only the shape of a network is known, and not its
    tensors.
    """

    name: str
    num_units: int
    members: tuple[Member, ...] = ()
    least: int = 1


@dataclass(frozen=True, kw_only=True)
class Block:
    """A part of a network whose widths a search chooses together, such as an attention or a feed-forward sublayer.

    The first group is the one whose units methods rank; keeping none of them removes the block. A second group, where
    there is one, divides the same tensors in another way (query slots beside KV groups) and never loses all its units.
    `layer` is the index of the decoder layer; a layer whose blocks are all removed is deleted. Blocks of the same
    `kind`, `attention` or `ffn`, have the same groups; the units of an `ffn` are channels, or experts. A part without
    groups, such as `HEAD`, loses nothing: only its precision is chosen.
    """

    name: str
    layer: int
    kind: str
    groups: tuple[Group, ...]

    @property
    def main(self) -> Group:
        """The group whose units methods rank."""
        return self.groups[0]

    @property
    def has_experts(self) -> bool:
        """Whether the units are the experts of a feed-forward network."""
        return any(group.name.endswith(".experts") for group in self.groups)


HEAD = Block(name="head", layer=-1, kind="head", groups=())  # the projection to the vocabulary


def indices_kept(groups: Iterable[Group], kept: Kept) -> dict[tuple[str, int], NDArray[np.int64]]:
    """Return the indices that stay, ascending, for every tensor and axis on which units of `groups` lie.

    A group that `kept` does not name keeps all its units.
    """
    grids: dict[tuple[str, int], dict[tuple[int, tuple[int, ...]], dict[int, Sequence[int]]]] = {}
    for group in groups:
        for one in group.members:
            grid = grids.setdefault((one.tensor, one.axis), {}).setdefault((one.offset, one.grid), {})
            grid[one.dimension] = kept.get(group.name, range(group.num_units))
    return {
        where: np.concatenate([_indices_of(offset, grid, units) for (offset, grid), units in sorted(parts.items())])
        for where, parts in grids.items()
    }


def _indices_of(offset: int, grid: tuple[int, ...], units: Mapping[int, Sequence[int]]) -> NDArray[np.int64]:
    """Return the indices of a grid's entries that lie in a kept slice of each of its dimensions."""
    kept = [np.asarray(units.get(dimension, range(size)), np.int64) for dimension, size in enumerate(grid)]
    if not all(len(one) for one in kept):
        return np.zeros(0, np.int64)
    return offset + np.ravel_multi_index(np.ix_(*kept), grid).reshape(-1).astype(np.int64)

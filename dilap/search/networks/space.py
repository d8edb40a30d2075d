"""The choices of a network: levels of every group, or of all groups of a residual branch, and what they cost."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from dilap.core.costs import Costs, Counts, Setting
from dilap.core.graph import Network
from dilap.core.groups import Block, Group
from dilap.core.space import Choice, Coupling, Level, Space

_MOST = 10  # levels of a group
_MOST_TOGETHER = 40  # levels of the groups of a branch, which are all combinations of theirs


def network_space(network: Network, costs: Costs, *, widths: Callable[[Group], Sequence[int]]) -> Space[Network]:
    """Return the choices of a network; `widths` gives the numbers of units that a group may have, ascending.

    Residual branches are removed whole, so that the groups of one branch are one choice.
    """
    blocks = list(_blocks(network))
    single = {block.main.name: block for block in network.blocks}
    owner = {group.name: index for index, block in enumerate(blocks) for group in block.groups}
    removable = {branch.groups[0] for branch in network.branches}
    couplings: dict[tuple[int, int], NDArray[np.float64]] = {}
    choices = []
    for block in blocks:
        most = min(_MOST, round(_MOST_TOGETHER ** (1 / len(block.groups))))
        spread = [_spread(widths(group), most) for group in block.groups]
        told = [costs.cheaper(single[group.name], one) for group, one in zip(block.groups, spread, strict=True)]
        found: list[Counts] = list(itertools.product(*([counts[0] for counts, _ in one] for one in told)))
        if block.main.name in removable:
            found.append((0,) * len(block.groups))
        levels = [Level(counts=counts, cost=_own_cost(costs, block, single, counts)) for counts in found]
        ordered = sorted(levels[1:], key=lambda level: -level.cost)
        choices.append(Choice(block=block, levels=(levels[0], *ordered)))
    for (first, second), cost in costs.pairs.items():
        one, other = owner[first], owner[second]
        if one == other:
            continue
        rows, columns = (_counts_of(choices[index], name) for index, name in ((one, first), (other, second)))
        table = np.array([[cost((row,), (column,)) for column in columns] for row in rows])
        key, table = ((one, other), table) if one < other else ((other, one), table.T)
        couplings[key] = couplings.get(key, np.zeros(table.shape)) + table
    return Space(
        architecture=network,
        choices=tuple(choices),
        fixed_cost=costs.constant,
        couplings=tuple(
            Coupling(first=first, second=second, costs=tuple(map(tuple, table.tolist())))
            for (first, second), table in sorted(couplings.items(), key=lambda one: one[0])
        ),
    )


def _blocks(network: Network) -> Iterator[Block]:
    """Yield a block for every branch that has several groups, and for every other group."""
    together = {name: branch for branch in network.branches for name in branch.groups}
    groups = {group.name: group for group in network.groups}
    for block in network.blocks:
        branch = together.get(block.main.name)
        if branch is None:
            yield block
        elif block.main.name == branch.groups[0]:
            own = tuple(groups[name] for name in branch.groups)
            yield Block(name=block.name, layer=block.layer, kind=block.kind, groups=own)


def _spread(widths: Sequence[int], most: int) -> list[Setting]:
    """Return at most so many of the widths of a group, evenly spread, and the least, the largest first."""
    shares = (1 - index / most for index in range(most))
    nearest = (min(widths, key=lambda width: (abs(width - share * widths[-1]), width)) for share in shares)
    return [((width,), "") for width in dict.fromkeys([*nearest, widths[0]])]


def _own_cost(costs: Costs, block: Block, single: Mapping[str, Block], counts: Counts) -> float:
    """Return what a block costs alone: its groups, and those pairs of them that meet in a layer."""
    by_name = dict(zip((group.name for group in block.groups), counts, strict=True))
    own = sum(costs.block(single[name], (count,)) for name, count in by_name.items())
    return own + sum(
        cost((by_name[first],), (by_name[second],))
        for (first, second), cost in costs.pairs.items()
        if first in by_name and second in by_name
    )


def _counts_of(choice: Choice, group: str) -> list[int]:
    """Return the number of units of one of its groups at every level of a choice."""
    index = [one.name for one in choice.block.groups].index(group)
    return [level.counts[index] for level in choice.levels]

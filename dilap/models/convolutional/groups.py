"""Make groups of the units of a network: units with channels on the same axes of the same tensors are one group."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dilap.core.groups import Group, Member
from dilap.models.convolutional.dependencies import Place, Unit

_IN_SEVERAL_ORDERS = "has its channels in other orders elsewhere"
_TOGETHER = "has channels that stay or go together, all of them"


@dataclass(frozen=True, kw_only=True)
class Grouped:
    """The groups of a network in the order of its layers, and why other layers lose no outputs, by their names."""

    groups: tuple[Group, ...]
    refusals: Mapping[str, str]


def grouped(units: Iterable[Unit], outputs: Mapping[str, Place]) -> Grouped:
    """Return the groups that units make, named after the first layer whose outputs they are.

    `outputs` has, for every layer in the order of the network, the axis of its weights on which its outputs lie.
    """
    by_places: dict[tuple[tuple[Place, int], ...], list[Unit]] = defaultdict(list)
    for unit in units:
        by_places[tuple((place, len(indices)) for place, indices in unit.pieces.items())].append(unit)
    found: dict[str, list[tuple[Member, ...]]] = {name: [] for name in outputs}
    refusals: dict[str, str] = {}
    for places, alike in by_places.items():
        names = [name for name, place in outputs.items() if place in dict(places)]
        if not names:
            continue  # inputs that no layer gives: the image's channels
        reason = next((unit.refusal for unit in alike if unit.refusal), _TOGETHER if len(alike) == 1 else "")
        members = () if reason else _members(alike)
        if members:
            found[names[0]].append(members)
        else:
            refusals |= dict.fromkeys(names, reason or _IN_SEVERAL_ORDERS)
    groups = tuple(one for name, of_layer in found.items() for one in _named(name, of_layer))
    members_of = {(one.tensor, one.axis) for group in groups for one in group.members}
    left = {name: reason for name, reason in refusals.items() if outputs[name] not in members_of}
    return Grouped(groups=groups, refusals=left)


def _named(layer: str, found: Sequence[tuple[Member, ...]]) -> list[Group]:
    """Return the groups of a layer's outputs; where they are several, by their order on its axis."""
    ordered = sorted(found, key=lambda members: min(one.offset for one in members if one.tensor == f"{layer}.weight"))
    names = [layer] if len(ordered) == 1 else [f"{layer}.{index}" for index in range(len(ordered))]
    return [
        Group(name=name, num_units=members[0].grid[0], members=members)
        for name, members in zip(names, ordered, strict=True)
    ]


def _members(units: Sequence[Unit]) -> tuple[Member, ...]:
    """Return where units lie that have channels on the same places; nothing where they are in no common order."""
    ordered = sorted(units, key=lambda unit: next(iter(unit.pieces.values())))
    found: list[Member] = []
    for tensor, axis in ordered[0].pieces:
        runs = _runs(np.array([unit.pieces[tensor, axis] for unit in ordered]))
        if runs is None:
            return ()
        grids = [(start, (len(ordered), length)[: 1 + (length > 1)]) for start, length in runs]
        found += [Member(tensor=tensor, axis=axis, grid=grid, offset=start) for start, grid in grids]
    return tuple(found)


def _runs(indices: NDArray[np.int64]) -> list[tuple[int, int]] | None:
    """Return the runs of neighbours that units have on an axis, as (start of the first unit's run, length).

    `indices` are (units x channels of a unit). In every run the units follow one another; None where they do not.
    """
    breaks = np.flatnonzero((np.diff(indices, axis=1) != 1).any(axis=0)) + 1
    runs = []
    for run in np.split(indices, breaks, axis=1):
        if not (np.diff(run[:, 0]) == run.shape[1]).all():
            return None
        runs.append((int(run[0, 0]), run.shape[1]))
    return runs

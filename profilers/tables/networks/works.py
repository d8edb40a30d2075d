"""The work of the layers of a network, in closed form, as sums of products of the widths of at most two groups.

A convolution multiplies and adds as often as it has input channels times output channels, and moves as many numbers as
it has of either, and weights. Channels are rounded up to what a kernel fills, and a layer in a removed residual branch
has no work. What one unit of work takes is for a fit to find out, or for the published numbers of a device to say.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Literal, get_args

from dilap.core.graph import Branch, Layer, Network

# Multiply-adds, numbers read and written of all that pass, weights read, and 1 for the start of an operator.
Kind = Literal["operations", "reads", "writes", "weights", "launch"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True, kw_only=True)
class Factor:
    """What the units that are left in a group multiply a work by: their channels, rounded up to a multiple.

    Without `channels`, which are those of one unit, it is 1 where any unit is left.
    """

    group: str
    channels: int = 0
    multiple: int = 1

    def __call__(self, count: int) -> float:
        if not self.channels:
            return float(count > 0)
        return float(-(-count * self.channels // self.multiple) * self.multiple)


@dataclass(frozen=True, kw_only=True)
class Term:
    """A number times factors of one or two groups, or of none."""

    weight: float
    factors: tuple[Factor, ...] = ()

    @property
    def groups(self) -> frozenset[str]:
        return frozenset(one.group for one in self.factors)

    def __call__(self, counts: Mapping[str, int]) -> float:
        return self.weight * prod(one(counts[one.group]) for one in self.factors)


Work = tuple[Term, ...]  # a sum


@dataclass(frozen=True, kw_only=True)
class LayerWork:
    """The works of one layer; `kernel` says which layers are computed alike."""

    layer: str
    kernel: str
    works: Mapping[Kind, Work]


def layer_works(network: Network, *, multiple: int = 1) -> tuple[LayerWork, ...]:
    """Return the works of all layers for one input; `multiple` is the number of channels that kernels fill."""
    return tuple(_layer_work(network, layer, multiple) for layer in network.layers)


def amount(work: Work, counts: Mapping[str, int]) -> float:
    """Return how much work is to do where so many units are left in every group."""
    return sum(term(counts) for term in work)


def _layer_work(network: Network, layer: Layer, multiple: int) -> LayerWork:
    first, second = (_channels(network, layer.weight, axis, multiple) for axis in (0, 1))
    area, positions = prod(network.tensors[layer.weight][2:]), layer.num_positions
    if layer.num_groups > 1:  # its groups go whole, and each reads what it gives
        inputs = outputs = first
        per_output = network.num_weights(layer) // network.tensors[layer.weight][0]
        weights = _scaled(first, per_output)
    else:
        inputs, outputs = (first, second) if layer.kind == "transposed" else (second, first)
        weights = _scaled(_product(first, second), area)
    strides = prod(layer.stride)
    read = positions // strides if layer.kind == "transposed" else positions * strides
    works: dict[Kind, Work] = {
        "operations": _scaled(weights, read if layer.kind == "transposed" else positions),
        "reads": _scaled(inputs, read),
        "writes": _scaled(outputs, positions),
        "weights": weights,
        "launch": (Term(weight=1.0),),
    }
    if (branch := _branch_of(network, layer)) is not None:
        works = {kind: tuple(_in_branch(term, branch) for term in work) for kind, work in works.items()}
    return LayerWork(layer=layer.name, kernel=_kernel(network, layer), works=works)


def _kernel(network: Network, layer: Layer) -> str:
    """Return which layers are computed like this one."""
    if layer.num_groups > 1:
        return "depthwise" if network.tensors[layer.weight][1] == 1 else "grouped"
    if layer.kind == "convolution" and prod(network.tensors[layer.weight][2:]) == 1:
        return "pointwise"
    return layer.kind


def _channels(network: Network, tensor: str, axis: int, multiple: int) -> Work:
    """Return the entries of an axis of a tensor as a sum over the groups on it, and those that no group has."""
    units = network.units_on.get((tensor, axis), ())
    rest = network.tensors[tensor][axis] - sum(each * group.num_units for group, each in units)
    found = tuple(
        Term(weight=1.0, factors=(Factor(group=group.name, channels=each, multiple=multiple),)) for group, each in units
    )
    return (*found, Term(weight=float(rest))) if rest else found


def _scaled(work: Work, number: float) -> Work:
    return tuple(replace(term, weight=term.weight * number) for term in work)


def _product(first: Work, second: Work) -> Work:
    return tuple(
        Term(weight=one.weight * other.weight, factors=(*one.factors, *other.factors))
        for one, other in itertools.product(first, second)
    )


def _branch_of(network: Network, layer: Layer) -> Branch | None:
    """Return the residual branch with which a layer is removed; None where there is none."""
    return next(
        (branch for branch in network.branches if any(layer.weight.startswith(f"{path}.") for path in branch.modules)),
        None,
    )


def _in_branch(term: Term, branch: Branch) -> Term:
    """Return a term that is 0 where the groups of a branch, which go together, have no units.

    A term of two groups of which none is the branch's stays as it is: what a plan costs has terms of two groups only.
    """
    if not term.groups.isdisjoint(branch.groups) or len(term.groups) > 1:
        return term
    return replace(term, factors=(*term.factors, Factor(group=branch.groups[0])))


def in_seconds(layer: LayerWork, speeds: Mapping[Kind, float]) -> Work:
    """Return what a layer takes, as terms in seconds; `speeds` are the seconds of one unit of every kind of work."""
    return tuple(term for kind, work in layer.works.items() if speeds[kind] for term in _scaled(work, speeds[kind]))

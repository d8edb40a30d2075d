"""The shape of a network of any layers: what it has at any widths, and which plans it allows."""

from dataclasses import replace
from typing import Any

import pytest

from dilap.core.codec import decode, encode
from dilap.core.errors import InvalidInput
from dilap.core.graph import Branch, Layer, Network
from dilap.core.groups import Group, Member
from dilap.core.plan import Plan, full_plan


def group(name: str, num_units: int, **members: Any) -> Group:
    """Members by the names of their layers: axis and, if not plain, grid and offset."""
    made = [
        Member(tensor=f"{layer}.weight", axis=axis, grid=(rest or ((num_units,),))[0], offset=rest[1] if rest else 0)
        for layer, (axis, *rest) in members.items()
    ]
    return Group(name=name, num_units=num_units, members=tuple(made))


# a gives 4 channels, b 6 in 3 groups of 2, of which c reads both, and flat the 4 x 9 outputs of d.
NETWORK = Network(
    name="net",
    input_size=(3, 3, 3),
    tensors={"a.weight": (4, 3, 3, 3), "b.weight": (6, 1, 3, 3), "c.weight": (4, 10, 1, 1), "flat.weight": (5, 36)},
    layers=(
        Layer(name="a", kind="convolution", stride=(1, 1), output_sizes=((3, 3),)),
        Layer(name="b", kind="convolution", stride=(1, 1), num_groups=3, output_sizes=((3, 3),)),
        Layer(name="c", kind="convolution", stride=(1, 1), output_sizes=((3, 3),)),
        Layer(name="flat", kind="linear"),
    ),
    groups=(
        group("a", 4, a=(0,), c=(1,)),
        group("b", 3, b=(0, (3, 2), 0), c=(1, (3, 2), 4)),
        group("c", 4, c=(0,), flat=(1, (4, 9), 0)),
    ),
)
COUNTS = {"a": 1, "b": 2, "c": 3}


def layer(name: str) -> Layer:
    return next(one for one in NETWORK.layers if one.name == name)


@pytest.mark.parametrize(
    ("name", "dense", "pruned"),
    [("a", (3, 4), (3, 1)), ("b", (3, 6), (2, 4)), ("c", (10, 4), (5, 3)), ("flat", (36, 5), (27, 5))],
)
def test_channels_follow_from_the_units_that_are_left(
    name: str, dense: tuple[int, int], pruned: tuple[int, int]
) -> None:
    assert NETWORK.channels(layer(name)) == dense
    assert NETWORK.channels(layer(name), COUNTS) == pruned


def test_parameters_and_flops_follow_from_the_units_that_are_left() -> None:
    weights = [1 * 3 * 9, 4 * 1 * 9, 3 * 5, 5 * 27]
    pruned = NETWORK.pruned(COUNTS)
    assert pruned.num_parameters == sum(weights)
    assert NETWORK.flops(COUNTS) == pruned.flops() == 2 * (9 * sum(weights[:3]) + weights[3])


def test_what_lies_behind_removed_units_moves_forward() -> None:
    members = NETWORK.pruned(COUNTS).groups[1].members
    assert [(one.grid, one.offset) for one in members] == [((2, 2), 0), ((2, 2), 1)]


def test_a_plan_of_a_network_survives_a_round_trip() -> None:
    made = full_plan(NETWORK, base="0")
    assert decode(Plan, encode(made), source="plan.json") == made


def test_a_plan_of_a_network_has_a_digest_of_its_own() -> None:
    other = replace(NETWORK, input_size=(3, 4, 4))
    assert full_plan(NETWORK, base="0").digest != full_plan(other, base="0").digest


def test_a_damaged_network_is_refused_in_one_line() -> None:
    document = encode(full_plan(NETWORK, base="0"))
    document["architecture"]["tensors"]["a.weight"] = [3, 3, 3, 3]
    with pytest.raises(InvalidInput, match=r"a: a member does not lie on axis 0 of a\.weight"):
        decode(Plan, document, source="plan.json")


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({"b": 0}, "b keeps no unit, and no shortcut leads around it"),
        ({"a": 0}, "a keeps no unit and c does: the groups of a branch go together"),
        ({"a": 0, "c": 0}, None),
    ],
)
def test_only_whole_branches_are_removed(counts: dict[str, int], message: str | None) -> None:
    branch = Branch(name="flat", groups=("a", "c"), modules={"a": (), "c": (), "flat": ()}, last="flat")
    network = replace(NETWORK, branches=(branch,))
    if message is None:
        network.require_network(counts)
        return
    with pytest.raises(ValueError, match=message):
        network.require_network(counts)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_size": ()}, "an input has some"),
        ({"tensors": {}}, "layer a has no tensor a.weight"),
        ({"groups": (group("x", 2, y=(0,)),)}, "x: there is no axis 0 of a tensor 'y.weight'"),
        ({"groups": (group("x", 2, a=(0, (3,), 0)),)}, "x: a member has other units than the group"),
        ({"groups": (group("x", 4, a=(0,)), group("x", 4, c=(0,)))}, "two groups have the same name"),
    ],
)
def test_a_network_that_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(NETWORK, **changes)

"""The states within a pruned network are compared with those of the dense one at the channels that both have."""

import numpy as np
import pytest
import torch
from standins.networks import network, output, shape

from dilap.core.graph import Network
from dilap.core.plan import Plan, full_plan
from dilap.models.convolutional.cut import shrink_network_
from dilap.models.inner_states import State, inputs_seen, relative_error, states_apart, states_of


def halved(name: str, *, without: int | None = None) -> Plan[Network]:
    """Every second unit is left, and of the residual branch of that number none."""
    kept = {group.name: tuple(range(0, group.num_units, 2)) for group in shape(name).groups}
    gone = () if without is None else shape(name).branches[without].groups
    return Plan(base="", architecture=shape(name), kept=kept | dict.fromkeys(gone, ()))


def apart(plan: Plan[Network], name: str) -> float:
    dense, cut, states = network(name), shrink_network_(network(name), plan), states_of(plan)
    with inputs_seen(cut, states) as found, inputs_seen(dense, states) as wanted:
        output(cut)
        output(dense)
    assert set(found) == {one.layer for one in states}
    return float(torch.stack(states_apart(states, found, wanted)).mean())


@pytest.mark.parametrize("name", ["lite", "resnet_bottleneck", "regnet", "unet", "convnext", "vit"])
def test_a_whole_network_is_not_apart_and_a_cut_one_is(name: str) -> None:
    assert apart(full_plan(shape(name), base=""), name) == 0
    assert 0 < apart(halved(name), name) < 1e3  # a share of the size of what is wanted


def test_a_removed_branch_is_not_looked_into() -> None:
    plan = halved("lite", without=0)
    gone = tuple(shape("lite").branches[0].modules)
    assert not [one.layer for one in states_of(plan) if one.layer in gone]
    assert apart(plan, "lite") > 0


def test_states_are_the_inputs_of_the_last_layers_that_read_a_group() -> None:
    """The stem's channels pass the first block, and its sum with them is what the second block expands."""
    found = {one.layer: one.channels.tolist() for one in states_of(halved("lite"))}
    assert list(found) == [
        "blocks.1.expand", "blocks.0.project", "blocks.1.project", "head", "blocks.2.project"
    ]  # fmt: skip
    assert found["blocks.1.expand"] == [0, 2, 4, 6]


def test_the_error_of_a_state_is_that_of_the_channels_that_are_left_relative_to_their_variance() -> None:
    wanted = torch.tensor([[[1.0, 9.0, 0.0], [3.0, 9.0, 8.0]]])  # variances of channels: 1, 0 and 16
    state = State(layer="x", axis=-1, channels=np.array([0, 2]))
    found = wanted[..., [0, 2]] + torch.tensor([1.0, 2.0])
    assert states_apart((state,), {"x": found}, {"x": wanted})[0].item() == pytest.approx((1 + 4) / (1 + 16))


def test_an_error_is_finite_where_nothing_varies() -> None:
    assert relative_error(torch.zeros(1, 3), torch.ones(1, 3), axis=1).item() == pytest.approx(100)
    assert relative_error(torch.zeros(2, 3), torch.zeros(2, 3), axis=1).item() == 0

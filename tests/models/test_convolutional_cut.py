"""The shrunk network computes what the masked one computes, in every family and in a user's own module."""

from typing import Any

import pytest
import torch
from standins.networks import INPUT_SIZE, NETWORKS, network, output, shape_of
from standins.networks import shape as tiny
from torch import nn
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from dilap.core.errors import Mismatch
from dilap.core.graph import Network
from dilap.core.plan import Plan, full_plan
from dilap.models.convolutional.cut import shrink_network_
from dilap.models.convolutional.proof import halves, masked_, without
from tools.tiny_networks import resnet

HAS_BRANCHES = [name for name in NETWORKS if name not in ("plain", "unet")]


def plan(shape: Network, kept: dict[str, tuple[int, ...]]) -> Plan[Network]:
    return Plan(base="", architecture=shape, kept=full_plan(shape, base="").kept | kept)


def every_third(shape: Network) -> dict[str, tuple[int, ...]]:
    return {group.name: tuple(range(0, group.num_units, 3)) for group in shape.groups}


def assert_masked_equals_shrunk(name: str, shape: Network, kept: dict[str, tuple[int, ...]]) -> nn.Module:
    expected = output(masked_(network(name), shape, kept))
    shrunk = shrink_network_(network(name), plan(shape, kept))
    # The sums are the same but for zeros; f32 adds them in another order.
    assert_close(output(shrunk), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    return shrunk


@pytest.mark.parametrize("name", NETWORKS)
def test_shrunk_network_equals_the_masked_one(name: str) -> None:
    shape = tiny(name)
    assert_masked_equals_shrunk(name, shape, every_third(shape))


@pytest.mark.parametrize("name", NETWORKS)
def test_one_unit_of_every_group_is_enough(name: str) -> None:
    shape = tiny(name)
    assert_masked_equals_shrunk(name, shape, {group.name: (group.num_units - 1,) for group in shape.groups})


@pytest.mark.parametrize("name", HAS_BRANCHES)
def test_a_removed_branch_leaves_the_constant_that_it_gives_without_units(name: str) -> None:
    shape = tiny(name)
    assert_masked_equals_shrunk(name, shape, every_third(shape) | without(shape, shape.branches))


@pytest.mark.parametrize("name", HAS_BRANCHES)
def test_branches_are_the_residual_blocks_whose_shortcut_is_the_identity(name: str) -> None:
    num_branches = {"mobilenet_v2": 10, "efficientnet": 1, "convnext": 3, "vit": 4, "deit": 4}
    assert len(tiny(name).branches) == num_branches.get(name, 2)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("cut", ["halves", "branches"])
def test_the_shape_of_the_pruned_network_is_that_of_the_shrunk_one(name: str, cut: str) -> None:
    dense, shape = network(name), tiny(name)
    made = plan(shape, halves(shape) if cut == "halves" else without(shape, shape.branches))
    shrunk = shrink_network_(dense, made)
    pruned = made.pruned_architecture()
    assert pruned.tensors == {key: tuple(value.shape) for key, value in shrunk.state_dict().items()}
    assert pruned.num_parameters == sum(one.numel() for one in shrunk.parameters())


@pytest.mark.parametrize("name", ["resnet_basic", "unet", "lite"])
def test_a_shrunk_network_is_traced_to_the_shape_of_its_plan(name: str) -> None:
    made = plan(tiny(name), every_third(tiny(name)))
    assert shape_of(shrink_network_(network(name), made)) == made.pruned_architecture()


@pytest.mark.parametrize("name", NETWORKS)
def test_nothing_changes_where_all_units_are_kept(name: str) -> None:
    dense = network(name)
    shrunk = shrink_network_(network(name), full_plan(shape_of(dense), base=""))
    assert torch.equal(output(shrunk), output(dense))


def test_modules_know_their_new_sizes() -> None:
    shrunk = shrink_network_(
        network("regnet"), plan(tiny("regnet"), {"regnet.encoder.stages.1.layers.1.layer.0.convolution": (0, 2)})
    )
    layer = shrunk.get_submodule("regnet.encoder.stages.1.layers.1.layer")
    first, second, norm = (layer.get_submodule(name) for name in ("0.convolution", "1.convolution", "1.normalization"))
    assert [first.out_channels, second.in_channels, second.groups, norm.num_features] == [16, 16, 2, 16]


def test_new_values_of_parameters_are_cut_with_the_units() -> None:
    name = "resnet.encoder.stages.0.layers.1.layer.0.convolution"
    values = {f"{name}.weight": torch.arange(16.0)[:, None, None, None].expand(16, 16, 3, 3)}
    made = plan(tiny("resnet_basic"), {name: (2, 5)})
    shrunk = shrink_network_(network("resnet_basic"), made, parameters=values)
    assert shrunk.get_parameter(f"{name}.weight")[:, 0, 0, 0].tolist() == [2.0, 5.0]


def test_a_plan_for_another_network_is_refused_with_the_first_tensor() -> None:
    made = full_plan(tiny("resnet_basic"), base="")
    with pytest.raises(
        Mismatch, match=r"tensor resnet\.embedder\.embedder\.convolution\.weight is \(4, 3, 7, 7\) here"
    ):
        shrink_network_(resnet(embedding_size=4), made)


def test_a_network_that_no_shortcut_holds_together_is_no_plan() -> None:
    shape = tiny("unet")
    with pytest.raises(ValueError, match="first keeps no unit, and no shortcut leads around it"):
        plan(shape, {"first": ()})


def test_the_groups_of_a_branch_go_together() -> None:
    shape = tiny("resnet_bottleneck")
    with pytest.raises(ValueError, match="the groups of a branch go together"):
        plan(shape, {shape.branches[0].groups[0]: ()})


@pytest.mark.parametrize("name", NETWORKS)
def test_flops_are_those_torch_counts(name: str) -> None:
    dense: Any = network(name)
    if name in ("vit", "deit"):
        dense.set_attn_implementation("eager")  # of the others, torch counts nothing on a CPU
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        dense(torch.zeros(1, *INPUT_SIZE))
    assert tiny(name).flops() == counter.get_total_flops()

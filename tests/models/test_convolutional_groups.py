"""Which channels go together in hand-made networks, and which of them cannot go."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from dilap.core.errors import InvalidInput, Unsupported
from dilap.core.groups import Group
from dilap.models.convolutional.network import Traced, traced

Where = dict[tuple[str, int], tuple[int, tuple[int, ...]]]  # offset and grid by tensor and axis


class Net(nn.Module):
    """Layers given by name, and what `forward` does with them."""

    def __init__(self, forward: Callable[[Any, torch.Tensor], Any], **layers: nn.Module) -> None:
        super().__init__()
        self._forward = forward
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self._forward(self, x)
        return made


def conv(inputs: int, outputs: int, *, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, groups=groups)


def trace(model: nn.Module) -> Traced:
    return traced(model, input_size=(3, 8, 8), name="net")


def only_group(model: nn.Module) -> Group:
    (group,) = trace(model).network.groups
    return group


def where(group: Group) -> Where:
    return {(one.tensor, one.axis): (one.offset, one.grid) for one in group.members}


def test_a_chain_has_the_next_layers_inputs_and_the_norm_between() -> None:
    group = only_group(
        Net(lambda net, x: net.b(net.norm(net.a(x)).relu()), a=conv(3, 4), norm=nn.BatchNorm2d(4), b=conv(4, 2))
    )
    assert group.name == "a"
    assert where(group) == {
        ("a.bias", 0): (0, (4,)),
        ("a.weight", 0): (0, (4,)),
        ("b.weight", 1): (0, (4,)),
        ("norm.bias", 0): (0, (4,)),
        ("norm.running_mean", 0): (0, (4,)),
        ("norm.running_var", 0): (0, (4,)),
        ("norm.weight", 0): (0, (4,)),
    }


def test_an_addition_couples_what_it_adds() -> None:
    group = only_group(Net(lambda net, x: net.out(net.a(x) + net.b(x)), a=conv(3, 4), b=conv(3, 4), out=conv(4, 2)))
    assert {("a.weight", 0), ("b.weight", 0), ("out.weight", 1)} < set(where(group))


def test_a_concatenation_gives_each_part_its_own_place() -> None:
    model = Net(lambda net, x: net.out(torch.cat([net.a(x), net.b(x)], 1)), a=conv(3, 4), b=conv(3, 6), out=conv(10, 2))
    first, second = trace(model).network.groups
    assert where(first)["out.weight", 1] == (0, (4,))
    assert where(second)["out.weight", 1] == (4, (6,))


def test_a_part_that_is_concatenated_twice_has_two_places() -> None:
    def forward(net: Any, x: torch.Tensor) -> Any:
        return net.out(torch.cat([net.a(x), net.a(x).relu()], 1))

    members = only_group(Net(forward, a=conv(3, 4), out=conv(8, 2))).members
    assert sorted(one.offset for one in members if one.tensor == "out.weight") == [0, 4]


def test_a_depthwise_convolution_loses_the_channels_that_it_gets() -> None:
    model = Net(lambda net, x: net.b(net.deep(net.a(x))), a=conv(3, 4), deep=conv(4, 4, groups=4), b=conv(4, 2))
    group = only_group(model)
    assert (where(group)["deep.weight", 0], ("deep.weight", 1) in where(group)) == ((0, (4,)), False)


def test_a_depthwise_convolution_that_multiplies_channels_has_several_for_a_unit() -> None:
    model = Net(lambda net, x: net.b(net.deep(net.a(x))), a=conv(3, 4), deep=conv(4, 8, groups=4), b=conv(8, 2))
    group = only_group(model)
    assert group.num_units == 4
    assert where(group)["deep.weight", 0] == where(group)["b.weight", 1] == (0, (4, 2))


def test_units_of_a_grouped_convolution_are_its_groups() -> None:
    model = Net(lambda net, x: net.b(net.mid(net.a(x))), a=conv(3, 12), mid=conv(12, 6, groups=3), b=conv(6, 2))
    group = only_group(model)
    assert group.num_units == 3
    assert where(group)["a.weight", 0] == (0, (3, 4))
    assert where(group)["mid.weight", 0] == where(group)["b.weight", 1] == (0, (3, 2))


def test_a_layer_that_is_used_twice_couples_its_inputs_with_its_outputs() -> None:
    model = Net(lambda net, x: net.out(net.b(net.b(net.a(x)))), a=conv(3, 4), b=conv(4, 4), out=conv(4, 2))
    assert {("b.weight", 0), ("b.weight", 1)} < set(where(only_group(model)))


def test_a_flattened_unit_owns_a_column_for_every_position() -> None:
    model = Net(lambda net, x: net.out(net.a(x).flatten(1)), a=conv(3, 4), out=nn.Linear(4 * 64, 2))
    assert where(only_group(model))["out.weight", 1] == (0, (4, 64))


def test_squeeze_and_excitation_scales_the_units_that_it_reads() -> None:
    def forward(net: Any, x: torch.Tensor) -> Any:
        x = net.a(x)
        return net.out(x * net.expand(net.squeeze(functional.adaptive_avg_pool2d(x, 1)).relu()).sigmoid())

    model = Net(forward, a=conv(3, 8), squeeze=nn.Conv2d(8, 4, 1), expand=nn.Conv2d(4, 8, 1), out=conv(8, 2))
    outer, inner = trace(model).network.groups
    assert {("a.weight", 0), ("squeeze.weight", 1), ("expand.weight", 0), ("out.weight", 1)} < set(where(outer))
    assert set(where(inner)) == {("squeeze.weight", 0), ("squeeze.bias", 0), ("expand.weight", 1)}


def test_halves_that_are_multiplied_are_one_unit() -> None:
    def forward(net: Any, x: torch.Tensor) -> Any:
        first, second = net.a(x).chunk(2, 1)
        return net.out(first * second.sigmoid())

    group = only_group(Net(forward, a=conv(3, 8), out=conv(4, 2)))
    assert group.num_units == 4
    assert sorted(one.offset for one in group.members if one.tensor == "a.weight") == [0, 4]


def test_a_transposed_convolution_has_its_outputs_on_the_second_axis() -> None:
    model = Net(lambda net, x: net.out(net.up(net.a(x))), a=conv(3, 4), up=nn.ConvTranspose2d(4, 6, 2), out=conv(6, 2))
    first, second = trace(model).network.groups
    assert where(first)["up.weight", 0] == (0, (4,))
    assert where(second)["up.weight", 1] == (0, (6,))


@pytest.mark.parametrize(("num_parameters", "tensors"), [(4, 1), (1, 0)])
def test_a_prelu_loses_parameters_where_it_has_one_for_every_channel(num_parameters: int, tensors: int) -> None:
    model = Net(lambda net, x: net.out(net.act(net.a(x))), a=conv(3, 4), act=nn.PReLU(num_parameters), out=conv(4, 2))
    assert [one.tensor for one in only_group(model).members].count("act.weight") == tensors


def test_units_of_a_group_norm_are_its_groups() -> None:
    model = Net(lambda net, x: net.out(net.norm(net.a(x))), a=conv(3, 8), norm=nn.GroupNorm(4, 8), out=conv(8, 2))
    assert where(only_group(model))["norm.weight", 0] == (0, (4, 2))


def test_an_instance_norm_treats_every_channel_by_itself() -> None:
    norm = nn.InstanceNorm2d(4, affine=True, track_running_stats=True)
    model = Net(lambda net, x: net.out(net.norm(net.a(x))), a=conv(3, 4), norm=norm, out=conv(4, 2))
    assert ("norm.running_var", 0) in where(only_group(model))


def test_channels_in_the_last_axis_are_followed() -> None:
    model = Net(
        lambda net, x: net.out(net.b(net.a(x.permute(0, 2, 3, 1)).relu()).permute(0, 3, 1, 2)),
        a=nn.Linear(3, 6), b=nn.Linear(6, 5), out=conv(5, 2),
    )  # fmt: skip
    assert [group.name for group in trace(model).network.groups] == ["a", "b"]


def test_one_channel_for_all_others_is_coupled_with_none() -> None:
    model = Net(lambda net, x: net.out(net.a(x) * net.gate(x).sigmoid()), a=conv(3, 4), gate=conv(3, 1), out=conv(4, 2))
    assert set(where(only_group(model))) == {("a.weight", 0), ("a.bias", 0), ("out.weight", 1)}


def own_norm(net: Any, x: torch.Tensor) -> Any:
    x = net.b(net.a(x))
    return net.out(x / x.norm(dim=1, keepdim=True))


def shuffled(net: Any, x: torch.Tensor) -> Any:
    x = net.b(net.a(x))
    return net.out(x.view(len(x), 2, 4, 8, 8).transpose(1, 2).reshape(len(x), 8, 8, 8))


def gated(net: Any, x: torch.Tensor) -> Any:
    x = net.b(net.a(x))
    return net.out(x * net.gate(torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)).sigmoid())


NOT_CUT: dict[str, Callable[[Any, torch.Tensor], Any]] = {
    "norm_over_channels": own_norm,
    "channels_in_another_order": shuffled,
    "reshape_to_a_fixed_size": lambda net, x: net.out(net.b(net.a(x)).view(len(x), 8, -1).view(len(x), 8, 8, 8)),
    "layer_norm": lambda net, x: net.out(functional.layer_norm(net.b(net.a(x)).movedim(1, -1), (8,)).movedim(-1, 1)),
    "softmax": lambda net, x: net.out(net.b(net.a(x)).softmax(1)),
    "sum_with_the_input": lambda net, x: net.out(net.b(net.a(x)) + x.repeat(1, 3, 1, 1)[:, :8]),
    "pixels_of_channels": lambda net, x: net.out(functional.pixel_shuffle(net.b(net.a(x)), 2).repeat(1, 4, 1, 1)),
    "mean_over_channels": gated,
    "output_of_the_network": lambda net, x: net.b(net.a(x)),
}


@pytest.mark.parametrize("case", NOT_CUT)
def test_channels_that_cannot_go_are_left_and_the_reason_names_the_layer(case: str) -> None:
    found = trace(Net(NOT_CUT[case], a=conv(3, 6), b=conv(6, 8), gate=conv(2, 1), out=conv(8, 2)))
    assert [group.name for group in found.network.groups] == ["a"]
    assert "b" in found.refusals


def test_channels_under_a_layer_norm_go_together() -> None:
    model = Net(
        lambda net, x: net.out(net.norm(net.b(net.a(x)).movedim(1, -1)).movedim(-1, 1)),
        a=conv(3, 6), b=conv(6, 8), norm=nn.LayerNorm(8), out=conv(8, 2),
    )  # fmt: skip
    assert trace(model).refusals["b"] == "has channels that stay or go together, all of them"


def test_channels_of_a_tensor_that_two_layers_share_stay() -> None:
    model = Net(lambda net, x: net.out(net.b(net.a(x))), a=conv(3, 6), b=conv(6, 6), c=conv(6, 6), out=conv(6, 2))
    model.get_submodule("c").weight = model.get_parameter("b.weight")
    with pytest.raises(Unsupported, match="has channels in b, whose tensor another module has too"):
        trace(model)


def test_a_network_without_channels_to_remove_is_refused_with_the_layer() -> None:
    with pytest.raises(Unsupported, match="network net: no channel can be removed; for example, b cannot be cut: the"):
        trace(Net(lambda net, x: net.out(net.b(x).softmax(1)), b=conv(3, 8), out=conv(8, 2)))


def test_an_input_of_the_wrong_size_is_refused_in_one_line() -> None:
    with pytest.raises(InvalidInput, match="network net takes no input of 3x8x8: RuntimeError: Given groups=1"):
        trace(Net(lambda net, x: net.a(x), a=conv(4, 8)))


def test_tracing_leaves_the_model_as_it_was() -> None:
    model = Net(lambda net, x: net.out(net.a(x).relu()), a=conv(3, 4), out=conv(4, 2)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trace(model)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_layer_whose_weights_are_made_of_others_is_refused() -> None:
    layer = nn.utils.parametrizations.weight_norm(conv(3, 8))
    with pytest.raises(Unsupported, match=r"layer b makes its weights of other tensors; give it plain ones first"):
        trace(Net(lambda net, x: net.out(net.b(x)), b=layer, out=conv(8, 2)))

"""Methods for networks keep their limit, rank units as their papers say, and leave the model as it was."""

from dataclasses import replace

import pytest
import torch
import torch_pruning
from standins.network_task import IMAGES, LABELS, task
from standins.networks import network, output
from standins.quick_methods import network_method
from torch import nn
from torch.nn import functional

from dilap import methods
from dilap.core.errors import Infeasible, InvalidInput, Unsupported
from dilap.core.graph import Network
from dilap.core.plan import Plan
from dilap.methods.networks.magnitude import norms
from dilap.methods.networks.taylor import Taylor
from dilap.methods.networks.torch_pruning import TorchPruning
from dilap.models.convolutional.cut import shrink_network_
from dilap.models.convolutional.recalibration import recalibrate_
from dilap.models.network import outputs_of
from dilap.search.method import Pruned
from dilap.search.network_task import NetworkTask

INNER = "resnet.encoder.stages.0.layers.1.layer.0.convolution"  # of 16 channels


PUBLISHED = [name for name in methods.NETWORK_METHODS if name != "dilap"]  # which has tests of its own


def plan_of(method: str, given: NetworkTask) -> Plan[Network]:
    found = network_method(method)(given)
    return found.plan if isinstance(found, Pruned) else found


@pytest.mark.parametrize(
    ("method", "name"),
    [
        (method, name)
        for method in PUBLISHED
        for name in ("resnet_basic", "regnet", "lite", "unet")
        if (method, name) != ("torch_pruning", "regnet")
    ],
)
def test_a_method_keeps_its_limit_and_leaves_the_model_as_it_was(method: str, name: str) -> None:
    given = task(name)
    before = {key: value.clone() for key, value in given.model.state_dict().items()}
    if name == "unet":  # no class for every image
        given = replace(given, labels=None)
    plan = plan_of(method, given)
    used = given.cost_limit.cost(plan) / given.cost_limit.limit
    assert 0.75 <= used <= 1, f"{used:.2f}"
    assert all(torch.equal(value, before[key]) for key, value in given.model.state_dict().items())
    assert all(one.grad is None for one in given.model.parameters())


@pytest.mark.parametrize("method", PUBLISHED)
def test_numbers_of_channels_fill_kernels(method: str) -> None:
    plan = plan_of(method, task("resnet_basic", multiple=4))
    assert {count % 4 for count in plan.counts.values()} == {0}
    assert len(set(plan.counts.values())) > 1


def test_units_of_several_channels_fill_kernels_by_their_channels() -> None:
    given = task("regnet", multiple=16)
    pair = next(group for group in given.network.groups if group.num_units == 4 and len(group.members) > 5)
    assert [given.rounded(pair, wanted) for wanted in (1, 2.9, 3.1, 4)] == [2, 2, 4, 4]


def test_a_limit_that_no_plan_keeps_is_infeasible() -> None:
    with pytest.raises(Infeasible, match="this method cannot prune more"):
        plan_of("uniform", task("resnet_basic", share=0.001))


def test_uniform_removes_the_same_share_of_every_group() -> None:
    plan = plan_of("uniform", task("resnet_basic"))
    shares = [plan.counts[group.name] / group.num_units for group in plan.architecture.groups]
    assert max(shares) - min(shares) < 1 / 8  # of a stem of 8 channels


def test_norms_are_those_of_the_filters_in_all_coupled_layers() -> None:
    given = task("lite")
    found = norms(given)["blocks.0.expand"]
    expand, depthwise = (given.model.get_parameter(f"blocks.0.{name}.weight") for name in ("expand", "depthwise"))
    torch.testing.assert_close(found, expand.abs().sum((1, 2, 3)) + depthwise.abs().sum((1, 2, 3)))


def test_magnitude_removes_the_smallest_filter_first() -> None:
    given = task("resnet_basic", share=0.99)
    weight = given.model.get_parameter(f"{INNER}.weight")
    weight.data[5] /= 100
    plan = plan_of("magnitude", given)
    assert 5 not in plan.kept[INNER]


@torch.no_grad()
def loss(model: nn.Module) -> float:
    return float(
        functional.cross_entropy(outputs_of(model, torch.from_numpy(IMAGES).double())[0], torch.tensor(LABELS))
    )


def test_taylor_scores_are_squared_derivatives_of_the_loss_by_a_units_scale() -> None:
    """Scale and shift of a unit in its batch norm are multiplied by a little more and a little less than 1."""
    scores, step = Taylor().scores(task("resnet_basic"))[INNER], 1e-5
    for unit in (0, 7):
        losses = []
        for factor in (1 + step, 1 - step):
            model = network("resnet_basic").double()
            for name in ("weight", "bias"):
                model.get_parameter(f"{INNER.replace('convolution', 'normalization')}.{name}").data[unit] *= factor
            losses.append(loss(model))
        slope = (losses[0] - losses[1]) / (2 * step)
        assert scores[unit].item() == pytest.approx(slope**2, rel=1e-3)


def test_taylor_needs_no_labels() -> None:
    unlabelled = replace(task("resnet_basic"), labels=None)
    assert all(torch.isfinite(scores).all() for scores in Taylor().scores(unlabelled).values())


@pytest.mark.parametrize("name", ["resnet_basic", "resnet_bottleneck", "lite"])
@pytest.mark.parametrize("global_pruning", [False, True])
def test_torch_prunings_plan_is_what_its_pruner_makes_of_the_network(name: str, global_pruning: bool) -> None:
    given = task(name)
    (plan,) = TorchPruning(global_pruning=global_pruning).plans(given, [0.5])
    theirs = network(name)
    classifier = next(module for module in theirs.modules() if isinstance(module, nn.Linear))
    torch_pruning.pruner.BasePruner(
        theirs.requires_grad_(True),
        torch.from_numpy(given.images[:2]),
        importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=0.5,
        global_pruning=global_pruning,
        ignored_layers=[classifier],
        forward_fn=outputs_of,
    ).step()
    ours = shrink_network_(network(name), plan)
    assert {key: value.shape for key, value in ours.state_dict().items()} == {
        key: value.shape for key, value in theirs.state_dict().items()
    }
    torch.testing.assert_close(output(ours), output(theirs))


def test_torch_pruning_does_not_remove_groups_whole() -> None:
    with pytest.raises(Unsupported, match=r"narrows each of the groups that .* gives channels to"):
        TorchPruning()(task("regnet"))


def test_norms_are_measured_again_and_nothing_else_changes() -> None:
    model = network("resnet_basic")
    first = "resnet.embedder.embedder"
    before = {key: value.clone() for key, value in model.state_dict().items()}
    recalibrate_(model, IMAGES, batch_size=4)
    with torch.no_grad():
        seen = model.get_submodule(f"{first}.convolution")(torch.from_numpy(IMAGES))
    mean = model.get_submodule(f"{first}.normalization").get_buffer("running_mean")
    torch.testing.assert_close(mean, seen.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    changed = {
        key.rpartition(".")[2] for key, value in model.state_dict().items() if not torch.equal(value, before[key])
    }
    assert changed == {"running_mean", "running_var", "num_batches_tracked"}
    assert not any(module.training for module in model.modules())


def test_norms_are_not_measured_on_one_image() -> None:
    with pytest.raises(InvalidInput, match="on several images, got 1"):
        recalibrate_(network("resnet_basic"), IMAGES[:1])


def test_as_many_labels_as_images_are_needed() -> None:
    with pytest.raises(InvalidInput, match="8 images have 2 labels"):
        replace(task("resnet_basic"), labels=(0, 1))

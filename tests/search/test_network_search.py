"""DiLAP's search for networks: levels, costs of pairs and the quadratic model, each against what it stands for."""

import copy
import itertools
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from standins.encoders import encoder, texts
from standins.encoders import shape as encoder_shape
from standins.network_task import IMAGES, VALIDATION, task, task_of
from standins.networks import network, shape
from torch import nn

from dilap.core.errors import InvalidInput
from dilap.core.graph import Network
from dilap.core.groups import indices_kept
from dilap.core.shape import UNMIXED
from dilap.core.space import plan_of
from dilap.methods.networks.taylor import Taylor
from dilap.models.convolutional.cut import shrink_network_
from dilap.models.convolutional.norm_statistics import NormStatistics
from dilap.models.convolutional.readers import Passing, matrix_of, norms_behind, readers_of
from dilap.models.network import differences, outputs_of
from dilap.profilers.tables.networks.costs import counted
from dilap.search.limit import CostLimit
from dilap.search.method import Pruned
from dilap.search.network_task import NetworkTask
from dilap.search.networks.library import LibraryOptions, build_library, draw_scores
from dilap.search.networks.prune import Dilap, parameters_of, pruned, supernet_of
from dilap.search.networks.space import network_space
from dilap.search.networks.supernet import NetworkSupernet
from dilap.search.options import RelaxationOptions, SearchOptions

QUICK = SearchOptions(step=0.25, restarts=3, evaluations=2, relaxation=RelaxationOptions(steps=40))


def supernet(name: str) -> NetworkSupernet:
    return supernet_of(task(name), LibraryOptions())


def cut_as(asked: NetworkTask, found: Pruned[Network]) -> nn.Module:
    """The network that a job makes of what a method has found."""
    norms = NormStatistics.of(asked.model, IMAGES)
    cut = shrink_network_(copy.deepcopy(asked.model), found.plan, parameters=found.parameters)
    norms.put_(cut, indices_kept(found.plan.architecture.groups, found.plan.kept))
    return cut


def distance(asked: NetworkTask, found: Pruned[Network]) -> float:
    """The distance of the cut network from the dense one on the validation split."""
    with torch.no_grad():
        both = [outputs_of(one, torch.from_numpy(VALIDATION))[0] for one in (cut_as(asked, found), asked.model)]
    return float(differences(asked.model, *both).mean())


class Redundant(nn.Module):
    """Sixteen filters, every two of which are equal but for `noise`, read by another layer of which all matter."""

    def __init__(self, *, noise: float = 0.0, is_linear: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.is_linear = is_linear  # behind the second layer
        self.first, self.second = nn.Conv2d(3, 16, 3, stride=2), nn.Conv2d(16, 8, 3)
        self.head = nn.Linear(8, 7)
        with torch.no_grad():
            for tensor in self.first.parameters():
                tensor[1::2] = tensor[::2]
            self.first.weight += noise * torch.randn(self.first.weight.shape)
            self.head.weight *= 20

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        second = self.second(self.first(x).relu())
        logits: torch.Tensor = self.head((second if self.is_linear else second.relu()).mean((2, 3)))
        return logits


@pytest.mark.parametrize("name", ["lite", "unet", "regnet", "vit"])
def test_what_passes_through_a_layer_makes_the_gradient_of_its_weights(name: str) -> None:
    model, images = network(name).double(), torch.from_numpy(IMAGES[:3]).double()
    layers = {one.layer.name: one.layer for readers in readers_of(shape(name)).values() for one in readers}
    outputs_of(model, images)[0].square().sum().backward()
    frozen = network(name).double().requires_grad_(False)
    with Passing(frozen, layers, with_gradients=True) as passing:
        outputs = outputs_of(frozen, images)[0]
    gradients = torch.autograd.grad(outputs.square().sum(), [one.output for one in passing.passages])
    found = {layer: torch.zeros(1) for layer in layers}
    for one, gradient in zip(passing.passages, gradients, strict=True):
        product = one.gradients(gradient, 3) @ one.inputs(3).mT
        found[one.layer.name] = found[one.layer.name] + product.sum(0)
    for layer, product in found.items():
        wanted = model.get_parameter(f"{layer}.weight").grad
        assert wanted is not None
        torch.testing.assert_close(product, matrix_of(wanted, layers[layer]), rtol=1e-6, atol=1e-9)


def test_norms_are_those_behind_a_layer() -> None:
    model = network("lite")
    layers = {one.layer.name: one.layer for readers in readers_of(shape("lite")).values() for one in readers}
    found = norms_behind(model, layers, lambda: outputs_of(model, torch.from_numpy(IMAGES)))
    assert found["blocks.0.project"] == "blocks.0.project_norm"
    assert "head" not in found


@pytest.mark.parametrize("name", ["lite", "resnet_bottleneck", "unet"])
def test_the_cost_of_a_config_is_that_of_its_widths(name: str) -> None:
    asked = task(name)
    assert asked.costs is not None
    space = network_space(asked.network, asked.costs, widths=asked.widths)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        config = [int(torch.randint(len(choice.levels), (1,), generator=generator)) for choice in space.choices]
        assert space.cost(config) == pytest.approx(asked.costs.predict(space.widths(config)))
    assert space.cost(space.fastest) < 0.2 * space.cost(space.dense)


def test_the_groups_of_a_branch_are_one_choice_and_go_together() -> None:
    asked = task("resnet_bottleneck")
    assert asked.costs is not None
    space = network_space(asked.network, asked.costs, widths=asked.widths)
    together = [choice for choice in space.choices if len(choice.block.groups) == 2]
    assert len(together) == len(asked.network.branches)
    for choice in together:
        assert [level.counts for level in choice.levels if 0 in level.counts] == [(0, 0)]


def test_refitted_weights_are_least_squares_around_the_means() -> None:
    """Over all positions of all images, because they are fewer than are sampled, with a pull to the dense weights."""
    model = Redundant(noise=0.1).requires_grad_(False)
    asked = replace(task_of(model), images=IMAGES[..., :15, :15].copy())
    assert asked.costs is not None
    space = network_space(asked.network, asked.costs, widths=asked.widths)
    library = build_library(model, space, asked.images, options=LibraryOptions(ridge=0.01), seed=0)
    (patch,) = library.groups["first"][8].patches
    read = nn.functional.unfold(model.first(torch.from_numpy(asked.images)).relu(), 3).movedim(1, 2).flatten(0, 1)
    centred = (read - read.mean(0)).double()
    pull = (0.01 * centred.square().sum(0).mean()).sqrt() * torch.eye(centred.shape[1], dtype=torch.float64)
    rows = torch.cat([centred, pull])
    kept = [9 * unit + place for unit in library.groups["first"][8].units for place in range(9)]
    outputs = rows @ model.second.weight.flatten(1).T.double()
    wanted = torch.linalg.lstsq(rows[:, kept], outputs).solution.T
    assert patch.kept.tolist() == kept
    torch.testing.assert_close(patch.weight.double(), wanted, rtol=1e-3, atol=1e-4)  # in f32


def test_one_of_every_two_equal_filters_goes() -> None:
    units = supernet_of(task_of(Redundant()), LibraryOptions()).library.groups["first"][8].units
    assert sorted(unit // 2 for unit in units) == list(range(8))


def test_drawn_vectors_have_the_curvature_of_kl() -> None:
    logits = torch.tensor([[2.0, 0.0, -1.0]]).expand(20000, 3)
    drawn = draw_scores(nn.Identity(), logits, torch.Generator().manual_seed(0))
    p = logits[0].softmax(0)
    torch.testing.assert_close(drawn.T @ drawn / 20000, p.diag() - torch.outer(p, p), rtol=0.05, atol=2e-3)


@pytest.mark.parametrize("config", [(3, 0), (0, 3), (3, 3)])
def test_the_quadratic_model_is_the_kl_of_small_changes(config: tuple[int, int]) -> None:
    """A small step on the way to narrower layers: there the KL grows with the square of the way."""
    net = supernet_of(task_of(Redundant(noise=0.1)), LibraryOptions())
    curvature = net.curvature(net.space.dense, samples=300, seed=0)
    starts = net.chosen(net.space.dense).tolist()
    moved = torch.tensor([start + level for start, level in zip(starts, config, strict=True) if level])
    for name, there in net.matrices(config).items():
        matrix = net.dense[name] + 0.03 * (there - net.dense[name])
        net.write_(name, matrix, mean=net.library.means[name])
    predicted = 0.5 * float(curvature.Q[moved][:, moved].sum())
    assert predicted == pytest.approx(float(net.differences().mean()) / 0.03**2, rel=0.1)


def test_slopes_are_the_derivative_of_the_distance() -> None:
    """Around a config, towards the next level: against a small step on the way there."""
    net = supernet_of(task_of(Redundant()), LibraryOptions())
    config = (5, 3)
    curvature = net.curvature(config, samples=1, seed=0)
    target = net.chosen((6, 3))[0]
    weight = net.model.get_parameter("second.weight")
    bias = net.model.get_parameter("second.bias")
    here, there = net.matrices(config)["second"], net.matrices((6, 3))["second"]
    mean, values = net.library.means["second"], []
    for step in (-1e-2, 1e-2):
        with torch.no_grad():
            net.set((0, 0))
            net.set(config)
            weight.add_(step * (there - here).reshape(weight.shape))
            bias.add_(step * ((here - there) @ mean))
            wanted = net._wanted
            found = outputs_of(net.model, torch.from_numpy(VALIDATION))[0]
            values.append(float(differences(net.model, found, wanted).double().mean()))
    slope = (values[1] - values[0]) / 2e-2
    assert float(curvature.b[target]) == pytest.approx(slope, rel=0.05, abs=1e-5)


@pytest.mark.parametrize("name", ["lite", "resnet_bottleneck", "efficientnet", "unet", "vit"])
def test_the_network_at_a_config_is_the_one_that_is_cut(name: str) -> None:
    """Half of its residual branches are removed."""
    asked = task(name)
    net = supernet_of(asked, LibraryOptions())
    config = [
        len(choice.levels) - 1 if index % 2 and choice.levels[-1].is_removed else len(choice.levels) // 2
        for index, choice in enumerate(net.space.choices)
    ]
    net.set(config)
    with torch.no_grad():
        masked = outputs_of(net.model, torch.from_numpy(VALIDATION))[0]
    plan = plan_of(net.space, net.units(config), base="")
    cut = cut_as(asked, Pruned(plan=plan, parameters=parameters_of(net, tuple(config))))
    with torch.no_grad():
        torch.testing.assert_close(outputs_of(cut, torch.from_numpy(VALIDATION))[0], masked, rtol=1e-3, atol=1e-4)


def test_filters_that_others_make_up_for_are_removed_without_loss() -> None:
    asked = task_of(Redundant(), share=0.51)
    ours = pruned(asked, supernet_of(asked, LibraryOptions()), QUICK)
    theirs: Pruned[Network] = Pruned(plan=Taylor()(asked))
    assert ours.plan.counts == {"first": 8, "second": 8}
    assert distance(asked, ours) < 0.1 * distance(asked, theirs)


@pytest.mark.parametrize(("name", "share"), [("lite", 0.5), ("resnet_bottleneck", 0.6)])
def test_the_search_keeps_its_limit_and_leaves_the_model_as_it_was(name: str, share: float) -> None:
    asked = task(name, share=share, multiple=4)
    before = {key: value.clone() for key, value in asked.model.state_dict().items()}
    lines: list[str] = []
    found = pruned(replace(asked, report=lines.append), supernet_of(asked, LibraryOptions()), QUICK)
    used = asked.cost_limit.predict(found.plan.counts, UNMIXED) / asked.cost_limit.limit
    assert 0.75 <= used <= 1, f"{used:.2f}"
    assert {count % 4 for count in found.plan.counts.values()} == {0}
    assert all(torch.equal(value, before[key]) for key, value in asked.model.state_dict().items())
    assert any(line.startswith("exact selection, ") for line in lines)


class Counted:
    """Counts the answers that supernets compute; after `lives` of them the power goes off."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, lives: int = 10**9) -> None:
        self.answers, self.lives = 0, lives
        for name in ("_measured", "_linearised"):
            monkeypatch.setattr(NetworkSupernet, name, self._counting(getattr(NetworkSupernet, name)))

    def _counting(self, compute: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*given: Any) -> Any:
            if self.answers == self.lives:
                raise KeyboardInterrupt
            self.answers += 1
            return compute(*given)

        return counting


def searched(asked: NetworkTask) -> Pruned[Network]:
    return pruned(asked, supernet_of(asked, LibraryOptions()), QUICK)


def test_a_killed_search_goes_on_where_it_was_and_ends_with_the_same_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = task("lite", multiple=4)
    with monkeypatch.context() as patch:
        counted = Counted(patch)
        wanted = searched(replace(asked, cache=tmp_path / "whole"))
    whole = counted.answers
    with monkeypatch.context() as patch:
        Counted(patch, lives=whole - 2)
        with pytest.raises(KeyboardInterrupt):
            searched(replace(asked, cache=tmp_path / "killed"))
    with monkeypatch.context() as patch:
        patch.setattr("dilap.search.networks.library.layer_statistics", None)  # the levels are there already
        counted = Counted(patch)
        found = searched(replace(asked, cache=tmp_path / "killed"))
    assert counted.answers == 2
    assert found.plan == wanted.plan
    assert all(torch.equal(value, wanted.parameters[name]) for name, value in found.parameters.items())


def test_another_limit_shares_levels_and_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    searched(replace(task("lite", multiple=4), cache=tmp_path))
    monkeypatch.setattr("dilap.search.networks.library.layer_statistics", None)
    searched(replace(task("lite", multiple=4, share=0.7), cache=tmp_path))
    assert len(list(tmp_path.glob("journal-*"))) == 1


def test_levels_that_are_kept_are_those_that_were_fitted(tmp_path: Path) -> None:
    asked = task("resnet_bottleneck")
    fitted, *kept = (supernet_of(replace(asked, cache=cache), LibraryOptions()) for cache in (None, tmp_path, tmp_path))
    config = tuple(len(choice.levels) // 2 for choice in fitted.space.choices)
    for one in kept:
        assert one.units(config) == fitted.units(config)
        assert all(torch.equal(matrix, fitted.matrices(config)[name]) for name, matrix in one.matrices(config).items())


def test_an_encoder_of_texts_is_searched() -> None:
    costs = counted(encoder_shape("bert"), "operations")
    asked = NetworkTask(
        model=encoder("bert"),
        base="",
        network=costs.network,
        images=texts(8).numpy(),
        validation=texts(4).numpy(),
        costs=costs,
        cost_limit=CostLimit(limit=0.7 * costs.predict({}), predict=costs.predict),
    )
    lines: list[str] = []
    found = pruned(replace(asked, report=lines.append), supernet_of(asked, LibraryOptions()), QUICK)
    assert costs.predict(found.plan.counts) <= asked.cost_limit.limit
    assert re.fullmatch(r"round 1: limit 70\.0% of dense, cosine distance predicted [\d.]+, real [\d.]+", lines[0])


def test_it_needs_costs_of_all_widths() -> None:
    with pytest.raises(InvalidInput, match="needs the costs of all widths"):
        Dilap()(replace(task("lite"), costs=None))


def test_all_combinations_are_offered_to_few_groups() -> None:
    net = supernet("resnet_bottleneck")
    for choice in net.space.choices:
        own = [sorted({level.counts[i] for level in choice.levels} - {0}) for i in range(len(choice.block.groups))]
        offered = {level.counts for level in choice.levels if not level.is_removed}
        assert offered == set(itertools.product(*own))

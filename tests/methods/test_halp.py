"""HALP: the golden checks of its knapsack, its importance and its lookup of latencies, and that its limit is kept."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from standins.encoders import encoder, texts
from standins.fabricated import exactly
from standins.network_task import IMAGES, LABELS, task
from standins.networks import network, output, shape
from torch.nn import functional

from dilap.core.errors import Infeasible, Unsupported
from dilap.core.plan import full_plan
from dilap.methods.networks.halp import Halp
from dilap.methods.networks.halp_training import HalpTraining
from dilap.methods.networks.knapsack import Numbers, keep_augmented, keep_exactly
from dilap.models.convolutional.cut import shrink_network_
from dilap.models.convolutional.proof import masked_
from dilap.models.distil_network import cropped
from dilap.models.network import outputs_of
from dilap.search.network_task import NetworkTask, Scores

Keep = Callable[..., list[int]]
EXPAND, NORM = "blocks.0.expand", "blocks.0.expand_norm"  # of 32 channels


# The knapsack


def random_chunks(seed: int) -> tuple[list[Numbers], list[Numbers]]:
    """Values and costs of four groups of four chunks."""
    generator = np.random.default_rng(seed)
    values = [np.sort(generator.random(4))[::-1] for _ in range(4)]
    return values, [generator.integers(0, 20, 4).astype(float) for _ in values]


def sum_of(numbers: Sequence[Numbers], kept: Sequence[int]) -> float:
    return float(sum(part[:count].sum() for part, count in zip(numbers, kept, strict=True)))


def half_of(costs: Sequence[Numbers]) -> int:
    return int(sum(part.sum() for part in costs)) // 2


@pytest.mark.parametrize("seed", range(10))
def test_exact_selection_equals_brute_force(seed: int) -> None:
    values, costs = random_chunks(seed)
    budget = half_of(costs)
    allowed = (kept for kept in product(range(5), repeat=4) if sum_of(costs, kept) <= budget)
    best = max(sum_of(values, kept) for kept in allowed)
    found = keep_exactly(values, costs, budget=budget)
    assert sum_of(costs, found) <= budget
    assert sum_of(values, found) == pytest.approx(best)


@pytest.mark.parametrize("seed", range(10))
def test_the_augmented_knapsack_keeps_its_budget_and_is_no_better_than_the_exact_one(seed: int) -> None:
    values, costs = random_chunks(seed)
    budget = half_of(costs)
    found = keep_augmented(values, costs, budget=budget)
    assert sum_of(costs, found) <= budget
    assert 0 < sum_of(values, found) <= sum_of(values, keep_exactly(values, costs, budget=budget)) + 1e-9


def test_the_augmented_knapsack_adds_a_chunk_only_to_a_best_choice_that_has_the_chunk_before() -> None:
    """The first chunk of the second group is worth less than the first group's, and so its second one is lost too."""
    values, costs = [np.array([3.0]), np.array([2.9, 2.9])], [np.array([2.0]), np.array([2.0, 1.0])]
    assert keep_exactly(values, costs, budget=3) == [0, 2]
    assert keep_augmented(values, costs, budget=3) == [1, 0]


@pytest.mark.parametrize("keep", [keep_augmented, keep_exactly])
def test_everything_is_kept_within_the_full_latency(keep: Keep) -> None:
    values, costs = random_chunks(0)
    assert keep(values, costs, budget=sum_of(costs, [4] * 4)) == [4, 4, 4, 4]


@pytest.mark.parametrize("keep", [keep_augmented, keep_exactly])
def test_of_equal_costs_the_most_important_chunks_are_kept(keep: Keep) -> None:
    values, _ = random_chunks(0)
    kept = keep(values, [np.full(4, 3.0)] * 4, budget=3 * 7 + 0.1)  # costs are rounded up
    assert sum(kept) == 7
    assert sum_of(values, kept) == pytest.approx(np.sort(np.concatenate(values))[-7:].sum())


@pytest.mark.parametrize("keep", [keep_augmented, keep_exactly])
def test_without_a_budget_only_chunks_that_take_nothing_are_kept(keep: Keep) -> None:
    values, costs = [np.array([1.0, 1.0]), np.array([1.0])], [np.array([0.0, 2.0]), np.array([1.0])]
    assert keep(values, costs, budget=0.0) == [1, 0]


# What chunks are worth, and what they take


def test_importance_is_the_absolute_derivative_of_the_loss_by_a_units_scale() -> None:
    """Scale and shift of a unit in both of its batch norms are multiplied by a little more and a little less than 1."""
    importance, step = HalpTraining(task(), batch_size=8, rate=0.1, steps=1).run(1)[EXPAND], 1e-4
    draw = np.random.default_rng(0)
    rows = draw.permutation(8)
    crops, labels = cropped(IMAGES[rows], draw, 0.08).double(), torch.tensor(LABELS)[rows]
    for unit in (0, 7):
        losses = []
        for factor in (1 + step, 1 - step):
            model = network("lite").double().train()
            for norm in (NORM, "blocks.0.norm"):
                for name in ("weight", "bias"):
                    model.get_parameter(f"{norm}.{name}").data[unit] *= factor
            losses.append(functional.cross_entropy(outputs_of(model, crops)[0], labels, label_smoothing=0.1).item())
        slope = (losses[0] - losses[1]) / (2 * step)
        assert importance[unit].item() == pytest.approx(abs(slope), rel=2e-3, abs=1e-6)


def scores(**least: int) -> dict[str, torch.Tensor]:
    """The importance of a unit is its number, and in the groups of `least` that unit's is 0."""
    found = {one.name: 1.0 + torch.arange(one.num_units) for one in shape("lite").groups}
    for name, unit in least.items():
        found[name][unit] = 0.0
    return found


@pytest.mark.parametrize("knapsack", ["augmented", "exact"])
def test_a_budget_of_everything_keeps_everything(knapsack: str) -> None:
    given = task(share=1.0)
    plan = full_plan(given.network, base="")
    method = Halp(knapsack="exact" if knapsack == "exact" else "augmented")
    assert method.selected(given, plan, scores(), budget=given.cost_limit.limit * (1 + 1e-9)) == plan


@pytest.mark.parametrize("multiple", [1, 4])
def test_what_is_kept_of_a_group_are_its_most_important_units(multiple: int) -> None:
    given, importance = task(multiple=multiple), scores()
    plan = Halp().selected(given, full_plan(given.network, base=""), importance, budget=given.cost_limit.limit)
    for group in given.network.groups:
        count = plan.counts[group.name]
        assert plan.kept[group.name] == tuple(range(group.num_units - count, group.num_units))
        assert count in given.widths(group)
    assert len(set(plan.counts.values())) > 2


def test_the_first_layer_keeps_its_units_as_long_as_others_are_left() -> None:
    given = task(share=0.7)
    worthless = {**scores(), "stem": torch.zeros(8)}
    plan = Halp().selected(given, full_plan(given.network, base=""), worthless, budget=given.cost_limit.limit)
    assert plan.counts["stem"] == 8


def test_what_units_take_is_the_cost_of_the_layers_that_give_them() -> None:
    """All else equal, the budget without one layer's outputs is kept by all but this group's least important units."""
    given = task()
    dense = full_plan(given.network, base="")
    half = {**dense.counts, EXPAND: 16}
    saved = sum(
        given.require_costs().layer(layer.name, dense.counts) - given.require_costs().layer(layer.name, half)
        for layer in given.network.layers
        if layer.name in (EXPAND, "blocks.0.depthwise")
    )
    importance = {name: torch.full_like(one, 1e6) for name, one in scores().items()} | {EXPAND: scores()[EXPAND]}
    budget = given.cost_limit.cost(dense) - saved * 31 / 32  # half a unit more, because costs are rounded up
    plan = Halp().selected(given, dense, importance, budget=budget)
    assert {name: count for name, count in plan.counts.items() if count != dense.counts[name]} == {EXPAND: 16}


# The whole method


def test_a_limit_is_kept_and_what_is_cut_computes_what_was_trained() -> None:
    given = task()
    pruned = Halp(rounds=4, steps=2)(given)
    used = given.cost_limit.cost(pruned.plan) / given.cost_limit.limit
    assert 0.8 < used <= 1
    trained = network("lite")
    trained.load_state_dict(dict(pruned.parameters), strict=False)
    assert not torch.equal(trained.get_parameter("head.weight"), given.model.get_parameter("head.weight"))
    cut = shrink_network_(network("lite"), pruned.plan, parameters=pruned.parameters)
    masked_(trained, pruned.plan.architecture, pruned.plan.kept)
    torch.testing.assert_close(output(cut), output(trained), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("measured", "times"), [(0.97, 1), (1.01, 1), (0.7, 2)])
def test_only_a_limit_that_is_larger_by_more_than_a_round_is_trained_for_again(
    measured: float, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first plan takes so much of the budget as it is measured, and the second one all that is to be used."""
    given, answers, begun = task(), [measured, 0.98], list[int]()
    limit = replace(given.cost_limit, measure=lambda *_: exactly(answers.pop(0)))
    begin = HalpTraining.__init__

    def counted(training: HalpTraining, asked: NetworkTask, **options: Any) -> None:
        begun.append(1)
        begin(training, asked, **options)

    monkeypatch.setattr(HalpTraining, "__init__", counted)
    Halp(rounds=4, steps=1)(replace(given, cost_limit=limit))
    assert len(begun) == times


def test_units_that_are_removed_stay_so() -> None:
    training = HalpTraining(task(), batch_size=8, rate=10.0, steps=4)
    plan = Halp().selected(task(), full_plan(shape("lite"), base=""), training.run(1), budget=task().cost_limit.limit)
    training.remove(plan)
    training.run(3)
    gone = [unit for unit in range(32) if unit not in plan.kept[EXPAND]]
    tensors = training.tensors()
    assert len(gone) > 0
    for name in (f"{EXPAND}.weight", f"{NORM}.weight", f"{NORM}.bias", f"{NORM}.running_mean"):
        assert not tensors[name][gone].any(), name


def test_the_share_of_the_steps_is_at_least_one_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, run = list[int](), HalpTraining.run

    def counted(training: HalpTraining, steps: int) -> Scores:
        asked.append(steps)
        return run(training, 1)

    monkeypatch.setattr(HalpTraining, "run", counted)
    Halp(rounds=2, scale=0.25)(task())
    Halp(rounds=2, scale=0.001)(task())
    assert asked == [10, 10, 1, 1]


def test_a_batch_whose_loss_is_no_number_changes_nothing() -> None:
    training = HalpTraining(replace(task(), images=np.full_like(IMAGES, np.nan)), batch_size=8, rate=1.0, steps=1)
    before = network("lite").state_dict()
    assert not any(one.any() for one in training.run(1).values())
    parameters = dict(network("lite").named_parameters())
    assert all(torch.equal(value, before[name]) for name, value in training.tensors().items() if name in parameters)


def test_a_limit_that_is_too_small_is_infeasible() -> None:
    with pytest.raises(Infeasible, match="HALP cannot prune more"):
        Halp(rounds=2, steps=1)(task(share=0.001))


def test_networks_of_texts_are_refused() -> None:
    model = encoder("bert")
    with pytest.raises(Unsupported, match="this one takes texts"):
        Halp()(replace(task(), model=model, images=texts(8).numpy()))

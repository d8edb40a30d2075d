"""ZipLM, Puzzle and SPRINT: the golden checks of their specification."""

from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from standins.fabricated import exactly
from standins.models import exported_llama, logits, random_tokens, tiny_model, tiny_task
from torch.testing import assert_close
from transformers import PreTrainedModel

from dilap.core.errors import Mismatch, Unsupported
from dilap.core.rules import WidthRules
from dilap.methods.puzzle import Puzzle, contribution
from dilap.methods.sprint import Sprint
from dilap.methods.sublayer_damage import distance, tuned_projection
from dilap.methods.sublayer_removal import Removal
from dilap.methods.sublayer_seconds import saved_seconds
from dilap.methods.ziplm import ZipLm
from dilap.models.anatomy import decoder_layers, sublayers
from dilap.models.cut import shrink_
from dilap.models.families import family_of
from dilap.search.allocation import solve

TOKENS = random_tokens(2, 12, seed=3)


def deep_model(*, silent: int | None = None) -> PreTrainedModel:
    """Five layers; one sublayer, numbered 2 * layer + kind, may give nothing."""
    model = tiny_model("llama", num_hidden_layers=5)
    if silent is not None:
        family = family_of(model.config)
        path = family.ffn_out if silent % 2 else family.attention_out
        with torch.no_grad():
            decoder_layers(model)[silent // 2].get_parameter(f"{path}.weight").zero_()
    return model


# ZipLM and Puzzle


@pytest.mark.parametrize("seed", range(20))
def test_dynamic_program_equals_brute_force(seed: int) -> None:
    """Of ZipLM, SPDY and Puzzle alike: at most 6 layers of 4 levels."""
    generator = np.random.default_rng(seed)
    costs = [generator.random(4) for _ in range(5)]
    seconds = [sorted(generator.integers(0, 50, 4).tolist(), reverse=True) for _ in range(5)]
    limit = 0.6 * sum(part[0] for part in seconds) + 0.01
    if sum(min(part) for part in seconds) > limit:
        pytest.skip("no config fits")
    best = min(
        sum(costs[s][k] for s, k in enumerate(config))
        for config in product(range(4), repeat=5)
        if sum(seconds[s][k] for s, k in enumerate(config)) <= limit
    )
    config = solve(costs, seconds, limit=limit)
    assert sum(seconds[s][k] for s, k in enumerate(config)) <= limit
    assert sum(costs[s][k] for s, k in enumerate(config)) == pytest.approx(best)


def test_ziplm_more_weightings_are_no_worse() -> None:
    lines: list[str] = []
    kls = []
    for starts in (1, 12):
        ZipLm(starts=starts, failures=2)(tiny_task(deep_model(), report=lines.append))
        (said,) = [line for line in lines if line.startswith("SPDY")][-1:]
        kls.append(float(said.rpartition(" ")[2]))
    assert kls[1] <= kls[0]


def test_spdy_starts_a_corrected_limit_from_the_best_weightings_before_it() -> None:
    lines: list[str] = []
    task = tiny_task(deep_model(), report=lines.append)
    measured = iter([1.05, 0.99])
    cost_limit = replace(task.cost_limit, measure=lambda *_: exactly(next(measured)))
    ZipLm(starts=12, failures=0)(replace(task, cost_limit=cost_limit))
    first, corrected = (line.split(", ")[:2] for line in lines if line.startswith("SPDY"))
    assert first[0] == "SPDY: 12 weightings"
    assert corrected[0] == f"SPDY: {first[1].removesuffix(' configs')} weightings"


def test_puzzle_b_contribution_is_the_error_of_removing_one_channel_more() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, a = torch.randn(4, 6, generator=generator), torch.randn(9, 6, generator=generator)
    removed = [1, 4]
    lost = a[:, removed] @ weight[:, removed].T
    found = contribution(weight, a, lost)
    for channel in (0, 2, 3, 5):
        gone = [*removed, channel]
        assert_close(found[:, channel], (a[:, gone] @ weight[:, gone].T).norm(dim=1))


def test_puzzle_b_contribution_to_a_whole_block_is_activation_times_norm() -> None:
    weight, a = torch.randn(4, 6), torch.randn(9, 6)
    assert_close(contribution(weight, a, torch.zeros(9, 4)), a.abs() * weight.norm(dim=0))


def test_puzzle_ranks_are_a_permutation() -> None:
    ranks = Puzzle(steps=5).channel_ranks(torch.randn(4, 33), torch.randn(20, 33))
    assert sorted(ranks.tolist()) == list(range(33))


@pytest.mark.parametrize("objective", ["kl", "cosine"])
def test_puzzle_scores_are_those_of_single_replacements(objective: Any) -> None:
    """Against the evaluator, which knows nothing of resumed layers."""
    task = tiny_task(deep_model(), share=0.7)
    seen: list[tuple[list[list[float]], Any]] = []

    class Watched(Puzzle):
        def scores(self, task: Any, asked: Any, *, name: str) -> list[list[float]]:
            found = super().scores(task, asked, name=name)
            seen.append((found, asked))
            expected = asked.evaluator.kl((*(0,) * 3, 2, *(0,) * 6))
            if objective == "kl":
                assert found[3][2] == pytest.approx(expected, rel=1e-3)
            return found

    Watched(objective=objective)(task)
    ((found, asked),) = seen
    assert [len(levels) for levels in found] == [len(choice.levels) for choice in asked.space.choices]
    assert {levels[0] for levels in found} == {0.0}
    assert min(min(levels) for levels in found) > -1e-6


# SPRINT


def test_latency_solve() -> None:
    found = saved_seconds(dense=100, without={"ffn": 84, "attention": 92}, num_removed=4)
    assert found == {"ffn": 4, "attention": 2}


def test_sizing_example() -> None:
    """32 layers of 2 and 4 ms: 4 attention and 12 feed-forward sublayers give a speed-up of at least 1.41."""
    assert 192 / (192 - 2 * 4 - 4 * 11) < 1.41 <= 192 / (192 - 2 * 4 - 4 * 12)


def test_noise_that_saves_nothing_is_refused() -> None:
    with pytest.raises(Mismatch, match="removing attention sublayers saves no time"):
        saved_seconds(dense=100, without={"ffn": 84, "attention": 101}, num_removed=4)


def test_of_equal_sensitivities_the_dearer_kind_goes_first() -> None:
    task = tiny_task(deep_model())
    run = Removal(Sprint(tune=False), task, list(sublayers(task.model)))
    run.untuned = {s: (1.0 / run.seconds[("attention", "ffn")[s % 2]],) for s in range(9)}
    dearer = max(run.seconds, key=lambda kind: run.seconds[kind])
    chosen = run._choose(lambda _: None)
    assert chosen is not None
    assert ("attention", "ffn")[chosen % 2] == dearer


@pytest.mark.parametrize("ratio", [1.0, 0.5])
@pytest.mark.parametrize("seed", range(10))
def test_tuning_without_ridge_never_raises_the_squared_error(seed: int, ratio: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight, a = torch.randn(6, 10, generator=generator), torch.randn(50, 10, generator=generator)
    wanted = a @ torch.randn(10, 6, generator=generator) + 0.1 * torch.randn(50, 6, generator=generator)
    tuned = tuned_projection(weight, a, wanted, ridge=0.0, ratio=ratio)
    assert (a @ tuned.T - wanted).norm() <= (a @ weight.T - wanted).norm() * (1 + 1e-5)
    assert int((tuned != weight).any(1).sum()) == int(6 * ratio)


def test_tuning_is_least_squares() -> None:
    generator = torch.Generator().manual_seed(0)
    a, wanted = torch.randn(50, 10, generator=generator), torch.randn(50, 6, generator=generator)
    expected = torch.linalg.lstsq(a, wanted).solution.T
    assert_close(tuned_projection(torch.zeros(6, 10), a, wanted, ridge=0.0), expected, rtol=1e-3, atol=1e-4)


def test_strong_ridge_keeps_the_weights() -> None:
    weight, a, wanted = torch.randn(6, 10), torch.randn(50, 10), torch.randn(50, 6)
    assert_close(tuned_projection(weight, a, wanted, ridge=1e5), weight, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("tune", [True, False])
def test_checkpoints_change_no_choice(tune: bool) -> None:
    removed = [
        Sprint(checkpoints=checkpoints, tune=tune)(tiny_task(deep_model(), share=0.6)).facts["removed_sublayers"]
        for checkpoints in (0, 8)
    ]
    assert all(one == removed[0] for one in removed)


@pytest.mark.parametrize("silent", [2, 3, 5])
def test_a_sublayer_that_adds_nothing_goes_first(silent: int) -> None:
    model = deep_model(silent=silent)
    found = Sprint(tune=False)(tiny_task(model, share=0.9))
    name = f"layers.{silent // 2}.{('attention', 'ffn')[silent % 2]}"
    assert found.facts["removed_sublayers"][0] == name


def test_removal_stops_at_the_first_plan_that_keeps_the_target() -> None:
    task = tiny_task(deep_model(), share=0.6)
    outs = list(sublayers(task.model))
    run = Removal(Sprint(tune=False), task, outs)
    costs = []
    for plan in run.plans():
        costs.append(task.cost_limit.cost(plan))
        if costs[-1] <= task.cost_limit.limit:
            break
    assert costs == sorted(costs, reverse=True)
    assert len(Sprint(tune=False)(task).facts["removed_sublayers"]) == len(costs) - 1


def test_last_ffn_is_never_removed() -> None:
    task = tiny_task(deep_model())
    *_, last = Removal(Sprint(tune=False), task, list(sublayers(task.model))).plans()
    assert last.all_widths()[4].num_channels == 96


def test_sensitivity_is_the_error_behind_the_next_ffn() -> None:
    """Of the attention in layer 1: streams with and without it, after that layer's feed-forward network."""
    task = tiny_task(deep_model())
    run = Removal(Sprint(), task, list(sublayers(task.model)))
    run._score_all(lambda _: None)
    streams = []
    for plan in (task.without([]), task.without([task.blocks[2]])):
        model = shrink_(deep_model(), plan)
        found: list[torch.Tensor] = []
        hook = decoder_layers(model)[1].register_forward_hook(
            lambda _m, _i, out, found=found: found.append(out[0] if isinstance(out, tuple) else out)
        )
        logits(model, task.text.train)
        hook.remove()
        streams.append(found[0])
    expected = distance(streams[0], streams[1], kind="l1", norm="sentence") / run.seconds["attention"]
    assert run.untuned[2] == pytest.approx((expected,), rel=1e-3)


def test_tuned_models_are_nearer_to_the_dense_one() -> None:
    tokens = tiny_task(deep_model()).text.train
    dense = logits(deep_model(), tokens)
    errors = []
    for tune in (False, True):
        found = Sprint(tune=tune, candidates=1)(tiny_task(deep_model(), share=0.8))
        model = shrink_(deep_model(), found.plan, parameters=found.parameters)
        errors.append(float((logits(model, tokens) - dense).square().mean()))
    assert errors[1] < errors[0]


def test_tuning_knows_the_factor_of_a_sublayers_output() -> None:
    """Granite halves its sublayers' outputs; the Llama that computes the same has halved projections instead."""
    models = tiny_model("granite"), exported_llama(tiny_model("granite"))
    granite, llama = (Removal(Sprint(), tiny_task(one), list(sublayers(one)))._tune(0) for one in models)
    assert_close(0.5 * granite.weight, llama.weight, rtol=1e-3, atol=1e-3)  # f32 sums of other numbers, then solved
    assert granite.importances == pytest.approx(llama.importances, rel=1e-3)


@pytest.mark.parametrize("norm", ["sentence", "token", "channel", "element", "none"])
def test_distances_to_oneself_are_zero(norm: Any) -> None:
    y = torch.randn(2, 3, 4)
    for kind in ("l1", "l2", "cos"):
        assert distance(y, y, kind=kind, norm=norm) == pytest.approx(0, abs=1e-5)
        assert distance(y, -y, kind=kind, norm=norm) > 0


def test_and_l2_are_what_they_are_called() -> None:
    y, x = torch.tensor([[[3.0, 4.0]]]), torch.tensor([[[0.0, 0.0]]]) + torch.tensor([0.0, 4.0])
    assert distance(y, x, kind="l1", norm="sentence") == pytest.approx(3 / 7)
    assert distance(y, x, kind="l2", norm="sentence") == pytest.approx(3 / 5)


def test_runtime_without_missing_sublayers_is_unsupported_before_any_work() -> None:
    with pytest.raises(Unsupported, match="SPRINT removes single sublayers"):
        Sprint()(tiny_task(deep_model(), rules=WidthRules(ffn_removal=False)))

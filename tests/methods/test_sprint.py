"""SPRINT's settings: what its authors' command takes, one by one."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from standins.fabricated import exactly
from standins.models import tiny_model, tiny_task
from transformers import PreTrainedModel

from dilap.core.errors import Infeasible, InvalidInput
from dilap.core.measurement import Interval
from dilap.methods.sprint import Sprint
from dilap.methods.sublayer_damage import Metric, distance, ranked, tuned_projection
from dilap.methods.sublayer_removal import Removal
from dilap.methods.sublayer_seconds import generation_seconds
from dilap.models.anatomy import sublayers
from dilap.models.reference import perplexity
from dilap.search.method import PruneTask


def deep_model() -> PreTrainedModel:
    return tiny_model("llama", num_hidden_layers=5)


def removed_by(task: PruneTask, **settings: Any) -> list[str]:
    found: list[str] = Sprint(**settings)(task).facts["removed_sublayers"]
    return found


@pytest.mark.parametrize("number", [1, 3])
def test_as_many_sublayers_are_removed_as_asked(number: int) -> None:
    task = tiny_task(deep_model(), share=0.999)
    assert len(removed_by(task, tune=False, num_remove=number)) == number


def test_more_sublayers_than_can_be_removed_are_infeasible() -> None:
    with pytest.raises(Infeasible, match="SPRINT can remove 8 sublayers of this model, 10 are asked for"):
        Sprint(tune=False, num_remove=10)(tiny_task(deep_model()))


def test_without_latency_the_change_alone_counts() -> None:
    task = tiny_task(deep_model())
    aware, unaware = (
        Removal(Sprint(tune=False, latency_aware=one), task, list(sublayers(task.model))) for one in (True, False)
    )
    for run in (aware, unaware):
        run._score_all(lambda _: None)
    assert set(unaware.seconds.values()) == {1.0}
    for sublayer, (damage,) in unaware.untuned.items():
        kind = ("attention", "ffn")[sublayer % 2]
        assert aware.untuned[sublayer] == pytest.approx((damage / aware.seconds[kind],))


def test_ranks_by_several_metrics_are_summed() -> None:
    """Ranks 0 1 2 3 and 3 0 1 2: the second is the best of both; of equal sums the earlier one goes first."""
    damages = {4: (1.0, 9.0), 5: (2.0, 1.0), 6: (3.0, 2.0), 7: (4.0, 3.0)}
    assert ranked(damages) == [5, 4, 6, 7]
    assert ranked({one: (values[0],) for one, values in damages.items()}) == [4, 5, 6, 7]


def test_metrics_are_named_as_the_authors_do() -> None:
    assert Metric.parse("l2_sentence") == Metric(distance="l2", norm="sentence")
    assert Metric.parse("cos_None") == Metric.parse("cos") == Metric(distance="cos", norm="none")
    with pytest.raises(InvalidInput, match="metric 'l3_token' is none of l1, l2, cos with _ and sentence, token"):
        Sprint(metrics="l1_token,l3_token")


@pytest.mark.parametrize(("tuned", "kinds"), [("ffn", {1}), ("attention", {0}), ("next", {0, 1})])
def test_the_sublayer_that_is_tuned_is_the_next_one_of_its_kind(tuned: Any, kinds: set[int]) -> None:
    task = tiny_task(deep_model())
    run = Removal(Sprint(tuned=tuned), task, list(sublayers(task.model)))
    ends = [run._end(s) for s in range(6)]
    expected = [next(s for s in range(one + 1, 10) if s % 2 in kinds) for one in range(6)]
    assert ends == expected
    found = Sprint(tuned=tuned, candidates=1)(tiny_task(deep_model(), share=0.9))
    paths = {"o_proj" in name for name in found.parameters}
    assert paths <= {kind == 0 for kind in kinds}
    assert found.parameters


def test_without_a_tuned_sublayer_the_change_is_that_of_its_own_output() -> None:
    task = tiny_task(deep_model())
    outs = list(sublayers(task.model))
    run = Removal(Sprint(tuned="none"), task, outs)
    run._score_all(lambda _: None)
    entering, leaving = run._entering(9), run._entering(10)
    expected = sum(distance(y, x, kind="l1", norm="sentence") for y, x in zip(leaving, entering, strict=True))
    assert run.untuned[9] == pytest.approx((expected / run.seconds["ffn"],))
    assert not Sprint(tuned="none")(tiny_task(deep_model())).parameters


def test_tuned_projections_may_be_left_out_of_the_model() -> None:
    found = Sprint(update_tuned=False, candidates=1)(tiny_task(deep_model(), share=0.8))
    assert found.facts["removed_sublayers"]
    assert not found.parameters


@pytest.mark.parametrize("ratio", [1.0, 0.5])
@pytest.mark.parametrize("seed", range(5))
def test_tuning_input_columns_never_raises_the_squared_error(seed: int, ratio: float) -> None:
    """With what the other columns give subtracted from the target, which the authors leave out."""
    generator = torch.Generator().manual_seed(seed)
    weight, a = torch.randn(6, 10, generator=generator), torch.randn(50, 10, generator=generator)
    wanted = a @ torch.randn(10, 6, generator=generator) + 0.1 * torch.randn(50, 6, generator=generator)
    tuned = tuned_projection(weight, a, wanted, ridge=0.0, ratio=ratio, direction="in_channel")
    assert (a @ tuned.T - wanted).norm() <= (a @ weight.T - wanted).norm() * (1 + 1e-5)
    assert int((tuned != weight).any(0).sum()) == int(10 * ratio)


def test_perplexities_are_told_at_steps_and_speedups() -> None:
    task = tiny_task(deep_model(), share=0.6)
    found = Sprint(tune=False, eval_steps="0,2", eval_speedups="1.1")(task)
    names = {"0 sublayers removed", "2 sublayers removed", "predicted speed-up 1.1"}
    assert set(found.facts["perplexities"]) == names
    dense = perplexity(task.model, task.text.validation)
    assert found.facts["perplexities"]["0 sublayers removed"] == pytest.approx(dense, rel=1e-5)
    with pytest.raises(InvalidInput, match="eval_steps are numbers with commas between them, got 'few'"):
        Sprint(eval_steps="few")


def test_generation_is_timed_once_to_warm_up_and_then_as_often_as_asked() -> None:
    """Ticks of one second: every run starts and ends with one, and reads a prompt and 4 tokens."""
    model, ticks, calls = deep_model(), iter(range(100)), []
    model.register_forward_pre_hook(lambda _, __, keywords: calls.append(keywords["input_ids"].shape), with_kwargs=True)
    blocks = [one.block for one in sublayers(model)][2:4]
    seconds = generation_seconds(
        model, blocks, prompt_tokens=6, new_tokens=4, batch=2, iterations=3, clock=lambda: float(next(ticks))
    )
    assert seconds == 1.0
    assert [tuple(shape) for shape in calls] == 4 * [(2, 6), *[(2, 1)] * 4]


def test_latencies_are_measured_when_asked() -> None:
    """A device on which attention costs three times what the table says, by its share of the budget."""
    model = deep_model()
    task = tiny_task(model)
    predict = task.cost_limit.predict
    dense = predict(task.architecture.layers)

    def measure(architecture: Any, _: object) -> Interval:
        gone = sum(one.num_heads == 0 for one in architecture.layers)
        return exactly(float((predict(architecture.layers) - 2e-3 * gone) / task.cost_limit.limit))

    measured = replace(task, cost_limit=replace(task.cost_limit, measure=measure))
    outs = list(sublayers(model))
    by_table, by_device = (
        Removal(one, measured, outs).seconds for one in (Sprint(tune=False), Sprint(tune=False, latency="device"))
    )
    assert dense > 0
    assert by_device["ffn"] == pytest.approx(by_table["ffn"])
    assert by_device["attention"] == pytest.approx(by_table["attention"] + 2e-3)


def test_batches_and_places_change_no_choice() -> None:
    task = tiny_task(deep_model(), share=0.7)
    first = removed_by(task, tune=False)
    assert removed_by(task, tune=False, batch_sequences=3, host_layers=2, compute_on="cpu") == first


def test_a_gpu_that_is_not_there_is_named() -> None:
    with pytest.raises(InvalidInput, match="no device 'cuda:7' to compute on here"):
        Sprint(compute_on="cuda:7")

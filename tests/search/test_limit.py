"""A budget is met by any method: knobs are bisected, plans tried in turn, and limits corrected by what is measured."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import pytest
from standins.fabricated import TINY_LAYER, exactly, tiny_llama

from dilap.core.errors import Infeasible
from dilap.core.measurement import Interval
from dilap.core.plan import Plan, full_plan
from dilap.core.shape import UNMIXED, Architecture, LayerWidths
from dilap.search.limit import CostLimit

ARCHITECTURE = tiny_llama(*(TINY_LAYER,) * 10)


def cost(widths: Sequence[LayerWidths], _: Mapping[str, str] = UNMIXED) -> float:
    return float(sum(layer.num_channels for layer in widths))


def plan_of(num_channels: int, *, layers: int = 10) -> Plan:
    """Every layer with `num_channels`, the last ones removed."""
    full = full_plan(ARCHITECTURE, base="base")
    kept = dict(full.kept)
    for layer in range(10):
        kept[f"layers.{layer}.channels"] = tuple(range(num_channels if layer < layers else 0))
        if layer >= layers:
            kept[f"layers.{layer}.kv_groups"] = ()
    return replace(full, kept=kept)


def at(ratio: float) -> Plan:
    return plan_of(64 - round(60 * ratio))


def shrinking(made: list[int]) -> Iterator[Plan]:
    for layers in range(10, 0, -1):
        made.append(layers)
        yield plan_of(64, layers=layers)


def share_of(limit: float, *, factor: float) -> CostLimit:
    """A device on which everything takes `factor` of what the table says."""

    def measure(architecture: Architecture, _: Mapping[str, str]) -> Interval:
        return exactly(factor * cost(architecture.layers) / limit)

    return CostLimit(limit=limit, predict=cost, measure=measure)


def test_bisection_finds_the_largest_plan_within_the_limit() -> None:
    cost_limit = CostLimit(limit=333.0, predict=cost)
    assert cost(cost_limit.bisect(at).all_widths()) == 330


def test_bisection_keeps_everything_where_the_limit_allows_it() -> None:
    assert CostLimit(limit=640.0, predict=cost).bisect(at) == plan_of(64)


def test_bisection_beyond_the_knob_is_infeasible() -> None:
    with pytest.raises(Infeasible, match=r"the smallest plan takes 200.0% of what is allowed"):
        CostLimit(limit=20.0, predict=cost).bisect(at)


@pytest.mark.parametrize("factor", [0.8, 1.25])
def test_limit_is_corrected_by_the_measured_gap(factor: float) -> None:
    used = factor * cost(share_of(400.0, factor=factor).bisect(at).all_widths()) / 400
    assert 0.95 <= used <= 1.0


def test_first_is_the_largest_of_the_plans_within_the_limit() -> None:
    made: list[int] = []
    assert CostLimit(limit=400.0, predict=cost).first(shrinking(made)) == plan_of(64, layers=6)
    assert made == [10, 9, 8, 7, 6]


def test_first_goes_on_where_measuring_asks_for_a_smaller_plan() -> None:
    made: list[int] = []
    assert share_of(400.0, factor=1.3).first(shrinking(made)) == plan_of(64, layers=4)
    assert made[-1] == 4


def test_first_goes_back_where_measuring_leaves_room() -> None:
    assert share_of(400.0, factor=0.7).first(shrinking([])) == plan_of(64, layers=8)


def test_too_few_plans_are_infeasible() -> None:
    with pytest.raises(Infeasible, match="this method cannot prune more"):
        CostLimit(limit=32.0, predict=cost).first(shrinking([]))


def test_best_attempt_is_kept_where_corrections_run_out() -> None:
    """A device on which every plan misses: the nearest one is returned, not an error."""
    cost_limit = CostLimit(limit=400.0, predict=cost, measure=lambda one, _: exactly(1.1 + 1e-6 * cost(one.layers)))
    assert cost_limit.cost(cost_limit.bisect(at)) < 400


def test_a_prediction_stands_where_the_device_was_disturbed() -> None:
    seen: list[Architecture] = []
    cost_limit = CostLimit(limit=390.0, predict=cost, measure=lambda one, _: seen.append(one), aim=0.975)
    assert (cost(cost_limit.bisect(at).all_widths()), len(seen)) == (390, 1)


def test_added_biases_are_measured_too() -> None:
    seen: list[Architecture] = []

    def measure(architecture: Architecture, _: Mapping[str, str]) -> Interval:
        seen.append(architecture)
        return exactly(0.99)

    CostLimit(limit=400.0, predict=cost, measure=measure).bisect(at, output_biases=True)
    assert [(one.out_bias, one.ffn_out_bias) for one in seen] == [(True, True)]


def test_plans_are_predicted_and_measured_in_their_precisions() -> None:
    """The second layer is deleted, so the third one is the second of the network that is measured."""
    seen: list[Mapping[str, str]] = []

    def measure(_: Architecture, precisions: Mapping[str, str]) -> Interval:
        seen.append(precisions)
        return exactly(0.99)

    def predict(_: Sequence[LayerWidths], precisions: Mapping[str, str] = UNMIXED) -> float:
        return 100.0 - len(precisions)

    kept = {**plan_of(64).kept, "layers.1.channels": (), "layers.1.kv_groups": ()}
    plan = replace(plan_of(64), kept=kept, precisions={"layers.1.ffn": "f16", "layers.2.ffn": "q4_0", "head": "q8_0"})
    assert CostLimit(limit=97.0, predict=predict, measure=measure).first([plan]) == plan
    assert seen == [{"layers.1.ffn": "q4_0", "head": "q8_0"}]


def test_one_noisy_measurement_corrects_a_good_table_by_its_weight() -> None:
    """A table that is right to 2 % and a share that is known to 2 % (both standard deviations) meet half-way."""
    chosen: list[float] = []

    def choose(limit: float) -> float:
        chosen.append(limit)
        return limit

    shares = iter([Interval(value=0.8, low=0.768, high=0.832), exactly(0.99)])
    limit = CostLimit(limit=1.0, predict=cost, error=0.02, measure=lambda *_: next(shares))
    limit.meet(choose, cost=float, architecture=lambda one: one)
    assert chosen == pytest.approx([1.0, 2 / (1 + 0.82)])

"""Allocation under a latency limit, against brute force on small problems."""

from dataclasses import replace
from itertools import pairwise, product

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from standins.allocations import Table, random_quadratic, random_table, space_of

from dilap.core.errors import Infeasible, Unsupported
from dilap.core.space import Coupling, Space
from dilap.search.allocation import (
    Config,
    ExpectedCost,
    Quadratic,
    move,
    move_gains,
    project,
    relax,
    solve,
    swap,
)
from dilap.search.dilap import allocate
from dilap.search.options import RelaxationOptions, SearchOptions
from dilap.search.selection import select

UNIT = 2.0**-30  # seconds; sums of it are exact
BUCKETS = 20_000
SEEDS = range(8)


def every_config(table: Table) -> list[Config]:
    return list(product(*(range(len(row)) for row in table)))


def feasible(space: Space, table: Table, limit: float) -> list[Config]:
    return [config for config in every_config(table) if space.cost(config) <= limit]


def middle(space: Space) -> float:
    """A limit half-way between the slowest and the fastest config."""
    return (space.cost(space.dense) + space.cost(space.fastest)) / 2


def random_costs(seed: int, table: Table) -> list[NDArray[np.float64]]:
    generator = np.random.default_rng(100 + seed)
    return [generator.uniform(0, 1, len(row)) for row in table]


def cost_of(costs: list[NDArray[np.float64]], config: Config) -> float:
    return float(sum(part[level] for part, level in zip(costs, config, strict=True)))


@pytest.mark.parametrize("seed", SEEDS)
def test_solution_is_the_best_where_seconds_fill_buckets(seed: int) -> None:
    generator = np.random.default_rng(seed)
    table: Table = [tuple(generator.integers(0, BUCKETS // 2, 4) * UNIT) for _ in range(5)]
    costs, limit = random_costs(seed, table), BUCKETS * UNIT
    fitting = [c for c in every_config(table) if sum(row[k] for row, k in zip(table, c, strict=True)) <= limit]
    assert solve(costs, table, limit=limit) == min(fitting, key=lambda config: cost_of(costs, config))


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("seed", SEEDS)
def test_solution_is_no_worse_than_the_best_with_rounding_taken_off(seed: int, share: float) -> None:
    table = random_table(seed)
    space, costs = space_of(table), random_costs(seed, table)
    fastest, slowest = space.cost(space.fastest), space.cost(space.dense)
    limit = fastest + share * (slowest - fastest)
    config = solve(costs, table, limit=limit)
    assert space.cost(config) <= limit * (1 + 1e-12)
    rounded = limit - len(table) * limit / BUCKETS
    assert cost_of(costs, config) <= min(cost_of(costs, c) for c in feasible(space, table, rounded)) + 1e-12


def test_slack_of_rounding_is_filled() -> None:
    """The faster levels alone are rounded up beyond the limit; they fit exactly."""
    row = (0.5 + 1e-6, 0.5)
    assert solve([np.array([0.0, 1.0])] * 2, [row, row], limit=1.0 + 1.5e-6) in {(0, 1), (1, 0)}


def test_limit_of_the_fastest_config_is_feasible() -> None:
    table = random_table(0)
    space = space_of(table)
    assert solve(random_costs(0, table), table, limit=space.cost(space.fastest)) == space.fastest


def test_limit_of_nothing_allows_only_free_levels() -> None:
    assert solve([np.array([0.0, 1.0])], [(1e-3, 0.0)], limit=0.0) == (1,)


def test_generous_limit_gives_the_cheapest_levels() -> None:
    table = random_table(0)
    costs = random_costs(0, table)
    assert solve(costs, table, limit=1.0) == tuple(int(part.argmin()) for part in costs)


@pytest.mark.parametrize("limit", [0.9e-3, 0.0, -1.0])
def test_impossible_limit_is_infeasible(limit: float) -> None:
    with pytest.raises(Infeasible, match="even the smallest levels take more"):
        solve([np.zeros(2)], [(2e-3, 1e-3)], limit=limit)


def test_fixed_seconds_count_towards_the_limit() -> None:
    space = space_of([(2.0, 1.0)], fixed_cost=5.0)
    quadratic = Quadratic(b=torch.tensor([0.0, 1.0]), Q=torch.zeros(2, 2), sizes=(2,))
    assert project(quadratic, space, limit=6.5) == (1,)
    assert project(quadratic, space, limit=7.0) == (0,)
    with pytest.raises(Infeasible):
        project(quadratic, space, limit=5.5)


def test_value_is_the_quadratic_form_of_the_chosen_levels() -> None:
    table = random_table(0)
    quadratic = random_quadratic(0, table)
    config = (0, 3, 1, 2, 3)
    one_hot = torch.zeros(len(quadratic.b))
    one_hot[[offset + level for offset, level in zip(quadratic.offsets, config, strict=True)]] = 1
    expected = quadratic.b @ one_hot + 0.5 * one_hot @ quadratic.Q @ one_hot
    assert quadratic.value(config) == pytest.approx(float(expected), rel=1e-5)


def test_shrinkage_keeps_the_diagonal() -> None:
    quadratic = random_quadratic(0, random_table(0))
    shrunk = quadratic.shrunk(num_rows=60, num_changes=20)  # three quarters of the interactions stay
    assert torch.allclose(shrunk.Q.diagonal(), quadratic.Q.diagonal())
    assert float(shrunk.Q[0, 7]) == pytest.approx(0.75 * float(quadratic.Q[0, 7]))
    assert float(shrunk.Q[3, 7]) == pytest.approx(0.75 * float(quadratic.Q[3, 7]))


@pytest.mark.parametrize("seed", range(3))
def test_move_gains_are_differences_of_the_value(seed: int) -> None:
    table = random_table(seed, choices=4, levels=3)
    quadratic, space = random_quadratic(seed, table), space_of(table)
    config, limit = (1, 2, 0, 1), middle(space)
    gains = move_gains(quadratic, space, config, limit=limit)
    owner = [choice for choice, size in enumerate(quadratic.sizes) for _ in range(size)]
    for index, gain in enumerate(gains.reshape(-1).tolist()):
        i, j = divmod(index, len(owner))
        moved = move(quadratic, config, index)
        if owner[i] == owner[j] or moved == config or space.cost(moved) > limit + 1e-12:
            assert gain == float("inf")
        else:
            assert gain == pytest.approx(quadratic.value(moved) - quadratic.value(config), abs=1e-5)


@pytest.mark.parametrize("seed", SEEDS)
def test_swap_keeps_the_limit_and_ends_in_an_optimum_of_pairs(seed: int) -> None:
    table = random_table(seed)
    quadratic, space = random_quadratic(seed, table), space_of(table)
    limit = middle(space)
    start = project(quadratic.diagonal_only(), space, limit=limit)
    found = swap(quadratic, space, start, limit=limit)
    assert space.cost(found) <= limit * (1 + 1e-12)
    assert quadratic.value(found) <= quadratic.value(start) + 1e-6
    neighbours = [c for c in feasible(space, table, limit) if sum(a != b for a, b in zip(c, found, strict=True)) <= 2]
    assert quadratic.value(found) <= min(map(quadratic.value, neighbours)) + 1e-5


def expectation(space: Space, p: torch.Tensor) -> float:
    seconds = torch.tensor([level.cost for choice in space.choices for level in choice.levels])
    return space.fixed_cost + float(p @ seconds)


def test_relaxation_gives_a_distribution_for_every_choice() -> None:
    table = random_table(0)
    space = space_of(table)
    (p,) = relax(random_quadratic(0, table), space, limit=middle(space), starts=[()], options=RelaxationOptions())
    assert [float(part.sum()) for part in p.split([4] * 5)] == pytest.approx([1.0] * 5, abs=1e-5)


def test_relaxation_keeps_the_limit_in_expectation() -> None:
    """Nearly: at the last temperature the levels are all but chosen, and a few choices make coarse steps."""
    excess = []
    for seed in SEEDS:
        table = random_table(seed)
        space = space_of(table, fixed_cost=1e-3)
        limit, starts = middle(space), [(), space.dense, space.fastest]
        found = relax(random_quadratic(seed, table), space, limit=limit, starts=starts, options=RelaxationOptions())
        excess.append(max(expectation(space, p) for p in found) / limit - 1)
    assert sum(value <= 0.02 for value in excess) >= 7, excess
    assert max(excess) <= 0.1


def test_relaxation_finds_the_best_vertex_in_most_problems() -> None:
    found = 0
    for seed in SEEDS:
        table = random_table(seed)
        quadratic, space = random_quadratic(seed, table), space_of(table)
        limit = middle(space)
        best = min(map(quadratic.value, feasible(space, table, limit)))
        starts = [(), space.dense, space.fastest]
        projected = [
            project(quadratic, space, limit=limit, probabilities=p)
            for p in relax(quadratic, space, limit=limit, starts=starts, options=RelaxationOptions())
        ]
        found += min(map(quadratic.value, projected)) <= best + 1e-5
    assert found >= 6, f"{found} of 8"


def test_relaxation_without_a_binding_limit_goes_to_the_free_optimum() -> None:
    table = random_table(0)
    quadratic, space = random_quadratic(0, table), space_of(table)
    (p,) = relax(quadratic, space, limit=1.0, starts=[()], options=RelaxationOptions())
    config = tuple(int(part.argmax()) for part in p.split(list(quadratic.sizes)))
    assert quadratic.value(config) == pytest.approx(min(map(quadratic.value, every_config(table))), abs=1e-5)


@pytest.mark.parametrize("seed", SEEDS)
def test_allocation_is_the_best_by_brute_force(seed: int) -> None:
    table = random_table(seed)
    quadratic, space = random_quadratic(seed, table), space_of(table)
    limit = middle(space)
    config = allocate(quadratic, space, limit=limit, previous=space.dense, options=SearchOptions())
    assert space.cost(config) <= limit * (1 + 1e-12)
    assert quadratic.value(config) <= min(map(quadratic.value, feasible(space, table, limit))) + 1e-5


def duplicates() -> tuple[Quadratic, Space]:
    """The first two layers do the same: without one nothing is lost but 1, without both 4; the third costs 2.5."""
    Q = torch.zeros(6, 6)
    Q[1, 1] = Q[3, 3] = Q[1, 3] = Q[3, 1] = 2.0
    Q[5, 5] = 5.0
    return Quadratic(b=torch.zeros(6), Q=Q, sizes=(2, 2, 2)), space_of([(1.0, 0.0)] * 3)


def test_table_of_single_losses_drops_both_duplicate_layers() -> None:
    quadratic, space = duplicates()
    options = SearchOptions(cross_terms=False)
    config = allocate(quadratic.diagonal_only(), space, limit=1.0, previous=space.dense, options=options)
    assert config == (1, 1, 0)


def test_interactions_drop_one_of_two_duplicate_layers() -> None:
    quadratic, space = duplicates()
    config = allocate(quadratic, space, limit=1.0, previous=space.dense, options=SearchOptions())
    assert sorted(config[:2]) == [0, 1]
    assert config[2] == 1


def coupled_space(seed: int, table: Table) -> Space:
    """A space in which every choice has a cost with the next one, a product of widths as a convolution's is."""
    generator = np.random.default_rng(200 + seed)
    widths = [np.linspace(1, 0.1, len(row)) for row in table]
    couplings = tuple(
        Coupling(
            first=index,
            second=index + 1,
            costs=tuple(map(tuple, (generator.uniform(0.5, 1.5) * 1e-3 * np.outer(one, two)).tolist())),
        )
        for index, (one, two) in enumerate(pairwise(widths))
    )
    return replace(space_of(table), couplings=couplings)


def test_costs_of_pairs_are_part_of_a_config_s_cost() -> None:
    space = coupled_space(0, random_table(0))
    own = sum(choice.levels[1].cost for choice in space.choices)
    pairs = sum(one.costs[1][1] for one in space.couplings)
    assert space.cost((1,) * len(space.choices)) == pytest.approx(own + pairs)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_expected_cost_of_certain_levels_is_their_cost(seed: int) -> None:
    table = random_table(seed)
    space = coupled_space(seed, table)
    for config in every_config(table)[::97]:
        certain = torch.nn.functional.one_hot(torch.tensor(config), len(table[0])).float()
        assert float(ExpectedCost(space)(certain)) == pytest.approx(space.cost(config), rel=1e-5)  # f32


def test_the_expected_cost_is_that_of_independent_draws() -> None:
    table = random_table(1)
    space, generator = coupled_space(1, table), torch.Generator().manual_seed(0)
    p = torch.rand(len(table), len(table[0]), generator=generator).softmax(-1)
    mean = 0.0
    for config in every_config(table):
        mean += float(torch.prod(p[torch.arange(len(config)), list(config)])) * space.cost(config)
    assert float(ExpectedCost(space)(p)) == pytest.approx(mean, rel=1e-5)


def test_the_expected_cost_has_the_gradient_of_finite_differences() -> None:
    space = coupled_space(2, random_table(2))
    p = torch.full((5, 4), 0.25, requires_grad=True)
    ExpectedCost(space)(p).backward()
    step = torch.zeros(5, 4)
    step[2, 1] = 0.5  # the cost is linear in any one probability, so a large step is exact
    with torch.no_grad():
        slope = (ExpectedCost(space)(p + step) - ExpectedCost(space)(p - step)) / 1.0
    assert p.grad is not None
    assert float(p.grad[2, 1]) == pytest.approx(float(slope), rel=1e-4)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("seed", SEEDS)
def test_an_allocation_with_costs_of_pairs_keeps_the_limit_and_is_near_the_best(seed: int, share: float) -> None:
    table = random_table(seed)
    space, quadratic = coupled_space(seed, table), random_quadratic(seed, table)
    fastest, slowest = space.cost(space.fastest), space.cost(space.dense)
    limit = fastest + share * (slowest - fastest)
    found = allocate(quadratic, space, limit=limit, previous=space.dense, options=SearchOptions())
    assert space.cost(found) <= limit * (1 + 1e-12)
    losses = sorted(quadratic.value(config) for config in feasible(space, table, limit))
    assert quadratic.value(found) <= losses[len(losses) // 100]  # among the best hundredth


def test_impossible_limit_is_infeasible_with_costs_of_pairs() -> None:
    table = random_table(0)
    space = coupled_space(0, table)
    with pytest.raises(Infeasible, match="even the smallest levels take more"):
        project(random_quadratic(0, table), space, limit=0.5 * space.cost(space.fastest))


def test_a_knapsack_refuses_costs_of_pairs() -> None:
    with pytest.raises(Unsupported, match="costs that add up over blocks"):
        coupled_space(0, random_table(0)).level_costs()


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("seed", range(4))
def test_exact_selection_with_costs_of_pairs_is_the_best_by_brute_force(seed: int, share: float) -> None:
    table = random_table(seed)
    space, losses = coupled_space(seed, table), random_costs(seed, table)
    fastest, slowest = space.cost(space.fastest), space.cost(space.dense)
    limit = fastest + share * (slowest - fastest)
    found = select(losses, space, limit=limit, seconds=60, gap=0.0)
    assert found.config is not None
    assert space.cost(found.config) <= limit
    best = min(cost_of(losses, config) for config in feasible(space, table, limit))
    assert cost_of(losses, found.config) == pytest.approx(best, abs=1e-6)
    assert found.gap == pytest.approx(0, abs=1e-6)


def test_exact_selection_finds_nothing_below_the_fastest() -> None:
    table = random_table(0)
    space = coupled_space(0, table)
    found = select(random_costs(0, table), space, limit=0.9 * space.cost(space.fastest), seconds=60)
    assert (found.config, found.gap) == (None, np.inf)

"""Levels that another precision makes pointless are left out of an allocation, which stays as good."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from standins.allocations import space_of

from dilap.core.space import Level, Space
from dilap.search.allocation import Quadratic
from dilap.search.dilap import allocate
from dilap.search.options import RelaxationOptions, SearchOptions
from dilap.search.shortlist import Shortlist


def precise_space(seed: int) -> tuple[Space, Quadratic]:
    """Four choices with two widths in three precisions each; a level's loss is that of two changes, as it really is."""
    table = [(1e-3, 6e-4, 4e-4, 5e-4, 3e-4, 2e-4)] * 4
    settings = [((width,), precision) for width in (2, 1) for precision in ("f16", "q8_0", "q4_0")]
    choices = [
        replace(
            one,
            levels=tuple(
                Level(counts=counts, cost=level.cost, precision=precision)
                for level, (counts, precision) in zip(one.levels, settings, strict=True)
            ),
        )
        for one in space_of(table).choices
    ]
    generator = torch.Generator().manual_seed(seed)
    changes = torch.randn(64, 4, 3, generator=generator) * torch.tensor([1.0, 0.1, 0.4])  # width, q8_0, q4_0
    width, precision = torch.tensor([0, 0, 0, 1, 1, 1.0]), torch.tensor([[0, 1, 0], [0, 0, 1.0]]).repeat(1, 2)
    A = (changes[..., :1] * width + changes[..., 1:] @ precision).flatten(1)
    quadratic = Quadratic(b=torch.zeros(24), Q=A.T @ A / len(A), sizes=(6,) * 4)
    return replace(space_of(table), choices=tuple(choices)), quadratic


@pytest.mark.parametrize("share", [0.35, 0.5, 0.7])
@pytest.mark.parametrize("seed", range(4))
def test_allocation_over_widths_and_precisions_is_the_best_by_brute_force(seed: int, share: float) -> None:
    space, quadratic = precise_space(seed)
    limit, options = share * space.cost(space.dense), SearchOptions(relaxation=RelaxationOptions(steps=100))
    found = allocate(quadratic, space, limit=limit, previous=space.dense, options=options)
    configs = product(range(6), repeat=4)
    best = min(quadratic.value(config) for config in configs if space.cost(config) <= limit * (1 + 1e-12))
    assert space.cost(found) <= limit * (1 + 1e-12)
    assert quadratic.value(found) == pytest.approx(best, abs=1e-5)


def test_a_shortlist_leaves_out_what_another_precision_beats() -> None:
    space, quadratic = precise_space(0)
    b = torch.tensor([0.0, 0.1, 0.5, 0.4, 0.6, 0.9] * 4)
    quadratic = Quadratic(b=b, Q=torch.zeros(24, 24), sizes=quadratic.sizes)
    found = Shortlist.of(quadratic, space, always=(0, 0, 0, 2))
    # Level 3 costs 5e-4 and loses 0.4: level 2, of another precision, is cheaper but loses more; 1 dearer.
    assert found.kept[0] == (0, 1, 2, 3, 4, 5)
    b[2::6] = 0.3
    found = Shortlist.of(replace(quadratic, b=b), space, always=(0, 0, 0, 3))
    assert found.kept == ((0, 1, 2, 4, 5),) * 3 + ((0, 1, 2, 3, 4, 5),)
    assert found.full((0, 1, 3, 3)) == (0, 1, 4, 3)
    assert found.short((0, 1, 4, 3)) == (0, 1, 3, 3)
    assert found.quadratic.value((0, 1, 3, 3)) == pytest.approx(quadratic.value((0, 1, 4, 3)))


def test_a_shortlist_of_one_precision_is_the_space() -> None:
    space, quadratic = precise_space(0)
    choices = tuple(
        replace(one, levels=tuple(replace(level, precision="") for level in one.levels)) for one in space.choices
    )
    space = replace(space, choices=choices)
    found = Shortlist.of(quadratic, space, always=space.dense)
    assert found.space is space
    assert found.quadratic is quadratic

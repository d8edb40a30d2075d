"""A weighted mix of costs is costs too."""

from dataclasses import replace

import pytest
from standins.fabricated import TINY_LAYER, tiny_llama

from dilap.core.costs import MixedCosts
from dilap.core.rules import Capabilities
from dilap.search.layouts import build_space
from dilap.search.weights import WeightCosts

SHAPE = tiny_llama(TINY_LAYER, TINY_LAYER)
WEIGHTS = WeightCosts(architecture=SHAPE)
MIXED = MixedCosts(parts=((0.5, WEIGHTS), (2.0, WEIGHTS)))


def test_a_mix_is_the_weighted_sum() -> None:
    block = SHAPE.blocks[1]
    full = (block.main.num_units,)
    assert MIXED.block(block, full) == pytest.approx(2.5 * WEIGHTS.block(block, full))
    assert MIXED.predict(SHAPE.layers) == pytest.approx(2.5 * WEIGHTS.predict(SHAPE.layers))


def test_a_mix_offers_levels_from_the_dearest_down() -> None:
    block = SHAPE.blocks[0]
    levels = MIXED.cheaper(block, [(one, "") for one in Capabilities().levels(block)])
    costs = [MIXED.block(block, *one) for one in levels]
    assert costs == sorted(costs, reverse=True)
    assert len(levels) > 1


def test_a_mix_has_the_pairs_of_its_parts() -> None:
    """A convolution costs as much as the product of its widths; with weights the pair costs nothing."""
    names = ("layers.0.ffn", "layers.1.ffn")
    coupled = replace(WEIGHTS, pairs={names: lambda one, two: float(one[0] * two[0])})
    mixed = MixedCosts(parts=((0.5, WEIGHTS), (2.0, coupled)))
    assert list(mixed.pairs) == [names]
    assert mixed.pairs[names]((3,), (4,)) == 24


def test_pairs_become_couplings_of_their_choices() -> None:
    names = ("layers.0.ffn", "layers.1.ffn")
    coupled = replace(WEIGHTS, pairs={names: lambda one, two: float(one[0] * two[0])})
    space = build_space(coupled, SHAPE, {"": Capabilities()}, layout="free")
    (coupling,) = space.couplings
    assert tuple(space.choices[index].name for index in (coupling.first, coupling.second)) == names
    counts = [[level.counts[0] for level in space.choices[index].levels] for index in (coupling.first, coupling.second)]
    assert coupling.costs[0][1] == counts[0][0] * counts[1][1]

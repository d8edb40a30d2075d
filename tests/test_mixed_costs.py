"""A weighted mix of costs is costs too."""

import pytest
from fabricated import TINY_LAYER, tiny_llama

from dilap.core.costs import MixedCosts
from dilap.core.rules import Capabilities
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
    levels = MIXED.cheaper(block, Capabilities().levels(block))
    costs = [MIXED.block(block, one) for one in levels]
    assert costs == sorted(costs, reverse=True)
    assert len(levels) > 1

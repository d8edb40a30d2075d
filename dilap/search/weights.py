"""The costs that a pruning ratio is about: the number of weights in the decoder layers."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from dilap.core.costs import Counts, PairCost
from dilap.core.groups import Block
from dilap.core.shape import Architecture, LayerWidths


@dataclass(frozen=True, kw_only=True)
class WeightCosts:
    """The number of weights and biases of the decoder layers, as a cost model (`dilap.core.costs.Costs`)."""

    architecture: Architecture
    constant: float = 0.0  # embedding and head, which no plan removes, do not count
    caveats: tuple[str, ...] = ()  # counts have none
    pairs: Mapping[tuple[str, str], PairCost] = field(default_factory=dict)  # a block's weights are its own

    def block(self, block: Block, counts: Counts) -> float:
        return self._layer(self.architecture.widths_of(block, counts))

    def predict(self, widths: Sequence[LayerWidths]) -> float:
        return sum(map(self._layer, widths))

    def cheaper(self, block: Block, levels: Sequence[Counts]) -> list[Counts]:
        """Return all levels, the largest first."""
        return sorted(levels, key=lambda level: (-self.block(block, level), math.prod(level), level))

    def _layer(self, widths: LayerWidths) -> float:
        return float(self.architecture.attention_parameters(widths) + self.architecture.ffn_parameters(widths))

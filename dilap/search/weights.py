"""Costs for a pruning ratio: the weights of the decoder layers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dilap.core.costs import Counts
from dilap.core.groups import Block
from dilap.core.shape import Architecture, LayerWidths


@dataclass(frozen=True, kw_only=True)
class WeightCosts:
    """How many weights and biases the decoder layers have; see `dilap.core.costs.Costs`."""

    architecture: Architecture
    constant: float = 0.0  # embedding and head, which no plan removes, do not count
    caveats: tuple[str, ...] = ()  # counts have none

    def block(self, block: Block, counts: Counts) -> float:
        if block.kind == "attention":
            widths = LayerWidths(num_heads=math.prod(counts), num_kv_heads=counts[0], num_channels=0)
        else:
            widths = LayerWidths(num_heads=0, num_kv_heads=0, num_channels=counts[0])
        return self._layer(widths)

    def predict(self, widths: Sequence[LayerWidths]) -> float:
        return sum(map(self._layer, widths))

    def cheaper(self, block: Block, levels: Sequence[Counts]) -> list[Counts]:
        """All of them, largest first."""
        return sorted(levels, key=lambda level: (-self.block(block, level), math.prod(level), level))

    def _layer(self, widths: LayerWidths) -> float:
        return float(self.architecture.attention_parameters(widths) + self.architecture.ffn_parameters(widths))

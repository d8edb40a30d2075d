"""The costs that a pruning ratio is about: the number of weights in the decoder layers, whatever their precision."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from dilap.core.costs import Counts, PairCost, Setting
from dilap.core.groups import Block
from dilap.core.shape import UNMIXED, Architecture, LayerWidths


@dataclass(frozen=True, kw_only=True)
class WeightCosts:
    """The number of weights and biases of the decoder layers, as a cost model (`dilap.core.costs.Costs`)."""

    architecture: Architecture
    constant: float = 0.0  # embedding and head, which no plan removes, do not count
    caveats: tuple[str, ...] = ()  # counts have none
    pairs: Mapping[tuple[str, str], PairCost] = field(default_factory=dict)  # a block's weights are its own

    def block(self, block: Block, counts: Counts, precision: str = "") -> float:  # noqa: ARG002
        return self._layer(self.architecture.widths_of(block, counts))

    def predict(self, widths: Sequence[LayerWidths], precisions: Mapping[str, str] = UNMIXED) -> float:  # noqa: ARG002
        return sum(map(self._layer, widths))

    def cheaper(self, block: Block, settings: Sequence[Setting]) -> list[Setting]:
        """Return all widths in the reference precision, the largest first: no precision has fewer weights."""
        widths = [counts for counts, precision in settings if precision == settings[0][1]]
        ordered = sorted(widths, key=lambda counts: (-self.block(block, counts), math.prod(counts), counts))
        return [(counts, settings[0][1]) for counts in ordered]

    def _layer(self, widths: LayerWidths) -> float:
        return float(self.architecture.attention_parameters(widths) + self.architecture.ffn_parameters(widths))

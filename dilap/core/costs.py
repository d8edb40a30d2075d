"""What a network of any widths costs: seconds on a device, weights, or a weighted mix of such costs.

costs.predict(plan.all_widths())                   # of a whole network
costs.block(block, counts=(1, 3))                  # of one sublayer with 1 KV group and 3 query slots
MixedCosts(parts=((0.5, decode), (0.5, prefill)))  # of a workload that is half of each
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from dilap.core.groups import Block
from dilap.core.shape import LayerWidths

Counts = tuple[int, ...]  # units left of every group of a block, in the block's order


class Costs(Protocol):
    """A constant, and a term for every block.

    A measured table and a roofline give seconds, `WeightCosts` weights. `caveats` is what a reader must know of how
    the numbers were got.
    """

    @property
    def constant(self) -> float:
        """What no plan removes: embedding, head, launch."""

    @property
    def caveats(self) -> tuple[str, ...]:
        """One sentence each."""

    def block(self, block: Block, counts: Counts) -> float:
        """Of one block with so many units left of its groups."""

    def predict(self, widths: Sequence[LayerWidths]) -> float:
        """Of a whole network, layer by layer."""

    def cheaper(self, block: Block, levels: Sequence[Counts]) -> list[Counts]:
        """Those levels of a block that are known to cost less than the next larger one kept, the dearest first."""


@dataclass(frozen=True, kw_only=True)
class MixedCosts:
    """A weighted sum of costs: of a workload that is made of several, say. `parts` are (weight, costs)."""

    parts: tuple[tuple[float, Costs], ...]

    @property
    def constant(self) -> float:
        return sum(weight * costs.constant for weight, costs in self.parts)

    @property
    def caveats(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(caveat for _, costs in self.parts for caveat in costs.caveats))

    def block(self, block: Block, counts: Counts) -> float:
        return sum(weight * costs.block(block, counts) for weight, costs in self.parts)

    def predict(self, widths: Sequence[LayerWidths]) -> float:
        return sum(weight * costs.predict(widths) for weight, costs in self.parts)

    def cheaper(self, block: Block, levels: Sequence[Counts]) -> list[Counts]:
        """Those that any part tells apart from the next larger one, and that are cheaper in the sum."""
        told = {level for _, costs in self.parts for level in costs.cheaper(block, levels)}
        ordered = sorted(told, key=lambda level: (-self.block(block, level), level))
        kept: list[Counts] = []
        for level in ordered:
            if not kept or self.block(block, level) < self.block(block, kept[-1]):
                kept.append(level)
        return kept

"""What a network of any widths costs: seconds on a device, weights, or a weighted mix of such costs.

costs.predict(plan.all_widths())                   # the cost of a whole network
costs.block(block, counts=(1, 3))                  # the cost of one sublayer with 1 KV group and 3 query slots
MixedCosts(parts=((0.5, decode), (0.5, prefill)))  # the costs of a workload that is half decode and half prefill
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from dilap.core.groups import Block
from dilap.core.shape import LayerWidths

Counts = tuple[int, ...]  # how many units are left in every group of a block, in the block's order
PairCost = Callable[[Counts, Counts], float]  # of two blocks with so many units left in the groups of each


class Costs(Protocol):
    """A model of costs: a constant, plus a term for every block of the network, plus terms for pairs of blocks.

    A measured latency table and a roofline give seconds, `WeightCosts` gives numbers of weights.
    """

    @property
    def constant(self) -> float:
        """Cost of what no plan removes: embedding, head, launch."""

    @property
    def caveats(self) -> tuple[str, ...]:
        """Sentences that a reader has to know about how the numbers were obtained."""

    def block(self, block: Block, counts: Counts) -> float:
        """Return the cost of one block with `counts` units left in its groups."""

    @property
    def pairs(self) -> Mapping[tuple[str, str], PairCost]:
        """What two blocks cost together beyond their own terms, by their names, where that depends on both widths.

        A convolution that reads what another one writes is such a pair; the sublayers of a decoder have none.
        """

    def predict(self, widths: Sequence[LayerWidths]) -> float:
        """Return the cost of a whole network, given the widths of every layer."""

    def cheaper(self, block: Block, levels: Sequence[Counts]) -> list[Counts]:
        """Return the levels that are known to cost less than the next larger one returned, the dearest first."""


@dataclass(frozen=True, kw_only=True)
class MixedCosts:
    """A weighted sum of costs, for example of a workload made of several. `parts` are pairs of (weight, costs)."""

    parts: tuple[tuple[float, Costs], ...]

    @property
    def constant(self) -> float:
        return sum(weight * costs.constant for weight, costs in self.parts)

    @property
    def caveats(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(caveat for _, costs in self.parts for caveat in costs.caveats))

    def block(self, block: Block, counts: Counts) -> float:
        return sum(weight * costs.block(block, counts) for weight, costs in self.parts)

    @property
    def pairs(self) -> Mapping[tuple[str, str], PairCost]:
        names = dict.fromkeys(name for _, costs in self.parts for name in costs.pairs)
        return {name: functools.partial(self._pair, name) for name in names}

    def _pair(self, name: tuple[str, str], first: Counts, second: Counts) -> float:
        terms = ((weight, costs.pairs.get(name)) for weight, costs in self.parts)
        return sum(weight * cost(first, second) for weight, cost in terms if cost is not None)

    def predict(self, widths: Sequence[LayerWidths]) -> float:
        return sum(weight * costs.predict(widths) for weight, costs in self.parts)

    def cheaper(self, block: Block, levels: Sequence[Counts]) -> list[Counts]:
        """Return the levels that any part returns, without those that are not cheaper in the sum than a dearer one."""
        told = {level for _, costs in self.parts for level in costs.cheaper(block, levels)}
        ordered = sorted(told, key=lambda level: (-self.block(block, level), level))
        kept: list[Counts] = []
        for level in ordered:
            if not kept or self.block(block, level) < self.block(block, kept[-1]):
                kept.append(level)
        return kept

"""What a network of any widths costs: seconds on a device, weights, or a weighted mix of such costs.

costs.predict(plan.all_widths(), plan.precisions)  # the cost of a whole network
costs.block(block, counts=(1, 3))                  # the cost of one sublayer with 1 KV group and 3 query slots
costs.block(HEAD, (), "q8_0")                      # the cost of the head in 8 bits
MixedCosts(parts=((0.5, decode), (0.5, prefill)))  # the costs of a workload that is half decode and half prefill
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from dilap.core.groups import Block
from dilap.core.shape import UNMIXED

Counts = tuple[int, ...]  # how many units are left in every group of a block, in the block's order
Setting = tuple[Counts, str]  # a block's width and the precision of its matrices; an empty one is the artifact's own
PairCost = Callable[[Counts, Counts], float]  # of two blocks with so many units left in the groups of each


class Costs(Protocol):
    """A model of costs: a constant, plus a term for every block of the network, plus terms for pairs of blocks.

    A measured latency table and a roofline give seconds, `WeightCosts` gives numbers of weights. An empty precision is
    the artifact's own, and so is that of the parts which a mapping of precisions does not name.
    """

    @property
    def constant(self) -> float:
        """Cost of what no plan changes: embedding, launch, and the head, as far as no precision makes it cheaper."""

    @property
    def caveats(self) -> tuple[str, ...]:
        """Sentences that a reader has to know about how the numbers were obtained."""

    def block(self, block: Block, counts: Counts, precision: str = "") -> float:
        """Return the cost of one block with `counts` units left in its groups."""

    @property
    def pairs(self) -> Mapping[tuple[str, str], PairCost]:
        """What two blocks cost together beyond their own terms, by their names, where that depends on both widths.

        A convolution that reads what another one writes is such a pair; the sublayers of a decoder have none.
        """

    def predict(self, widths: Any, precisions: Mapping[str, str] = UNMIXED) -> float:
        """Return the cost of a network, given what its shape's `widths_at` gives, and precisions of parts by name.

        The widths are those of every layer of a decoder, and of any other network the units left in its groups by name.
        """

    def cheaper(self, block: Block, settings: Sequence[Setting]) -> list[Setting]:
        """Return the settings that a search should choose from, the dearest first.

        Precisions of better quality come first in `settings`, that of the first one is the reference. Returned are only
        precisions whose full width is known to cost less than that of every better one returned; of each, settings that
        are known to cost less than the next larger one returned; and none that a better one makes useless (see
        `undominated`).
        """


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

    def block(self, block: Block, counts: Counts, precision: str = "") -> float:
        return sum(weight * costs.block(block, counts, precision) for weight, costs in self.parts)

    @property
    def pairs(self) -> Mapping[tuple[str, str], PairCost]:
        names = dict.fromkeys(name for _, costs in self.parts for name in costs.pairs)
        return {name: functools.partial(self._pair, name) for name in names}

    def _pair(self, name: tuple[str, str], first: Counts, second: Counts) -> float:
        terms = ((weight, costs.pairs.get(name)) for weight, costs in self.parts)
        return sum(weight * cost(first, second) for weight, cost in terms if cost is not None)

    def predict(self, widths: Any, precisions: Mapping[str, str] = UNMIXED) -> float:
        return sum(weight * costs.predict(widths, precisions) for weight, costs in self.parts)

    def cheaper(self, block: Block, settings: Sequence[Setting]) -> list[Setting]:
        """Return the settings that any part returns, without those that a better one makes useless in the sum."""
        told = {one for _, costs in self.parts for one in costs.cheaper(block, settings)}
        return undominated([one for one in settings if one in told], cost=functools.partial(self._cost, block))

    def _cost(self, block: Block, setting: Setting) -> float:
        return self.block(block, *setting)


def undominated(settings: Sequence[Setting], *, cost: Callable[[Setting], float]) -> list[Setting]:
    """Return the settings that cost less than every other one at least as wide and as good, the dearest first.

    Of two precisions, the one that comes first in `settings` is the better one.
    """
    ranks = {precision: rank for rank, precision in enumerate(dict.fromkeys(one for _, one in settings))}
    known = [(counts, ranks[precision], cost((counts, precision))) for counts, precision in settings]

    def is_useless(index: int) -> bool:
        counts, rank, own = known[index]
        return any(
            other != index
            and theirs <= own
            and their_rank <= rank
            and all(more >= few for more, few in zip(wide, counts, strict=True))
            for other, (wide, their_rank, theirs) in enumerate(known)
        )

    useful = [index for index in range(len(settings)) if not is_useless(index)]
    return [settings[index] for index in sorted(useful, key=lambda index: -known[index][2])]

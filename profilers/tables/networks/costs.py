"""Costs of a network that are sums of products of the widths of its groups (see `works`).

They are a constant, a term for every block, and a term for every pair of blocks that meet in a layer. Expected costs
under independent probabilities of levels are so p'u + p'Wp. Costs never fall with a width, because nothing in the sum
is negative.
"""

import functools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dilap.core.costs import Counts, PairCost, Setting, undominated
from dilap.core.graph import Network
from dilap.core.groups import Block
from dilap.core.shape import UNMIXED
from dilap.profilers.tables.networks.works import Factor, Kind, Term, Work, amount, layer_works


@dataclass(frozen=True, kw_only=True)
class NetworkCosts:
    """Costs of a network with any widths (`dilap.core.costs.Costs`).

    `terms` are those of every layer by its name, and under "" of what no layer costs. `caveats` are what a reader must
    know of how they were obtained.
    """

    network: Network
    terms: Mapping[str, Work]
    caveats: tuple[str, ...] = ()

    def predict(self, widths: Mapping[str, int], precisions: Mapping[str, str] = UNMIXED) -> float:
        """Return the cost of a network with so many units left in its groups, all of those that are not named."""
        for precision in precisions.values():
            self.require_own(precision)
        return amount(self._every_term, self.network.widths_at(widths))

    @property
    def constant(self) -> float:
        """Cost of what no plan changes: the launch, and layers whose channels cannot be removed."""
        return amount(self._of(), {})

    @functools.cached_property
    def pairs(self) -> Mapping[tuple[str, str], PairCost]:
        """What two blocks cost together beyond their own terms, the first of the network's order first."""
        order = {group.name: index for index, group in enumerate(self.network.groups)}
        names = (sorted(found, key=lambda name: order[name]) for found in self._by_groups if len(found) > 1)
        return {(first, second): functools.partial(self._pair, first, second) for first, second in names}

    def block(self, block: Block, counts: Counts, precision: str = "") -> float:
        """Return the cost of one block with `counts` units left of its group, beyond the constant and the pairs."""
        self.require_own(precision)
        if not block.groups:  # the head is a layer like all others
            return 0.0
        name = block.main.name
        return amount(self._of(name), {name: counts[0]})

    def layer(self, name: str, widths: Mapping[str, int]) -> float:
        """Return the cost of one layer of a network with so many units left in its groups."""
        return amount(self.terms[name], self.network.widths_at(widths))

    def cheaper(self, block: Block, settings: Sequence[Setting]) -> list[Setting]:
        """Return the settings that cost less beside full neighbours; see `Costs.cheaper`."""
        return undominated(list(dict.fromkeys(settings)), cost=functools.partial(self.beside_full_ones, block))

    def beside_full_ones(self, block: Block, setting: Setting) -> float:
        """Return what a block costs alone and together with its neighbours, all of which keep all their units."""
        counts, precision = setting
        self.require_own(precision)
        widths = self.network.widths_at({block.main.name: counts[0]})
        return sum(amount(work, widths) for groups, work in self._by_groups.items() if block.main.name in groups)

    def require_own(self, precision: str) -> None:
        """Raise InvalidInput for a precision in which nothing is known of the network; its own, "", always is."""
        assert not precision, precision

    def _pair(self, first: str, second: str, one: Counts, other: Counts) -> float:
        return amount(self._of(first, second), {first: one[0], second: other[0]})

    def _of(self, *groups: str) -> Work:
        """Return the terms that depend on exactly these groups."""
        return self._by_groups.get(frozenset(groups), ())

    @functools.cached_property
    def _every_term(self) -> Work:
        return tuple(term for work in self._by_groups.values() for term in work)

    @functools.cached_property
    def _by_groups(self) -> Mapping[frozenset[str], Work]:
        """The terms by the groups that they depend on, those alike in one."""
        found: dict[frozenset[str], dict[tuple[Factor, ...], float]] = defaultdict(dict)
        for term in (term for work in self.terms.values() for term in work):
            alike = found[term.groups]
            alike[term.factors] = alike.get(term.factors, 0.0) + term.weight
        return {
            groups: tuple(Term(weight=weight, factors=factors) for factors, weight in alike.items())
            for groups, alike in found.items()
        }


def counted(network: Network, kind: Kind) -> NetworkCosts:
    """Return the costs of a network of which every unit of one kind of work costs 1: its weights, its multiply-adds."""
    return NetworkCosts(network=network, terms={one.layer: one.works[kind] for one in layer_works(network)})

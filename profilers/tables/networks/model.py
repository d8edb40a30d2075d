"""The fitted cost of every group of a network, and of every two that meet in a layer, in every width.

The seconds of a network are a sum of products of the widths of at most two groups (see `works`): a constant, a term for
every block, and a term for every pair of blocks that meet in a layer. Expected seconds under independent probabilities
of levels are so p'u + p'Wp. Costs never fall with a width, because nothing in the sum is negative.
"""

import functools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dilap.core.costs import Counts, PairCost, Setting, undominated
from dilap.core.errors import InvalidInput
from dilap.core.graph import Network
from dilap.core.groups import Block
from dilap.core.shape import UNMIXED
from dilap.core.workload import Workload
from dilap.profilers.tables.networks.works import Factor, Term, Work, amount


@dataclass(frozen=True, kw_only=True)
class NetworkObservation:
    """One measured network: its drift-corrected seconds, and the relative half-width of their interval.

    `counts` are the units that are left, by the names of all groups.
    """

    role: str
    counts: Mapping[str, int]
    seconds: float
    half_width: float


@dataclass(frozen=True, kw_only=True)
class Fit:
    """How costs are fitted: the channels that kernels are taken to fill, and how freely the speeds of layers differ.

    With `freedom` 0 all layers of a kernel have the same speeds. With 1, a layer that is slower by 100 % weighs as much
    as a probe that is missed by 1 %.
    """

    multiple: int
    freedom: float

    def __str__(self) -> str:
        return f"multiples of {self.multiple} channels, speeds of layers free by {self.freedom:.0%}"


@dataclass(frozen=True, kw_only=True)
class NetworkLatency:
    """Predicts the seconds of a network with any widths on one device (`dilap.core.costs.Costs`).

    `terms` are in seconds, by layer, and under "" what no layer takes. `method` says how they were found, and
    `cross_validation` the relative error (root of the mean square) of every way that was tried on plans that it has not
    seen. `noise_seconds` is the difference of two widths of one block that the measurements cannot tell from none,
    `holdout` are the models that the fit has not seen, and `caveats` what a reader must know of how the probes were
    measured.
    """

    network: Network
    workload: Workload
    method: str
    terms: Mapping[str, Work]
    cross_validation: Mapping[str, float]
    noise_seconds: float
    holdout: tuple[NetworkObservation, ...]
    caveats: tuple[str, ...] = ()

    def predict(self, widths: Mapping[str, int], precisions: Mapping[str, str] = UNMIXED) -> float:
        """Return the seconds of a network with so many units left in its groups, all of those that are not named."""
        for precision in precisions.values():
            self._require_own(precision)
        return amount(self._every_term, self.network.widths_at(widths))

    def layer(self, name: str, widths: Mapping[str, int]) -> float:
        """Return the seconds of one layer."""
        return amount(self.terms[name], self.network.widths_at(widths))

    def layer_seconds(self, widths: Mapping[str, int]) -> dict[str, float]:
        """Return the seconds of every layer, and under "" of what no layer takes."""
        counts = self.network.widths_at(widths)
        return {layer: amount(work, counts) for layer, work in self.terms.items()}

    def holdout_errors(self) -> list[float]:
        """Return the absolute relative errors on the plans that took no part in the fit."""
        return [abs(self.predict(one.counts) / one.seconds - 1) for one in self.holdout]

    @property
    def constant(self) -> float:
        """Seconds that no plan changes: the launch, and layers whose channels cannot be removed."""
        return amount(self._of(), {})

    @functools.cached_property
    def pairs(self) -> Mapping[tuple[str, str], PairCost]:
        """What two blocks cost together beyond their own terms, the first of the network's order first."""
        order = {group.name: index for index, group in enumerate(self.network.groups)}
        names = (sorted(found, key=lambda name: order[name]) for found in self._by_groups if len(found) > 1)
        return {(first, second): functools.partial(self._pair, first, second) for first, second in names}

    def block(self, block: Block, counts: Counts, precision: str = "") -> float:
        """Return the seconds of one block with `counts` units left of its group, beyond the constant and the pairs."""
        self._require_own(precision)
        if not block.groups:  # the head is a layer like all others
            return 0.0
        name = block.main.name
        return amount(self._of(name), {name: counts[0]})

    def cheaper(self, block: Block, settings: Sequence[Setting]) -> list[Setting]:
        """Return the settings that are measurably faster beside full neighbours; see `Costs.cheaper`."""
        ordered = sorted(dict.fromkeys(settings), key=lambda setting: -setting[0][0])
        kept = [ordered[0]]
        step = max(self.noise_seconds, 0.005 * self._beside_full_ones(block, ordered[0]))
        for setting in ordered[1:]:
            if self._beside_full_ones(block, kept[-1]) - self._beside_full_ones(block, setting) > step:
                kept.append(setting)
        return undominated(kept, cost=functools.partial(self._beside_full_ones, block))

    def _beside_full_ones(self, block: Block, setting: Setting) -> float:
        """Return what a block costs alone and together with its neighbours, all of which keep all their units."""
        counts, precision = setting
        self._require_own(precision)
        widths = self.network.widths_at({block.main.name: counts[0]})
        return sum(amount(work, widths) for groups, work in self._by_groups.items() if block.main.name in groups)

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

    def _require_own(self, precision: str) -> None:
        if precision not in ("", self.workload.precision):
            raise InvalidInput(
                f"nothing is known of the latency of the network in {precision}: its table is of"
                f" {self.workload.precision}, and every part of it has that precision"
            )

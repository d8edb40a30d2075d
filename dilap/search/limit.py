"""A limit on what a plan may cost, and the loop by which every method meets it: predict, choose, measure, correct."""

import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Protocol, TypeVar

from dilap.core.errors import Infeasible
from dilap.core.graph import Shape
from dilap.core.measurement import Interval
from dilap.core.plan import Plan
from dilap.core.shape import UNMIXED, Architecture

T = TypeVar("T")
_ENOUGH = 0.95  # share of the budget: a plan that uses less has lost quality for nothing
# Share of the budget that the upper end of a measured plan's interval may reach. It is below 1 because the proof
# measures again: two such ends for one plan differ by 0.5 % (standard deviation) where the paired ratios of the starts
# differ by 0.9 %.
_MOST = 0.995
_REPEATS = 0.005
# So much of the budget at most is given up for the noise of a plan's measurement. For more noise, which is a fault of
# the device, no smaller plan is chosen; the result will say that it is noisy.
_MOST_ALLOWED_FOR = 0.02
_CORRECTIONS = 3
_BISECTIONS = 24  # give a knob to 6e-8, which is finer than one unit of any model


def uses_well(share: float) -> bool:
    """Return whether a plan that uses this share of the budget will keep it when measured again, and wastes little."""
    return _ENOUGH <= share <= _MOST


def upper_end(share: Interval) -> float:
    """Return what a plan uses of the budget at most, as far as its measurement can tell."""
    return min(share.high, share.value + _MOST_ALLOWED_FOR)


class Predict(Protocol):
    """Predicts what a network costs; see `Costs.predict`."""

    def __call__(self, widths: Any, precisions: Mapping[str, str] = UNMIXED, /) -> float: ...


class Measure(Protocol):
    """Measures the share of the budget that a pruned network of some shape and precisions uses, if it can be told."""

    def __call__(self, architecture: Any, precisions: Mapping[str, str], /) -> Interval | None: ...


@dataclass(frozen=True, kw_only=True)
class CostLimit:
    """A limit on what a plan costs.

    `predict` returns the cost of a network with these widths, which its shape's `widths_at` gives, and precisions:
    seconds by the latency table, or weights where a ratio is asked for; `error` is the standard deviation of the
    relative error of predictions, infinite where nothing is known about it. `measure` returns the share of the budget
    that a pruned network really uses, or None where the device was disturbed and the prediction stands; it is itself
    None where predictions are exact. Methods aim at `limit`, which is the share `aim` of the budget.
    """

    limit: float
    predict: Predict
    error: float = math.inf
    measure: Measure | None = None
    aim: float = 1.0

    def cost(self, plan: Plan[Shape]) -> float:
        return self.predict(plan.architecture.widths_at(plan.counts), plan.precisions)

    def meet(
        self,
        choose: Callable[[float], T],
        *,
        cost: Callable[[T], float],
        architecture: Callable[[T], object],
        precisions: Callable[[T], Mapping[str, str]] = lambda _: UNMIXED,
    ) -> T:
        """Return what `choose` finds within a limit that is corrected until the budget is used well.

        What it finds is measured, a network of that architecture and those precisions (see `Plan.pruned_precisions`;
        by default the artifact's own). The next limit is the first one divided by the ratio of real to predicted cost
        that is likely after all attempts (see `_likely_gap`). Of the attempts that keep the budget the one that uses
        most of it is returned; where none keeps it, the one nearest to it. Raises Infeasible where `choose` does for
        the first limit.
        """
        limit = self.limit
        attempts: list[tuple[float, T]] = []
        gaps: list[tuple[float, float]] = []
        for _ in range(1 + _CORRECTIONS):
            try:
                found = choose(limit)
            except Infeasible:
                if not attempts:
                    raise
                break
            predicted = self.aim * cost(found) / self.limit
            measured = None if self.measure is None else self.measure(architecture(found), precisions(found))
            if measured is None:
                used = predicted * self._likely_gap(gaps)
            else:
                used = upper_end(measured)
                gaps.append((used / predicted, max(_REPEATS, measured.half_width / 2)))
            attempts.append((used, found))
            corrected = self.limit / self._likely_gap(gaps)
            if uses_well(used) or abs(corrected / limit - 1) < 1e-3:
                break
            limit = corrected
        return max(attempts, key=lambda one: (one[0] <= 1.0, one[0] if one[0] <= 1.0 else -one[0]))[1]

    def _likely_gap(self, measured: Sequence[tuple[float, float]]) -> float:
        """Return the ratio of real to predicted cost, given measured ones with their standard deviations.

        It is their mean, weighted by the inverse variances, together with the ratio of 1 that the table promises: one
        noisy measurement says less than a table that was right on held-out plans. On busy machines a search that
        trusted its last measurement alone went 8 % too far, and one that trusted its first fully 14 %.
        """
        if not measured:
            return 1.0
        weights = [max(_REPEATS, self.error) ** -2, *(deviation**-2 for _, deviation in measured)]
        ratios = [1.0, *(ratio for ratio, _ in measured)]
        return float(sum(map(operator.mul, weights, ratios)) / sum(weights))

    def bisect(
        self,
        at: Callable[[float], Plan[Shape]],
        *,
        refine: Callable[[float, float], Plan[Shape]] | None = None,
        output_biases: bool = False,
    ) -> Plan[Shape]:
        """Return the plan at the smallest knob between 0 and 1 that keeps the limit; a larger knob prunes more.

        Where a small step of the knob removes much at once, `refine(knob, part)` gives plans between the removal of
        little (part 0) and all (part 1) of that, and is bisected as well. `output_biases` says that the method will add
        biases to the output projections, which take a little time too. Raises Infeasible where even a knob of 1 costs
        too much.
        """

        def choose(limit: float) -> Plan[Shape]:
            knob = self._smallest(at, limit)
            if refine is None:
                return at(knob)
            return refine(knob, self._smallest(lambda part: refine(knob, part), limit))

        def architecture(plan: Plan[Shape]) -> object:
            pruned = plan.pruned_architecture()
            if output_biases and isinstance(pruned, Architecture):
                return replace(pruned, out_bias=True, ffn_out_bias=True)
            return pruned

        return self.meet(
            choose, cost=self.cost, architecture=architecture, precisions=lambda plan: plan.pruned_precisions()
        )

    def _smallest(self, at: Callable[[float], Plan[Shape]], limit: float) -> float:
        """Return the smallest knob whose plan keeps `limit`. Raises Infeasible."""
        low, high = 0.0, 1.0
        if self.cost(at(low)) <= limit:
            return low
        if self.cost(plan := at(high)) > limit:
            raise Infeasible(f"{self._excess(plan, limit)}; this method cannot prune more")
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            low, high = (low, middle) if self.cost(at(middle)) <= limit else (middle, high)
        return high

    def first(self, plans: Iterable[Plan[Shape]]) -> Plan[Shape]:
        """Return the first of ever smaller plans that keeps the limit, making no more of them than needed.

        Raises Infeasible where none does.
        """
        made: list[Plan[Shape]] = []
        rest = iter(plans)

        def keep(plan: Plan[Shape]) -> Plan[Shape]:
            made.append(plan)
            return plan

        def choose(limit: float) -> Plan[Shape]:
            for plan in chain(list(made), map(keep, rest)):
                if self.cost(plan) <= limit:
                    return plan
            reason = self._excess(made[-1], limit) if made else "the method offers no plan"
            raise Infeasible(f"{reason}; this method cannot prune more")

        return self.meet(
            choose,
            cost=self.cost,
            architecture=lambda plan: plan.pruned_architecture(),
            precisions=lambda plan: plan.pruned_precisions(),
        )

    def _excess(self, plan: Plan[Shape], limit: float) -> str:
        return f"the smallest plan takes {self.cost(plan) / limit:.1%} of what is allowed"

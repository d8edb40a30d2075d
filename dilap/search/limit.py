"""What a plan may cost, and the one loop by which every method meets it: predict, choose, measure, correct."""

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import TypeVar

from dilap.core.errors import Infeasible
from dilap.core.plan import Plan
from dilap.core.shape import Architecture, LayerWidths

T = TypeVar("T")
_ENOUGH = 0.95  # of the budget used: a plan that uses less gave away quality for nothing
# Of the budget, for the upper end of a measured plan's interval, because the proof measures again: two such ends of one
# plan differ by 0.5 % (standard deviation) where the starts' paired ratios differ by 0.9 %.
_MOST = 0.995
_CORRECTIONS = 3
_BISECTIONS = 24  # a knob to 6e-8, finer than one unit of any model


def uses_well(share: float) -> bool:
    """Whether a share of the budget is kept, measured again too, and not far from all of it."""
    return _ENOUGH <= share <= _MOST


@dataclass(frozen=True, kw_only=True)
class Target:
    """A limit on what a plan costs.

    `predict` gives the cost of all layers' widths: seconds of the latency table, or weights where a ratio is asked.
    `measure` gives the share of the budget that an architecture really uses, the upper end of its interval; without it
    predictions are exact. Methods aim at `limit`, which is `aim` of the budget.
    """

    limit: float
    predict: Callable[[Sequence[LayerWidths]], float]
    measure: Callable[[Architecture], float] | None = None
    aim: float = 1.0

    def cost(self, plan: Plan) -> float:
        return self.predict(plan.all_widths())

    def meet(
        self, choose: Callable[[float], T], *, cost: Callable[[T], float], architecture: Callable[[T], Architecture]
    ) -> T:
        """What `choose` finds within a limit, the limit corrected until the budget is used well.

        A choice is measured; the next limit is moved by the mean gap of all attempts between measured and predicted:
        one alone sent a search 8 % too far on a busy machine. The best attempt that keeps the budget is returned, the
        nearest one where none does. Raises Infeasible where `choose` does for the first limit.
        """
        limit = self.limit
        attempts: list[tuple[float, T]] = []
        gaps: list[float] = []
        for _ in range(1 + _CORRECTIONS):
            try:
                found = choose(limit)
            except Infeasible:
                if not attempts:
                    raise
                break
            predicted = self.aim * cost(found) / self.limit
            used = predicted if self.measure is None else self.measure(architecture(found))
            attempts.append((used, found))
            gaps.append(used / predicted)
            corrected = self.limit / statistics.fmean(gaps)
            if uses_well(used) or abs(corrected / limit - 1) < 1e-3:
                break
            limit = corrected
        return max(attempts, key=lambda one: (one[0] <= 1.0, one[0] if one[0] <= 1.0 else -one[0]))[1]

    def bisect(
        self,
        at: Callable[[float], Plan],
        *,
        refine: Callable[[float, float], Plan] | None = None,
        output_biases: bool = False,
    ) -> Plan:
        """The plan at the smallest knob between 0 and 1 that keeps the limit; `at` prunes more for a larger knob.

        Where one step of the knob takes much at once, `refine(knob, part)` gives plans between little (part 0) and all
        (part 1) of what that step takes, and is bisected as well. `output_biases` says that the method will add biases
        to the output projections, which cost a little too. Raises Infeasible where even a knob of 1 costs too much.
        """

        def choose(limit: float) -> Plan:
            knob = self._smallest(at, limit)
            if refine is None:
                return at(knob)
            return refine(knob, self._smallest(lambda part: refine(knob, part), limit))

        def architecture(plan: Plan) -> Architecture:
            pruned = plan.pruned_architecture()
            return replace(pruned, out_bias=True, ffn_out_bias=True) if output_biases else pruned

        return self.meet(choose, cost=self.cost, architecture=architecture)

    def _smallest(self, at: Callable[[float], Plan], limit: float) -> float:
        """The smallest knob whose plan keeps `limit`. Raises Infeasible."""
        low, high = 0.0, 1.0
        if self.cost(at(low)) <= limit:
            return low
        if self.cost(plan := at(high)) > limit:
            raise Infeasible(f"{self._excess(plan, limit)}; this method cannot prune more")
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            low, high = (low, middle) if self.cost(at(middle)) <= limit else (middle, high)
        return high

    def first(self, plans: Iterable[Plan]) -> Plan:
        """The first of ever smaller plans that keeps the limit; no more of them are made than that takes.

        Raises Infeasible where none does.
        """
        made: list[Plan] = []
        rest = iter(plans)

        def keep(plan: Plan) -> Plan:
            made.append(plan)
            return plan

        def choose(limit: float) -> Plan:
            for plan in chain(list(made), map(keep, rest)):
                if self.cost(plan) <= limit:
                    return plan
            reason = self._excess(made[-1], limit) if made else "the method offers no plan"
            raise Infeasible(f"{reason}; this method cannot prune more")

        return self.meet(choose, cost=self.cost, architecture=Plan.pruned_architecture)

    def _excess(self, plan: Plan, limit: float) -> str:
        return f"the smallest plan takes {self.cost(plan) / limit:.1%} of what is allowed"

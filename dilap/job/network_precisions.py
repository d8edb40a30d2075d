"""The precision of a network that is no decoder: a method is asked in every one, and the nearest answer is taken.

A precision in which the dense network keeps the budget needs no method: there, nothing is pruned. How near an answer is
to the dense network is what its file, through the runtime, gives on the validation split.
"""

import copy
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from torch import nn

from dilap.core.artifact import Artifact
from dilap.core.codec import scratch_folder
from dilap.core.errors import Crashed, Infeasible, Mismatch, Unavailable, Unsupported, VerificationFailed
from dilap.core.graph import Network
from dilap.core.groups import indices_kept
from dilap.core.shape import by_quality
from dilap.job.common_stages import AIM, ALREADY_KEPT, Goal
from dilap.job.formats import dense_folder
from dilap.job.network_exam import NetworkExam
from dilap.job.network_stages import NetworkStages
from dilap.models.convolutional.cut import shrink_network_
from dilap.models.convolutional.norm_statistics import NormStatistics
from dilap.models.network import Examples
from dilap.search.limit import CostLimit
from dilap.search.method import Pruned
from dilap.search.network_task import NetworkMethod

_NEAR = 0.01  # a distance that is as good as none: nothing is pruned for less


@dataclass(frozen=True, kw_only=True)
class PrecisionChoice:
    """The choice of a precision for a job.

    `dense` is the artifact that ships, by which budgets are taken, and `shares` are the latencies of the dense network
    in every precision, as shares of it, the best precision first.
    """

    stages: NetworkStages
    dense: Artifact
    shares: Mapping[str, float]

    def pruned(self, method: NetworkMethod) -> tuple[Goal, Pruned[Network]] | None:
        """Return the nearest answer with its goal, or None where the dense network that ships keeps the budget.

        Raises Infeasible where no plan is fast enough in any precision.
        """
        if self._limit >= 1:
            self.stages.workspace.log.say(ALREADY_KEPT)
            return None
        goal_of = functools.cache(self._goal)
        found = self.stages.answered(lambda: self._nearest(method, goal_of))
        return goal_of(self.stages.precision_of(found.plan)), found

    @functools.cached_property
    def _limit(self) -> float:
        """What the budget allows, as a share of the latency of the dense network that ships."""
        seconds, limit = self.stages.dense_seconds_and_limit(self.dense)
        return limit / seconds

    def _goal(self, precision: str) -> Goal:
        """Return the budget in numbers for networks in a precision. Raises Infeasible."""
        stages, share = self.stages.at(precision), self.shares[precision]
        if not self._is_pruned(precision):  # no latency table is needed, because no width is chosen
            return Goal(cost_limit=CostLimit(limit=AIM * self._limit, predict=lambda *_: share), unpruned_share=share)
        goal = stages.goal(self.dense, share=share)
        assert goal is not None  # the dense network that ships does not keep the budget
        return goal

    def _nearest(self, method: NetworkMethod, goal_of: Callable[[str], Goal]) -> Pruned[Network]:
        """Return the answer in the precision in which its file is nearest to the dense network.

        Raises Infeasible, or Mismatch for a latency table that cannot be trusted, where there is none in any precision.
        """
        exam, answers = NetworkExam.of(self.stages), dict[str, Pruned[Network]]()
        refusals: list[Infeasible | Mismatch] = []
        distances: dict[str, float] = {}
        for precision in sorted(self.shares, key=self._is_pruned):  # what is known without a search comes first
            try:
                answer = self._answer(precision, method, goal_of)
            except (Infeasible, Mismatch) as error:
                refusals.append(error)
                self.stages.workspace.log.say(f"in {precision}: {error}")
                continue
            answers[precision], distances[precision] = answer, self._distance(exam, precision, answer)
            self.stages.workspace.log.say(
                f"in {precision}, {'pruned' if self._is_pruned(precision) else 'nothing pruned'}: "
                f"{exam.dense.DISTANCE} of its file {distances[precision]:.3f} on the validation split"
            )
            if distances[precision] < _NEAR and not self._is_pruned(precision):
                break
        if not answers:
            raise refusals[-1]  # that in the fewest bits
        best = min(distances, key=distances.__getitem__)
        return replace(answers[best], facts={**answers[best].facts, "distances": distances})

    def _is_pruned(self, precision: str) -> bool:
        """Whether networks have to be pruned to keep the budget in a precision."""
        return self.shares[precision] > AIM * self._limit

    def _answer(self, precision: str, method: NetworkMethod, goal_of: Callable[[str], Goal]) -> Pruned[Network]:
        stages = self.stages.at(precision)
        if not self._is_pruned(precision):
            return Pruned(plan=stages.planned(stages.dense_plan))
        return stages.asked(method, goal_of(precision))

    def _distance(self, exam: NetworkExam, precision: str, pruned: Pruned[Network]) -> float:
        """Return how far the file of an answer is from the dense network, on the validation split."""
        stages = self.stages.at(precision)
        model = cut_(copy.deepcopy(stages.source.model), pruned, stages.shown.trained)
        with scratch_folder(stages.workspace.cache / precision) as folder:
            candidate = replace(stages, source=replace(stages.source, model=model))
            candidate.export(pruned.plan, folder / "file", None)
            return exam.validation_distance_of_artifact(folder / "file", stages.bench.read_artifact(folder / "file"))


def without_unheld(stages: NetworkStages) -> NetworkStages:
    """Return the stages without the precisions in which the runtime cannot hold this network, which a line says.

    Raises Unsupported or VerificationFailed instead where the precisions were named.
    """
    if not stages.chooses_precision:
        return stages
    held = [precision for precision in stages.bench.others if _is_held(stages, precision)]
    own = stages.options.workload.precision
    return replace(stages, bench=replace(stages.bench, precisions=by_quality([own, *held])))


def _is_held(stages: NetworkStages, precision: str) -> bool:
    """Export the dense network in a precision, and return whether the runtime can hold it."""
    try:
        stages.artifact(dense_folder(stages, precision), stages.dense_plan, precision=precision)
    except (Unsupported, VerificationFailed) as error:
        if stages.options.precisions is not None:
            raise
        stages.workspace.log.say(f"{precision} is not tried: {error}")
        return False
    return True


def why_not_chosen(stages: NetworkStages, dense: Artifact) -> str | None:
    """Return why no precision can be chosen: files cannot be judged here; None where they can."""
    try:
        NetworkExam.of(stages).validation_distance_of_artifact(stages.workspace.dense, dense)
    except (Crashed, Unavailable, Unsupported) as error:
        return f"no precision is chosen, because what it loses cannot be seen here: {error}"
    return None


def cut_(model: nn.Module, pruned: Pruned[Network], examples: Examples) -> nn.Module:
    """Cut a network in place as a method answered, and return it; one that keeps all its units stays as it is."""
    plan = pruned.plan
    if not prunes(pruned):
        return model
    norms = NormStatistics.of(model, examples)
    shrink_network_(model, plan, parameters=pruned.parameters)
    norms.put_(model, indices_kept(plan.architecture.groups, plan.kept))
    return model


def prunes(pruned: Pruned[Network]) -> bool:
    """Return whether an answer removes any unit."""
    groups = pruned.plan.architecture.groups
    return any(pruned.plan.counts[group.name] < group.num_units for group in groups)

"""The stages of the prune job of a network that is no decoder, up to the plan; see `dilap.job.common_stages`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dilap.core.artifact import Artifact
from dilap.core.codec import digest
from dilap.core.graph import Network
from dilap.core.measurement import Interval
from dilap.core.plan import Plan, full_plan
from dilap.job.common_stages import AIM, ALREADY_KEPT, CommonStages, Goal
from dilap.job.examples import Shown
from dilap.job.measuring import Usual
from dilap.job.network_bench import NetworkBench
from dilap.job.network_options import NetworkOptions
from dilap.job.tables import prediction_error, require_claimable
from dilap.models.convolutional.load import NetworkSource
from dilap.models.tensor_file import computed_once
from dilap.profilers.configuration import Configuration
from dilap.profilers.tables.networks.costs import NetworkCosts, counted
from dilap.profilers.tables.networks.model import NetworkLatency
from dilap.profilers.tables.networks.table import NetworkTable
from dilap.search.limit import CostLimit
from dilap.search.method import Pruned
from dilap.search.network_task import NetworkMethod, NetworkTask


@dataclass(frozen=True, kw_only=True)
class NetworkStages(CommonStages[Network]):
    """The stages of such a network's job. `network` is the shape of the dense one."""

    options: NetworkOptions
    bench: NetworkBench
    source: NetworkSource
    network: Network
    shown: Shown[Any, Any]

    @property
    def dense_plan(self) -> Plan[Network]:
        return full_plan(self.network, base=self.source.digest)

    def at(self, precision: str) -> "NetworkStages":
        """Return the stages of the same job in which every network but the dense one that ships has that precision."""
        return replace(self, bench=self.bench.at(precision))

    def planned(self, plan: Plan[Network]) -> Plan[Network]:
        """Return a plan with the precision of these stages, which it does not name where that is the options' own."""
        own, precision = self.options.workload.precision, self.bench.workload.precision
        return plan if precision == own else replace(plan, precisions=dict.fromkeys(self.network.parts, precision))

    def precision_of(self, plan: Plan[Network]) -> str:
        """Return the precision of a plan, which is one for all parts."""
        return next(iter(plan.precisions.values()), self.options.workload.precision)

    def export(self, plan: Plan[Network], folder: Path, precision: str | None) -> None:
        """Export the model as it is now, cut by `plan`, and verify it; the precision is by default the plan's."""
        self.bench.export(
            self.source,
            folder,
            examples=self.shown.trained,
            plan_digest=plan.digest,
            tokenizer=self.source.tokenizer,
            precision=precision or self.precision_of(plan),
        )

    def _begun_configuration(self, dense: Path) -> Configuration:
        """Return that of the table that was given, or else the fastest one, which all runs of a network share."""
        plain, threads = self.bench.workload, self.options.threads_tried
        if self.options.table is not None:
            given = NetworkTable.read(Path(self.options.table)).header.workload
            count = given.threads if threads else plain.threads
            return Configuration(workload=replace(plain, switches=given.switches, threads=count), plain=plain)
        kept = self.bench.configuration_path(self.source.name, self.network, threads=threads)
        with self.workspace.stage("find the fastest configuration"):
            return self.bench.kept_configuration(kept, threads=threads, dense=lambda: dense)

    def goal(self, dense: Artifact, *, share: float = 1.0) -> Goal | None:
        """Return the budget in numbers, or None where the dense network keeps it already; log the reachable latencies.

        `share` is the latency of the network in the precision of these stages, as a share of that of the artifact
        `dense`, of which the budget is. Raises Infeasible where no plan is fast enough.
        """
        ratio = self.options.budget.ratio
        if ratio is not None:
            return self._weights_goal((1 - ratio) * self._weights.predict({}))
        budget, costs = self.options.budget, self._costs()
        seconds, limit = self.dense_seconds_and_limit(dense)
        scale = share * seconds / costs.predict({})
        floor, fastest = scale * costs.constant, scale * costs.predict(self._narrowest)
        mark = self.dense_measurement(dense).mark
        inside = "" if share == 1 else f", in {self.bench.workload.precision} {share * seconds * 1e3:.2f} ms"
        self.workspace.log.say(
            f"dense {seconds * 1e3:.2f} ms{mark}{inside}; floor that no plan removes {floor * 1e3:.2f} ms; fastest "
            f"reachable, as predicted, {fastest * 1e3:.2f} ms; budget {budget} is {limit * 1e3:.2f} ms"
        )
        if limit >= seconds:
            self.workspace.log.say(ALREADY_KEPT)
            return None
        advice = "a smaller model" if self.chooses_precision else "a smaller --precision or a smaller model"
        self.require_reachable(fastest, limit=limit, dense=seconds, advice=advice)
        usual = Usual(seconds=seconds, statistic=budget.statistic)
        return Goal(
            cost_limit=CostLimit(
                limit=AIM * limit / scale,
                predict=costs.predict,
                error=prediction_error(costs),
                measure=partial(self._share_used, dense, usual),
                aim=AIM,
            ),
            floor_seconds=floor,
            fastest_seconds=fastest,
            usual=usual,
            unpruned_share=share,
            caveats=costs.caveats,
            costs=costs,
        )

    def dense_seconds_and_limit(self, dense: Artifact) -> tuple[float, float]:
        """Return what the dense network that ships takes, and what the budget allows, in seconds."""
        with self.workspace.stage("latency of the dense model"):
            seconds = self.dense_measurement(dense).seconds(self.options.budget.statistic)
        return seconds, self.options.budget.limit_seconds(dense_seconds=seconds)

    def _costs(self) -> NetworkLatency:
        """Return what predicts latencies: the costs fitted to a measured table, or an estimate."""
        if self.bench.estimate:
            return self.bench.estimated_costs(self.network)
        if self.options.table is not None:
            table = self.bench.read_table(Path(self.options.table), self.network)
        else:
            path = self.bench.table_path(self.source.name, self.network)
            with self.workspace.stage("latency table"):
                table = self.bench.build_table(self.source, path, examples=self.shown.trained)
        precision = self.bench.workload.precision
        name = "table.jsonl" if precision == self.options.workload.precision else f"table-{precision}.jsonl"
        table.write(self.workspace.folder / name)
        model = table.model(self.options.budget.statistic)
        require_claimable(model, advice="the same command on a quiet machine")
        return model

    @property
    def _weights(self) -> NetworkCosts:
        """The number of weights of all layers."""
        return counted(self.network, "weights")

    def _weights_goal(self, limit: float) -> Goal:
        return Goal(cost_limit=CostLimit(limit=limit, predict=self._weights.predict), costs=self._weights)

    @property
    def _narrowest(self) -> Mapping[str, int]:
        """How many units a method leaves at least in every group."""
        task = self._task(self._weights_goal(0.0))
        return {group.name: task.rounded(group, 1) for group in self.network.groups}

    def answers(self, name: str, ask: Callable[[], NDArray[np.float32]]) -> NDArray[np.float32]:
        """Return what the dense network gives for examples; it is asked once, and the answer is kept as `name`."""
        path = self.workspace.methods / f"answers-{name}.safetensors"
        found = computed_once(path, lambda: {"outputs": torch.from_numpy(ask())})
        answers: NDArray[np.float32] = found["outputs"].numpy()
        return answers

    def asked(self, method: NetworkMethod, goal: Goal) -> Pruned[Network]:
        """Return what `method` answers, in the precision of these stages."""
        found = method(self._task(goal))
        pruned = found if isinstance(found, Pruned) else Pruned(plan=found)
        return replace(pruned, plan=self.planned(pruned.plan))

    def _task(self, goal: Goal) -> NetworkTask:
        return NetworkTask(
            model=self.source.model,
            base=self.source.digest,
            network=self.network,
            images=self.shown.trained,
            labels=self.shown.labels,
            cost_limit=goal.cost_limit,
            costs=goal.costs,
            validation=self.shown.validated,
            multiple=self.bench.capabilities.channel_multiple,
            cache=self.method_cache,
            seed=self.options.seed,
            report=self.workspace.log.say,
        )

    def _share_used(self, dense: Artifact, usual: Usual, pruned: Network, _: Mapping[str, str]) -> Interval | None:
        """Return the share of the budget that a pruned network of some shape uses; see `share_used`."""
        left = {group.name: group.num_units for group in pruned.groups}
        counts = {group.name: left.get(group.name, 0) for group in self.network.groups}
        precision = self.bench.workload.precision
        of_plan = counts if precision == self.options.workload.precision else [precision, counts]
        path = self.workspace.common / f"measured-{digest(of_plan)[:16]}.json"
        measure = partial(
            self.bench.measure_counts,
            self.workspace.dense / dense.path,
            self.network,
            counts,
            path,
            probe=partial(self.bench.export_probe, self.source, counts, examples=self.shown.trained),
            usual=usual,
        )
        return self.share_used(dense, path, measure)

"""What the stages of all prune jobs share; each goes on from what an earlier start left in the workspace."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Generic, Self

from dilap import methods
from dilap.core.artifact import Artifact
from dilap.core.codec import decode, encode, read_json, write_json
from dilap.core.errors import Infeasible, Mismatch
from dilap.core.graph import Shape
from dilap.core.measurement import Interval, Measurement
from dilap.core.plan import Plan
from dilap.evaluation.subject import require_unchanged
from dilap.job.inputs import code_sha256
from dilap.job.measuring import MeasuringBench, Usual
from dilap.job.options import CommonOptions
from dilap.job.run_folder import Workspace
from dilap.job.verdict import percent
from dilap.profilers.configuration import Configuration
from dilap.profilers.profiler import budget_share
from dilap.search.limit import CostLimit
from dilap.search.method import Pruned
from dilap.search.network_task import LayerCosts
from dilap.search.pruned_file import load_pruned, save_pruned

# The search aims at this share of the budget. The rest is for the errors of a latency table (1-2 %), and because the
# upper end of the measured interval has to keep the budget, which is about 0.8 % above the share itself.
AIM = 0.975
ALREADY_KEPT = "the dense model already keeps this budget: nothing to prune, nothing written"
_MEASURE = "latency of the plans found"  # the name of a stage that runs inside the pruning stage


@dataclass(frozen=True, kw_only=True)
class Goal:
    """A budget in numbers.

    `cost_limit` is in seconds as they are predicted, or in weights where a ratio is asked. `floor_seconds`, which no
    plan removes, and `fastest_seconds`, which the fastest plan takes, are scaled to the machine's speed of today; both
    are None for a ratio, as is `usual`. `unpruned_share` is the latency of the model that is pruned as a share of the
    dense one's, of which it lacks the tokens that its vocabulary lost. `caveats` are those of the predictions,
    and `costs` what makes them, where methods may ask for them.
    """

    cost_limit: CostLimit
    floor_seconds: float | None = None
    fastest_seconds: float | None = None
    usual: Usual | None = None
    unpruned_share: float = 1.0
    caveats: tuple[str, ...] = ()
    costs: LayerCosts | None = None


@dataclass(frozen=True, kw_only=True)
class CommonStages(ABC, Generic[Shape]):
    """The stages of one job. What a stage has made is kept in the workspace, and read there by a continued run."""

    options: CommonOptions
    workspace: Workspace
    bench: MeasuringBench
    configuration: Configuration | None = None

    @abstractmethod
    def export(self, plan: Plan[Shape], folder: Path, precision: str | None) -> None:
        """Export the model as it is now, cut by `plan`, and verify it; the precision is by default the workload's."""

    @abstractmethod
    def _begun_configuration(self, dense: Path) -> Configuration:
        """Return the configuration in which a new run measures, given the file of the dense model."""

    def artifact(self, folder: Path, plan: Plan[Shape], *, precision: str | None = None) -> Artifact:
        """Return the artifact in `folder`; where there is none yet, export the model as it is now, and verify it.

        Its `precision` is by default the workload's. Raises Mismatch where the artifact is not of `plan` and this
        model, or one of its files was changed.
        """
        if not folder.exists():
            with self.workspace.stage(f"export {folder.name}"):
                self.export(plan, folder, precision)
        artifact = self.bench.read_artifact(folder)
        if artifact.plan_digest != plan.digest:
            raise Mismatch(
                f"{folder} was exported from another plan or model ({artifact.plan_digest[:12] or 'none'}) than this "
                f"run's ({plan.digest[:12]}): remove that folder and run again"
            )
        require_unchanged(folder, artifact)
        return artifact

    def configured(self, dense: Artifact) -> Self:
        """Return the same stages in the runtime's fastest configuration on this device, unless plain is asked for."""
        if self.options.estimate or self.options.configuration == "plain":
            return self
        kept = self.workspace.common / "configuration.json"
        if not kept.exists():
            write_json(kept, encode(self._begun_configuration(self.workspace.dense / dense.path)))
        found = decode(Configuration, read_json(kept), source=str(kept))
        self.workspace.log.say(f"configuration: {found.workload.configuration}")
        return replace(self, bench=replace(self.bench, workload=found.workload), configuration=found)

    def dense_measurement(self, dense: Artifact) -> Measurement:
        """Return what the dense model takes, which is measured once."""
        path = self.workspace.common / "dense-latency.json"
        if not path.exists():
            write_json(path, encode(self.bench.measure([self.workspace.dense / dense.path])[0]))
        found = decode(Measurement, read_json(path), source=str(path))
        require_measured(found, dense, source=str(path))
        return found

    def require_reachable(self, fastest: float, *, limit: float, dense: float, advice: str) -> None:
        """Raise Infeasible, with `advice`, where the fastest plan takes too long, all in seconds."""
        if fastest > AIM * limit:
            raise Infeasible(
                f"budget {self.options.budget} ({limit * 1e3:.2f} ms) is below the fastest reachable "
                f"{fastest * 1e3:.2f} ms, {fastest / dense:.0%} of dense: take a larger budget, {advice}"
            )

    def answered(self, ask: Callable[[], Pruned[Shape]]) -> Pruned[Shape]:
        """Return what a method answers; it is asked once in a run, however often the run is continued.

        `seconds` (without those of measuring) and `peak_memory_bytes` are added to the answer's facts.
        """
        path = self.workspace.cache / "pruned.safetensors"
        if not path.exists():
            start, measured = time.monotonic(), self._seconds_measured
            with self.workspace.stage("prune"):
                pruned = ask()
            cost = {
                "seconds": time.monotonic() - start - (self._seconds_measured - measured),
                "peak_memory_bytes": self.workspace.stage_peak_bytes["prune"],
            }
            save_pruned(path, replace(pruned, facts={**pruned.facts, **cost}))
        return load_pruned(path)

    @property
    def _seconds_measured(self) -> float:
        return self.workspace.stage_seconds.get(_MEASURE, 0.0)

    @property
    def chooses_precision(self) -> bool:
        """Whether the method may choose the precision of every part; of a ratio precisions make no difference."""
        several = len(self.bench.precisions) > 1 and self.options.budget.ratio is None
        return several and methods.chooses_precision(self.options.method)

    @property
    def method_cache(self) -> Path:
        """Folder for what the method keeps; every version of a user's own method has another."""
        name, folder = self.options.method, self.workspace.methods
        return folder / f"own-{code_sha256(name)[:16]}" if ":" in name else folder

    def share_used(self, dense: Artifact, path: Path, measure: Callable[[], Sequence[Measurement]]) -> Interval | None:
        """Return the share of the budget that a plan uses.

        `measure` measures the dense model beside one of the plan's shape as for the proof, and keeps that in `path`.
        It is None where the device was disturbed, because a search that trusted such a number went 2 % over its budget.
        """
        with self.workspace.stage(_MEASURE):
            both = measure()
        require_measured(both[0], dense, source=str(path))
        used = budget_share(self.options.budget, *both)
        self.workspace.log.say(f"this plan, {self.bench.measured}: {percent(used)} of the budget{both[-1].mark}")
        if any(one.status == "contended" for one in both):
            self.workspace.log.say("the device was disturbed meanwhile, so the prediction stands")
            return None
        return used


def require_measured(measurement: Measurement, artifact: Artifact, *, source: str) -> None:
    """Raise Mismatch where the file that was measured is not the one that was exported."""
    if measurement.artifact_sha256 != artifact.sha256:
        raise Mismatch(
            f"{source}: measured was a file of sha256 {measurement.artifact_sha256[:12]}, exported {artifact.path} of "
            f"{artifact.sha256[:12]}: remove the run's folder and run again"
        )

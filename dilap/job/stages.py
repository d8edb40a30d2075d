"""The stages of a prune job up to the plan; each goes on from what an earlier start left in the workspace."""

import statistics
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from dilap import methods
from dilap.core.artifact import Artifact
from dilap.core.codec import decode, digest, encode, read_json, write_json
from dilap.core.costs import Costs
from dilap.core.errors import Infeasible, Mismatch
from dilap.core.measurement import Measurement
from dilap.core.plan import Plan, full_plan
from dilap.core.rules import WidthRules
from dilap.core.shape import Architecture
from dilap.core.space import Space
from dilap.evaluation.subject import require_unchanged
from dilap.job.bench import Bench, Usual, kept_configuration
from dilap.job.calibration import calibration_text
from dilap.job.inputs import code_sha256
from dilap.job.options import JobOptions
from dilap.job.run_folder import Workspace
from dilap.job.verdict import percent
from dilap.models.anatomy import architecture_of
from dilap.models.load import Source, load
from dilap.models.reference import Teacher
from dilap.models.text import Calibration
from dilap.profilers.configuration import Configuration
from dilap.profilers.profiler import budget_share
from dilap.profilers.tables.model import LatencyModel
from dilap.profilers.tables.table import LatencyTable
from dilap.search.layouts import Layout, build_space, width_rules
from dilap.search.limit import CostLimit
from dilap.search.method import Method, Pruned, PruneTask
from dilap.search.pruned_file import load_pruned, save_pruned
from dilap.search.weights import WeightCosts

# The search aims at this share of the budget. The rest is for the errors of a latency table (1-2 %), and because the
# upper end of the measured interval has to keep the budget, which is about 0.8 % above the share itself.
AIM = 0.975
# So much of the budget at most is given up for the noise of a plan's measurement. For more noise, which is a fault of
# the device, no smaller plan is chosen; the result will say that it is noisy.
_MOST_ALLOWED_FOR = 0.02
_MAX_TABLE_ERROR = 0.10  # the median relative error on held-out plans beyond which a table is refused
_MEASURE = "latency of the plans found"  # the name of a stage that runs inside the pruning stage


@dataclass(frozen=True, kw_only=True)
class Goal:
    """A budget in numbers, with the choices of width that a method has to keep it.

    `cost_limit` is in seconds of the latency table, or in weights where a ratio is asked. `floor_seconds`, which no
    plan removes, and `fastest_seconds`, which the fastest plan takes, are scaled to the machine's speed of today; both
    are None for a ratio, as is `usual`. `unpruned_share` is the latency of the model that is pruned as a share of the
    dense one's, of which it lacks the tokens that its vocabulary lost. `caveats` are those of the latency table.
    """

    space: Space
    layout: Layout
    rules: WidthRules
    cost_limit: CostLimit
    floor_seconds: float | None = None
    fastest_seconds: float | None = None
    usual: Usual | None = None
    unpruned_share: float = 1.0
    caveats: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Stages:
    """The stages of one job. What a stage has made is kept in the workspace, and read there by a continued run."""

    options: JobOptions
    workspace: Workspace
    bench: Bench
    source: Source
    configuration: Configuration | None = None

    def dense_artifact(self) -> Artifact:
        """Return the artifact of the dense model, which is exported once.

        The dense model is the one that the user gave, with its whole vocabulary: a budget is a share of its latency.
        """
        vocabulary, folder = self.source.vocabulary, self.workspace.dense
        if vocabulary is None:
            return self.artifact(folder, full_plan(architecture_of(self.source.model), base=self.source.digest))
        stages = self if folder.exists() else replace(self, source=_whole(self.source))
        return stages.artifact(folder, full_plan(vocabulary.whole, base=vocabulary.whole_digest))

    def artifact(self, folder: Path, plan: Plan, *, precision: str | None = None) -> Artifact:
        """Return the artifact in `folder`; where there is none yet, export the model as it is now, and verify it.

        Its `precision` is by default the workload's. Raises Mismatch where the artifact is not of `plan` and this
        model, or one of its files was changed.
        """
        if not folder.exists():
            with self.workspace.stage(f"export {folder.name}"):
                self.bench.export(self.source, plan, folder, precision=precision)
        artifact = self.bench.read_artifact(folder)
        if artifact.plan_digest != plan.digest:
            raise Mismatch(
                f"{folder} was exported from another plan or model ({artifact.plan_digest[:12] or 'none'}) than this "
                f"run's ({plan.digest[:12]}): remove that folder and run again"
            )
        require_unchanged(folder, artifact)
        return artifact

    def configured(self, dense: Artifact) -> "Stages":
        """Return the same stages in the runtime's fastest configuration on this device, unless plain is asked for."""
        if self.options.estimate or self.options.configuration == "plain":
            return self
        found = self._configuration(dense)
        self.workspace.log.say(f"configuration: {found.workload.configuration}")
        return replace(self, bench=replace(self.bench, workload=found.workload), configuration=found)

    def _configuration(self, dense: Artifact) -> Configuration:
        """Return the configuration of this run, which is kept in the workspace.

        A new run takes that of the table that was given, or else the fastest one, which all runs of a model share.
        """
        own, plain, threads = (
            self.workspace.common / "configuration.json",
            self.bench.workload,
            self.options.threads_tried,
        )
        if not own.exists():
            if self.options.table is not None:
                given = LatencyTable.read(Path(self.options.table)).header.workload
                count = given.threads if threads else plain.threads
                found = Configuration(workload=replace(plain, switches=given.switches, threads=count), plain=plain)
            else:
                path = self.workspace.dense / dense.path
                with self.workspace.stage("find the fastest configuration"):
                    found = kept_configuration(self.bench, self.source, threads=threads, dense=path)
            write_json(own, encode(found))
        return decode(Configuration, read_json(own), source=str(own))

    def goal(self, dense: Artifact, layout: Layout) -> Goal | None:
        """Return the budget in numbers, or None where the dense model keeps it already; log the reachable latencies.

        Raises Infeasible where no plan is fast enough, and Mismatch where the latency table cannot be trusted.
        """
        architecture, own = architecture_of(self.source.model), self.options.workload.precision
        ratio = self.options.budget.ratio
        costs = self._latency_model(architecture) if ratio is None else WeightCosts(architecture=architecture)
        precisions = self.bench.precisions if self.chooses_precision else ("",)
        capabilities = {one: self.bench.backend.capabilities(architecture, precision=one or own) for one in precisions}
        space = build_space(costs, architecture, capabilities, layout=layout)
        rules = width_rules(layout, self.bench.backend.capabilities(architecture, precision=own))
        if ratio is None:
            return self._latency_goal(dense, costs, space, layout, rules)
        limit = (1 - ratio) * costs.predict(architecture.layers)
        cost_limit = CostLimit(limit=limit, predict=costs.predict)
        return Goal(space=space, layout=layout, rules=rules, cost_limit=cost_limit)

    @property
    def chooses_precision(self) -> bool:
        """Whether the method may choose the precision of every part; of a ratio precisions make no difference."""
        several = len(self.bench.precisions) > 1 and self.options.budget.ratio is None
        return several and methods.chooses_precision(self.options.method)

    def _latency_goal(
        self, dense: Artifact, costs: Costs, space: Space, layout: Layout, rules: WidthRules
    ) -> Goal | None:
        budget = self.options.budget
        with self.workspace.stage("latency of the dense model"):
            measured, unpruned = self._dense_measurements(dense)
        dense_seconds, unpruned_seconds = (one.seconds(budget.statistic) for one in (measured, unpruned))
        # the machine's speed of today against that of the table
        scale = unpruned_seconds / costs.predict(space.architecture.layers)
        usual = Usual(seconds=dense_seconds / max(1, scale), statistic=budget.statistic)
        floor, fastest = scale * space.floor, scale * space.cost(space.fastest)
        limit = budget.limit_seconds(dense_seconds=dense_seconds)
        smaller = "" if unpruned is measured else f", with the smaller vocabulary {unpruned_seconds * 1e3:.2f} ms"
        self.workspace.log.say(
            f"dense {dense_seconds * 1e3:.2f} ms{measured.mark}{smaller}; floor that no plan removes (embedding, head, "
            f"launch) {floor * 1e3:.2f} ms; fastest reachable {fastest * 1e3:.2f} ms; budget {budget} is "
            f"{limit * 1e3:.2f} ms"
        )
        if limit >= unpruned_seconds and not self.chooses_precision:
            self.workspace.log.say(_already_kept(self.options, dense_seconds, unpruned_seconds))
            return None
        if fastest > AIM * limit:
            raise Infeasible(
                f"budget {budget} ({limit * 1e3:.2f} ms) is below the fastest reachable {fastest * 1e3:.2f} ms, "
                f"{fastest / dense_seconds:.0%} of dense: take a larger budget, a smaller --precision, --layout free "
                "or a smaller model"
            )
        cost_limit = CostLimit(
            limit=AIM * limit / scale,
            predict=costs.predict,
            measure=lambda architecture, precisions: self._share_used(architecture, precisions, dense, usual),
            aim=AIM,
        )
        return Goal(
            space=space,
            layout=layout,
            rules=rules,
            cost_limit=cost_limit,
            floor_seconds=floor,
            fastest_seconds=fastest,
            usual=usual,
            unpruned_share=unpruned_seconds / dense_seconds,
            caveats=costs.caveats,
        )

    def _dense_measurements(self, dense: Artifact) -> tuple[Measurement, Measurement]:
        """Return what the dense model takes, and the model that is pruned: another one where its vocabulary was cut.

        For the latter stands a model of its shape with random weights, because latency does not depend on them.
        """
        if self.source.vocabulary is None:
            measured = self._dense_measurement(dense)
            return measured, measured
        path, architecture = self.workspace.common / "vocabulary-latency.json", architecture_of(self.source.model)
        both = self.bench.measure_widths(self.workspace.dense / dense.path, architecture, path, usual=None)
        require_measured(both[0], dense, source=str(path))
        return both[0], both[1]

    def _dense_measurement(self, dense: Artifact) -> Measurement:
        path = self.workspace.common / "dense-latency.json"
        if not path.exists():
            write_json(path, encode(self.bench.measure([self.workspace.dense / dense.path])[0]))
        found = decode(Measurement, read_json(path), source=str(path))
        require_measured(found, dense, source=str(path))
        return found

    def _latency_model(self, architecture: Architecture) -> LatencyModel:
        if self.bench.estimate:
            return self.bench.estimated_model(architecture)
        if self.options.table is not None:
            path = Path(self.options.table)
            table = self.bench.read_table(path, architecture)
        else:
            path = self.bench.table_path(self.source.name, architecture)
            with self.workspace.stage("latency table"):
                table = self.bench.build_table(architecture, path)
        table.write(self.workspace.folder / "table.jsonl")
        model = table.model(self.options.budget.statistic)
        self._require_claimable(model, path)
        return model

    def _require_claimable(self, model: LatencyModel, path: Path) -> None:
        """Raise Mismatch for a table without held-out plans, or with too large an error on them."""
        errors = model.holdout_errors()
        if not errors:
            raise Mismatch(
                f"{path}: the latency table has no held-out plans that count, so nothing shows how well it predicts: "
                f"measure what it lacks with dilap-profile --device {self.options.target} --out {path}"
            )
        if statistics.median(errors) > _MAX_TABLE_ERROR:
            raise Mismatch(
                f"the latency table misses held-out plans by {statistics.median(errors):.0%} (allowed: "
                f"{_MAX_TABLE_ERROR:.0%}): no budget can be claimed on it; measure it again on a quiet machine"
            )

    def calibration(self) -> Calibration:
        """Return the calibration text, which is made once."""
        return calibration_text(self.source, self.options.text, self.workspace)

    def teacher(self, name: str, tokens: torch.Tensor, *, keep_states: bool = False) -> Teacher:
        """Return what the dense model says about `tokens`; it is asked once, and the answer is kept under `name`."""
        path = self.workspace.methods / f"teacher-{name}.safetensors"
        return Teacher.once(path, self.source.model, tokens, keep_states=keep_states)

    def prune(self, method: Method, goal: Goal, text: Calibration) -> Pruned:
        """Return what `method` answers; it is called once in a run, however often the run is continued.

        `seconds` (without those of measuring) and `peak_memory_bytes` are added to the answer's facts.
        """
        path = self.workspace.cache / "pruned.safetensors"
        if not path.exists():
            start, measured = time.monotonic(), self._seconds_measured
            with self.workspace.stage("prune"):
                pruned = method(self._task(goal, text))
            goal.rules.require(pruned.plan)
            cost = {
                "seconds": time.monotonic() - start - (self._seconds_measured - measured),
                "peak_memory_bytes": self.workspace.stage_peak_bytes["prune"],
            }
            save_pruned(path, replace(pruned, facts={**pruned.facts, **cost}))
        return load_pruned(path)

    @property
    def _seconds_measured(self) -> float:
        return self.workspace.stage_seconds.get(_MEASURE, 0.0)

    def _task(self, goal: Goal, text: Calibration) -> PruneTask:
        train = text.train[: self.options.calibration.train_sequences]
        return PruneTask(
            model=self.source.model,
            base=self.source.digest,
            text=replace(text, train=train),
            cost_limit=goal.cost_limit,
            space=goal.space,
            rules=goal.rules,
            levels=self.options.levels,
            tokenizer=self.source.tokenizer,
            cache=self._method_cache,
            seed=self.options.seed,
            bar=self.workspace.log.bar,
            report=self.workspace.log.say,
        )

    @property
    def _method_cache(self) -> Path:
        """Folder for what the method keeps; every version of a user's own method has another."""
        name, folder = self.options.method, self.workspace.methods
        return folder / f"own-{code_sha256(name)[:16]}" if ":" in name else folder

    def _share_used(
        self, architecture: Architecture, precisions: Mapping[str, str], dense: Artifact, usual: Usual
    ) -> float | None:
        """Return the share of the budget that a pruned network uses: the upper end of the measured interval.

        It is measured as for the proof, and kept for a continued run. The model that is measured has random weights,
        because latency does not depend on them. Noise adds at most `_MOST_ALLOWED_FOR` to the share. It is None where
        the device was disturbed, because a search that trusted such a number went 2 % over its budget.
        """
        shape = [asdict(architecture), dict(precisions)] if precisions else asdict(architecture)
        path = self.workspace.common / f"measured-{digest(shape)[:16]}.json"
        with self.workspace.stage(_MEASURE):
            both = self.bench.measure_widths(
                self.workspace.dense / dense.path, architecture, path, usual=usual, precisions=precisions
            )
        require_measured(both[0], dense, source=str(path))
        used = budget_share(self.options.budget, *both)
        self.workspace.log.say(f"this plan, {self.bench.measured}: {percent(used)} of the budget{both[-1].mark}")
        if any(one.status == "contended" for one in both):
            self.workspace.log.say("the device was disturbed meanwhile, so the latency table's prediction stands")
            return None
        return min(used.high, used.value + _MOST_ALLOWED_FOR)


def _whole(source: Source) -> Source:
    """Load the model of a source again, with its whole vocabulary. Raises Mismatch where its files have changed."""
    assert source.vocabulary is not None
    found = load(source.name, merge_adapter=source.merge_adapter, compute=str(source.model.device))
    if found.digest != source.vocabulary.whole_digest:
        raise Mismatch(f"{source.name}: the model's files changed since it was loaded; run again")
    return found


def _already_kept(options: JobOptions, dense_seconds: float, unpruned_seconds: float) -> str:
    """Say that there is nothing to prune."""
    if unpruned_seconds == dense_seconds:
        return "the dense model already keeps this budget: nothing to prune, nothing written"
    return (
        f"with the vocabulary of {options.vocabulary} alone the model takes {unpruned_seconds * 1e3:.2f} ms, which "
        "keeps this budget: nothing to prune, nothing written; dilap-export --vocabulary writes that model"
    )


def require_measured(measurement: Measurement, artifact: Artifact, *, source: str) -> None:
    """Raise Mismatch where the file that was measured is not the one that was exported."""
    if measurement.artifact_sha256 != artifact.sha256:
        raise Mismatch(
            f"{source}: measured was a file of sha256 {measurement.artifact_sha256[:12]}, exported {artifact.path} of "
            f"{artifact.sha256[:12]}: remove the run's folder and run again"
        )

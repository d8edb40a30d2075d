"""The stages of a decoder's prune job up to the plan; see `dilap.job.common_stages`."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from dilap import methods
from dilap.core.artifact import Artifact
from dilap.core.codec import digest
from dilap.core.errors import Mismatch
from dilap.core.measurement import Interval, Measurement
from dilap.core.plan import Plan, full_plan
from dilap.core.rules import WidthRules
from dilap.core.shape import Architecture
from dilap.core.space import Space
from dilap.job.bench import Bench
from dilap.job.calibration import calibration_text
from dilap.job.common_stages import AIM, ALREADY_KEPT, CommonStages, Goal, require_measured
from dilap.job.measuring import Usual
from dilap.job.options import JobOptions
from dilap.job.tables import prediction_error, require_claimable
from dilap.models.anatomy import architecture_of
from dilap.models.load import Source, load
from dilap.models.processes import team
from dilap.models.reference import Teacher
from dilap.models.text import Calibration, training_text
from dilap.profilers.configuration import Configuration
from dilap.profilers.tables.model import LatencyModel
from dilap.profilers.tables.table import LatencyTable
from dilap.search.layouts import Layout, build_space, width_rules
from dilap.search.limit import CostLimit
from dilap.search.method import Method, Pruned, PruneTask
from dilap.search.weights import WeightCosts


@dataclass(frozen=True, kw_only=True)
class DecoderGoal(Goal):
    """A budget in numbers, with the choices of width that a method has to keep it."""

    space: Space
    layout: Layout
    rules: WidthRules


@dataclass(frozen=True, kw_only=True)
class Stages(CommonStages[Architecture]):
    """The stages of a decoder's job."""

    options: JobOptions
    bench: Bench
    source: Source

    def dense_artifact(self) -> Artifact:
        """Return the artifact of the dense model, which is exported once.

        The dense model is the one that the user gave, with its whole vocabulary: a budget is a share of its latency.
        """
        vocabulary, folder = self.source.vocabulary, self.workspace.dense
        if vocabulary is None:
            return self.artifact(folder, full_plan(architecture_of(self.source.model), base=self.source.digest))
        stages = self if folder.exists() else replace(self, source=_whole(self.source))
        return stages.artifact(folder, full_plan(vocabulary.whole, base=vocabulary.whole_digest))

    def export(self, plan: Plan, folder: Path, precision: str | None) -> None:
        self.bench.export(self.source, plan, folder, precision=precision)

    def _begun_configuration(self, dense: Path) -> Configuration:
        """Return that of the table that was given, or else the fastest one, which all runs of a model share."""
        plain, threads = self.bench.workload, self.options.threads_tried
        if self.options.table is None:
            kept = self.bench.configuration_path(self.source.name, architecture_of(self.source.model), threads=threads)
            with self.workspace.stage("find the fastest configuration"):
                return self.bench.kept_configuration(kept, threads=threads, dense=lambda: dense)
        given = LatencyTable.read(Path(self.options.table)).header.workload
        count = given.threads if threads else plain.threads
        return Configuration(workload=replace(plain, switches=given.switches, threads=count), plain=plain)

    def goal(self, dense: Artifact, layout: Layout) -> DecoderGoal | None:
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
        if isinstance(costs, LatencyModel):
            return self._latency_goal(dense, costs, space, layout, rules)
        assert ratio is not None
        limit = (1 - ratio) * costs.predict(architecture.layers)
        cost_limit = CostLimit(limit=limit, predict=costs.predict)
        return DecoderGoal(space=space, layout=layout, rules=rules, cost_limit=cost_limit)

    def _latency_goal(
        self, dense: Artifact, costs: LatencyModel, space: Space, layout: Layout, rules: WidthRules
    ) -> DecoderGoal | None:
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
        advice = "a smaller --precision, --layout free or a smaller model"
        self.require_reachable(fastest, limit=limit, dense=dense_seconds, advice=advice)
        cost_limit = CostLimit(
            limit=AIM * limit / scale,
            predict=costs.predict,
            error=prediction_error(costs),
            measure=lambda architecture, precisions: self._share_used(architecture, precisions, dense, usual),
            aim=AIM,
        )
        return DecoderGoal(
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
            measured = self.dense_measurement(dense)
            return measured, measured
        path, architecture = self.workspace.common / "vocabulary-latency.json", architecture_of(self.source.model)
        both = self.bench.measure_widths(self.workspace.dense / dense.path, architecture, path, usual=None)
        require_measured(both[0], dense, source=str(path))
        return both[0], both[1]

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
        remeasure = f"dilap-profile --device {self.options.target} --out {path}"
        require_claimable(model, advice=remeasure)
        return model

    def calibration(self) -> Calibration:
        """Return the calibration text, which is made once."""
        return calibration_text(self.source, self.options.text, self.workspace)

    def teacher(self, name: str, tokens: torch.Tensor, *, keep_states: bool = False) -> Teacher:
        """Return what the dense model says about `tokens`; it is asked once, and the answer is kept under `name`."""
        path = self.workspace.methods / f"teacher-{name}.safetensors"
        return Teacher.once(path, self.source.model, tokens, keep_states=keep_states)

    def prune(self, method: Method, goal: DecoderGoal, text: Calibration) -> Pruned:
        """Return what `method` answers; see `answered`."""

        def ask() -> Pruned:
            pruned = method(self._task(goal, text))
            goal.rules.require(pruned.plan)
            return pruned

        return self.answered(ask)

    def _task(self, goal: DecoderGoal, text: Calibration) -> PruneTask:
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
            training=self._training(),
            cache=self.method_cache,
            seed=self.options.seed,
            team=team(),
            bar=self.workspace.log.bar,
            report=self.workspace.log.say,
        )

    def _training(self) -> torch.Tensor | None:
        """Return the text for methods that train, None where the options name none or the method trains nothing."""
        name, length = self.options.training_text, self.options.calibration.sequence_length
        if name is None or not (self.options.method in methods.TRAINED or ":" in self.options.method):
            return None
        return training_text(name, self.source.tokenizer, length=length)

    def _share_used(
        self, architecture: Architecture, precisions: Mapping[str, str], dense: Artifact, usual: Usual
    ) -> Interval | None:
        """Return the share of the budget that a pruned model uses; see `share_used`.

        The model that is measured has random weights, because latency does not depend on them.
        """
        shape = [asdict(architecture), dict(precisions)] if precisions else asdict(architecture)
        path = self.workspace.common / f"measured-{digest(shape)[:16]}.json"
        return self.share_used(
            dense,
            path,
            lambda: self.bench.measure_widths(
                self.workspace.dense / dense.path, architecture, path, usual=usual, precisions=precisions
            ),
        )


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
        return ALREADY_KEPT
    return (
        f"with the vocabulary of {options.vocabulary} alone the model takes {unpruned_seconds * 1e3:.2f} ms, which "
        "keeps this budget: nothing to prune, nothing written; dilap-export --vocabulary writes that model"
    )

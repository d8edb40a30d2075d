"""The stages of a prune job up to the plan; each goes on from what an earlier run left in the workspace."""

import statistics
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from dilap.builtin import DEFAULT_MODEL
from dilap.cli.bench import Bench
from dilap.cli.console import Console
from dilap.cli.estimated_bench import EstimatedBench
from dilap.cli.workspace import Workspace
from dilap.codec import digest, written_aside
from dilap.errors import Infeasible, Mismatch
from dilap.evaluator import Evaluator
from dilap.library import LevelFit, LibraryOptions, build_library
from dilap.library_file import load_library, save_library
from dilap.methods.task import Method, SearchOptions, SearchResult, SearchTask
from dilap.profilers.fit import LatencyModel
from dilap.profilers.probes import default_levels
from dilap.profilers.profiler import budget_share
from dilap.profilers.search_space import Layout, build_space
from dilap.recover import RecoveryOptions
from dilap.refit import RefitOptions
from dilap.source import Source
from dilap.space import Space
from dilap.supernet import Supernet
from dilap.teacher import Teacher
from dilap.text import Calibration, CalibrationOptions, calibration
from dilap.types import Artifact, Budget, Plan, Workload

_AIM = 0.985  # of the limit: a table is right to 1-2 %, and a budget missed by 0.1 % is missed
_ENOUGH = 0.95  # of the limit used: a plan that uses less gave away quality for nothing
_CORRECTIONS = 3
_MAX_TABLE_ERROR = 0.10


@dataclass(frozen=True, kw_only=True)
class JobOptions:
    """What a run depends on: two runs with equal options are the same run."""

    budget: Budget
    model: str = DEFAULT_MODEL
    target: str = "host_cpu"
    backend: str = "llamacpp"
    workload: Workload = field(default_factory=Workload)
    force: bool = False
    estimate: bool = False
    layout: Layout | None = None
    method: str = "dilap"
    table: str | None = None
    calibration: CalibrationOptions = field(default_factory=CalibrationOptions)
    evaluation_text: str = "python-docs"
    evaluation_sequences: int = 32
    library: LibraryOptions = field(default_factory=LibraryOptions)
    search: SearchOptions = field(default_factory=SearchOptions)
    refit: RefitOptions = field(default_factory=RefitOptions)
    recovery: RecoveryOptions = field(default_factory=RecoveryOptions)


@dataclass(frozen=True, kw_only=True)
class Goal:
    """A budget made concrete; `table_limit` is in the table's seconds, the others in those of this day's machine."""

    space: Space
    layout: Layout
    floor_seconds: float
    fastest_seconds: float
    table_limit: float


@dataclass(frozen=True, kw_only=True)
class Found:
    """A search result and the share of the budget that its widths were measured at."""

    result: SearchResult
    used: float


@dataclass(frozen=True, kw_only=True)
class Stages:
    """The stages; each takes what it needs from the workspace where an earlier run left it there."""

    options: JobOptions
    workspace: Workspace
    console: Console
    bench: Bench
    source: Source

    def artifact(self, name: str, plan: Plan) -> Artifact:
        """The model as it stands, exported and verified."""
        folder = self.workspace.folder / name
        if not folder.exists():
            with self.workspace.stage(f"export {name}"):
                self.bench.export(self.source, plan, folder)
        return self.bench.read_artifact(folder)

    def file(self, name: str, artifact: Artifact) -> Path:
        """The model file of an artifact of this run."""
        return self.workspace.folder / name / artifact.path

    def goal(self, dense: Artifact, layout: Layout) -> Goal | None:
        """Says floor and fastest reachable latency; None where the dense model keeps the budget already.

        Raises Infeasible below the fastest, Mismatch where the table cannot be trusted.
        """
        latency = self._latency_model(dense)
        budget = self.options.budget
        capabilities = self.bench.backend.capabilities(
            latency.architecture.family, precision=self.options.workload.precision
        )
        attention_levels, ffn_levels = default_levels(latency.architecture, capabilities)
        space = build_space(latency, attention_levels=attention_levels, ffn_levels=ffn_levels, layout=layout)
        with self.workspace.stage("measure the dense model"):
            dense_seconds = self.bench.measure([self.file("dense", dense)])[0].seconds(budget.statistic)
        scale = dense_seconds / space.seconds(space.dense)  # the table's day against this one
        floor, fastest = scale * space.fixed_seconds, scale * space.seconds(space.fastest)
        limit = budget.limit_seconds(dense_seconds=dense_seconds)
        self.console.say(
            f"dense {dense_seconds * 1e3:.2f} ms; floor that no plan removes (embedding, head, launch) "
            f"{floor * 1e3:.2f} ms; fastest reachable {fastest * 1e3:.2f} ms; budget {budget} is {limit * 1e3:.2f} ms"
        )
        if limit >= dense_seconds:
            self.console.say("the dense model already keeps this budget: nothing to prune, nothing written")
            return None
        if fastest > _AIM * limit:
            raise Infeasible(
                f"budget {budget} ({limit * 1e3:.2f} ms) is below the fastest reachable {fastest * 1e3:.2f} ms, "
                f"{fastest / dense_seconds:.0%} of dense: take a larger budget, a smaller --precision, --layout free "
                "or a smaller model"
            )
        return Goal(
            space=space,
            layout=layout,
            floor_seconds=floor,
            fastest_seconds=fastest,
            table_limit=_AIM * limit / scale,
        )

    def _latency_model(self, dense: Artifact) -> LatencyModel:
        if isinstance(self.bench, EstimatedBench):
            return self.bench.latency_model(dense.architecture)
        if self.options.table is not None:
            table = self.bench.read_table(Path(self.options.table), dense.architecture)
        else:
            path = self.bench.table_path(self.source.name, dense.architecture)
            with self.workspace.stage("latency table"):
                table = self.bench.build_table(dense.architecture, path)
        table.write(self.workspace.folder / "table.jsonl")
        model = table.model(self.options.budget.statistic)
        errors = model.holdout_errors()
        if errors and statistics.median(errors) > _MAX_TABLE_ERROR:
            raise Mismatch(
                f"the latency table misses held-out plans by {statistics.median(errors):.0%} (allowed: "
                f"{_MAX_TABLE_ERROR:.0%}): no budget can be claimed on it; measure it again on a quiet machine"
            )
        return model

    def calibration(self) -> Calibration:
        options, path = self.options.calibration, self.workspace.cache / "calibration.safetensors"
        count = options.train_sequences + options.validation_sequences + self._recovery_sequences
        if not path.exists():
            total = count * options.sequence_length
            with (
                self.workspace.stage("calibration text"),
                self.console.bar("calibration", total=total, unit="tok") as bar,
            ):
                text = calibration(self.source.model, self.source.tokenizer, self._text_options, progress=bar.update)
                with written_aside(path) as temporary:
                    save_file({"train": text.train.contiguous(), "validation": text.validation.contiguous()}, temporary)
        tensors = load_file(path)
        return Calibration(name=options.source, train=tensors["train"], validation=tensors["validation"])

    @property
    def _recovery_sequences(self) -> int:
        """More of the training split, so that recovery does not see one sequence too often."""
        recovery, text = self.options.recovery, self.options.calibration
        if recovery.mode == "none":
            return 0
        return max(0, recovery.steps * recovery.batch_tokens // text.sequence_length - text.train_sequences)

    @property
    def _text_options(self) -> CalibrationOptions:
        text = self.options.calibration
        return replace(text, train_sequences=text.train_sequences + self._recovery_sequences)

    def library(self, space: Space, tokens: torch.Tensor) -> list[list[LevelFit]]:
        path = self.workspace.cache / "library.safetensors"
        if not path.exists():
            with (
                self.workspace.stage("level library"),
                self.console.bar("library", total=tokens.numel(), unit="tok") as bar,
            ):
                save_library(
                    path,
                    build_library(self.source.model, space, tokens, options=self.options.library, progress=bar.update),
                )
        return load_library(path)

    def search(
        self, method: Method, goal: Goal, library: list[list[LevelFit]], text: Calibration, dense: Artifact
    ) -> "Found":
        """Search, measure the widths that came out, and correct the limit by the gap until the budget is used well.

        Latency does not depend on the weights' values, so a random model of the same widths is measured. The gap
        between measured and predicted is the mean of all attempts: one alone sent a search 8 % too far on a busy
        machine.
        """
        net = Supernet(self.source.model, library)
        with self.workspace.stage("search"):
            teacher = Teacher.of(self.source.model, text.validation)
            evaluator = Evaluator(net=net, teacher=teacher, journal=self.workspace.cache / "journal")
            task = SearchTask(
                evaluator=evaluator,
                space=goal.space,
                limit=goal.table_limit,
                options=self.options.search,
                report=self.console.say,
            )
            found = method(task)
        attempts: list[Found] = []
        gaps: list[float] = []
        for attempt in range(1 + _CORRECTIONS):
            used = self._share_used(goal, found, dense)
            self.console.say(f"these widths, measured: {used:.1%} of the budget")
            attempts.append(Found(result=found, used=used))
            gaps.append(used / (_AIM * goal.space.seconds(found.config) / goal.table_limit))
            if _ENOUGH <= used <= 1.0 or attempt == _CORRECTIONS:
                break
            fastest = goal.space.seconds(goal.space.fastest)
            options = replace(task.options, evaluations=0)  # of 10 more moves at most one was kept
            limit = max(goal.table_limit / statistics.fmean(gaps), fastest)
            task = replace(task, limit=limit, previous=found, options=options)
            with self.workspace.stage("correct the limit by the gap"):
                found = method(task)
        net.close()
        return max(attempts, key=lambda one: (one.used <= 1.0, one.used if one.used <= 1.0 else -one.used))

    def _share_used(self, goal: Goal, found: SearchResult, dense: Artifact) -> float:
        """Measured share of the budget, taken once for every config and kept for a run that goes on."""
        widths = tuple(layer for layer in goal.space.widths(found.config) if not layer.is_empty)
        path = self.workspace.cache / f"widths-{digest([asdict(layer) for layer in widths])[:16]}.json"
        with self.workspace.stage("measure the widths found"):
            both = self.bench.measure_widths(
                self.file("dense", dense), replace(dense.architecture, layers=widths), path
            )
        return budget_share(self.options.budget, *both)

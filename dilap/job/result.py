"""The result of a prune job: the document that is kept, and the table that is shown at the end."""

import functools
import platform
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dilap import __version__, backends
from dilap.core.artifact import Artifact
from dilap.core.codec import decode, read_json
from dilap.core.errors import InvalidInput
from dilap.core.measurement import Interval, Measurement
from dilap.core.printable import joined
from dilap.core.shape import PRECISION_BITS, Architecture
from dilap.core.vocabulary import VocabularyCut
from dilap.core.workload import Budget, Statistic, Workload
from dilap.job.verdict import Verdict, percent, words
from dilap.profilers.profiler import is_shown

if TYPE_CHECKING:
    from dilap.models.text import EvaluationText


@dataclass(frozen=True, kw_only=True)
class Quality:
    """How good a model is on text that no search saw. KL is to the dense torch model, in nats a token.

    `through` is what read the text: the artifact's runtime, or `torch`, which scores the torch model in floats, as in
    all results of earlier versions. `reason` says why there are torch's numbers instead of the artifact's.
    """

    text: str
    text_sha256: str
    tokens: int
    kl: float
    perplexity: float
    through: str = "torch"
    reason: str = ""
    artifact_sha256: str = ""

    def __post_init__(self) -> None:
        if self.perplexity < 0 or self.tokens < 0:
            raise ValueError(f"a perplexity of {self.perplexity} on {self.tokens} tokens")

    @classmethod
    def on(cls, text: "EvaluationText", *, kl: float, perplexity: float) -> "Quality":
        """Return the quality of a torch model on `text`."""
        return cls(text=text.name, text_sha256=text.sha256, tokens=text.tokens.numel(), kl=kl, perplexity=perplexity)


@dataclass(frozen=True, kw_only=True)
class Side:
    """One of the two models, dense or pruned: what it is, what it costs and how good it is.

    `quality` is the artifact's own where its runtime can read it here; `torch_quality` is that of the torch model from
    which the artifact was exported.
    """

    artifact: Artifact
    measurement: Measurement
    seconds: float
    interval: Interval | None
    parameters: int
    flops: int
    quality: Quality
    torch_quality: Quality | None = None

    def __post_init__(self) -> None:
        if self.seconds <= 0 or min(self.parameters, self.flops) < 0 or (self.interval and self.interval.low <= 0):
            raise ValueError(f"{self.seconds} seconds, {self.parameters} parameters and {self.flops} FLOPs of a model")

    @property
    def in_torch(self) -> Quality:
        """Quality of the torch model in floats, which is the only one in results of earlier versions."""
        return self.torch_quality or self.quality


@dataclass(frozen=True, kw_only=True)
class DenseFormat:
    """The dense model in one precision, quantised by the runtime's own tools: what is had without pruning.

    `speedup` is against the dense model in the precision that ships; None in an estimate.
    """

    precision: str
    artifact: Artifact
    measurement: Measurement
    speedup: Interval | None
    quality: Quality

    def seconds(self, dense: Side, statistic: Statistic) -> float:
        """Return its latency, on the scale of the measurement of `dense`, the dense model that ships."""
        if self.speedup is None:
            return self.measurement.seconds(statistic)
        return dense.seconds / self.speedup.value


@dataclass(frozen=True, kw_only=True)
class PlainDefaults:
    """Both models measured in the runtime's plain defaults: without any switch, and with the threads asked for."""

    dense: Measurement
    pruned: Measurement
    speedup: Interval
    budget_used: Interval | None


@dataclass(frozen=True, kw_only=True)
class PruneResult:
    """Everything that a run claims, with what the claims rest on.

    `kl_without_recovery` and `perplexity_without_recovery` are of the pruned torch model before recovery. An estimate
    has no intervals and no speed-up.
    """

    status: Verdict
    budget_used: float
    target: str
    backend: str
    model: str
    model_digest: str
    method: str
    layout: str
    budget: Budget
    workload: Workload
    limit_seconds: float | None
    floor_seconds: float | None
    fastest_seconds: float | None
    predicted_seconds: float | None
    dense: Side
    pruned: Side
    speedup: Interval | None
    speedup_shown: bool
    plan_digest: str
    validation_kl: float
    kl_without_recovery: float
    recovery: str
    calibration: str
    calibration_sha256: str
    calibration_sequences: int
    calibration_sequence_length: int
    options: dict[str, Any]
    stage_seconds: dict[str, float]
    versions: dict[str, str]
    seed: int
    notes: tuple[str, ...] = ()
    # The first results of this version lack the fields from here on, but can still be read.
    perplexity_without_recovery: float | None = None
    recovery_kls: tuple[float, ...] = ()
    recovery_validation_kls: tuple[tuple[int, float], ...] = ()  # by step, before the first one as step 0
    pruning_seconds: float | None = None
    pruning_peak_memory_bytes: int | None = None
    method_facts: dict[str, Any] = field(default_factory=dict)
    plain: PlainDefaults | None = None  # None where the configuration measured is plain too
    budget_interval: Interval | None = None  # of the share used; None where it was not measured
    stage_peak_bytes: dict[str, int] = field(default_factory=dict)  # of the job's process, without those of runtimes
    vocabulary: VocabularyCut | None = None  # None where the pruned model has all tokens of the dense one
    formats: tuple[DenseFormat, ...] = ()  # the dense model in every precision, where precisions were chosen
    precisions: dict[str, str] = field(default_factory=dict)  # of the pruned model's parts, beside the artifact's own

    def __post_init__(self) -> None:
        if self.backend not in backends.BACKENDS or self.workload.precision not in PRECISION_BITS:
            raise ValueError(f"unknown backend {self.backend!r:.40} or precision {self.workload.precision!r:.40}")
        if self.budget_used < 0 or (self.speedup is not None and min(self.speedup.low, self.speedup.value) <= 0):
            raise ValueError("neither a speed-up nor a share of a budget can be negative")

    @property
    def share(self) -> Interval:
        """Share of the budget that is used; its interval has width 0 where only the share itself is known.

        That is so for weights, which are counted, for estimates, and for results of earlier versions.
        """
        used = self.budget_used
        return self.budget_interval or Interval(value=used, low=used, high=used)

    @property
    def verdict(self) -> str:
        """The status in words, for people."""
        return words(self.status, self.share)

    @property
    def statistic(self) -> Statistic:
        """The statistic of the intervals and the speed-up: the budget's, or p50 without a `budget_interval`.

        Results of earlier versions have no such interval: theirs are of medians alone.
        """
        return "p50" if self.budget_interval is None else self.budget.statistic

    @property
    def why_not_shown(self) -> str:
        """Why the speed-up is not shown, where `speedup_shown` is false."""
        crosses = self.speedup is None or not is_shown(self.speedup)
        return "the interval includes 1" if crosses else "the device was busy or slowed down"

    @property
    def is_estimate(self) -> bool:
        return self.status == "estimated"

    @property
    def share_of_dense(self) -> float:
        """Pruned latency as a share of the dense one: paired where there is a speed-up of the budget's statistic."""
        if self.speedup is None or self.is_estimate or self.statistic != self.budget.statistic:
            return self.pruned.seconds / self.dense.seconds
        return 1 / self.speedup.value

    @property
    def all_notes(self) -> tuple[str, ...]:
        """Everything that a reader must know, with the caveats that older results leave out of their `notes`."""
        found = [*self.notes, *caveats(self.dense.measurement, self.pruned.measurement)]
        if self.plain is not None:
            in_plain = caveats(self.plain.dense, self.plain.pruned)
            found += [f"in the runtime's plain defaults, {caveat}" for caveat in in_plain]
        return tuple(dict.fromkeys(found))


def caveats(dense: Measurement, pruned: Measurement) -> tuple[str, ...]:
    """Return the caveats of both measurements, each with the name of its model."""
    both = ("dense", dense), ("pruned", pruned)
    return tuple(f"the {name} model's {caveat}" for name, one in both for caveat in one.caveats)


def flops_of(architecture: Architecture, workload: Workload) -> int:
    """Return the FLOPs of one workload: a decoded token, or a prompt."""
    if workload.phase == "decode":
        return architecture.decode_flops(context=workload.context)
    return architecture.prefill_flops(prompt_tokens=workload.prompt_tokens)


def read_result(path: Path) -> PruneResult:
    """Read the result in the folder of a run. Raises InvalidInput, also for a run that measured no latency."""
    result = path / "result.json"
    document = read_json(result)
    if document.get("type") == "SparseResult":
        raise InvalidInput(
            f"{path} has zeros inside matrices (--pattern): no latency was measured, so there is nothing to report; "
            f"score it with dilap-eval {path}, and report the evaluation"
        )
    return decode(PruneResult, document, source=str(result))


@functools.cache
def versions() -> dict[str, str]:
    """Return the versions of all installed packages that a result depends on."""
    wanted = {"torch", "transformers", "tokenizers", "numpy", "scipy", "peft", "gguf", "llama-cpp-python"}
    wanted |= {"onnx", "onnx-ir", "onnxruntime", "executorch"}
    found = {one.name.lower().replace("_", "-"): one.version for one in metadata.distributions() if one.name}
    return {"dilap": __version__, "python": platform.python_version()} | {
        name: found[name] for name in sorted(wanted & set(found))
    }


def table(result: PruneResult) -> str:
    """Return the text that a job ends with: a table of both models, the verdict, and the notes."""
    dense, pruned = result.dense, result.pruned
    in_torch = " (torch)" if pruned.quality.through == "torch" else ""
    speedup = None if result.is_estimate else result.speedup
    rows: list[tuple[str, str, str, str]] = [
        ("", "dense", "pruned", "pruned / dense"),
        (
            f"{'ESTIMATED ' * result.is_estimate}latency {result.budget.statistic}",
            _ms(dense),
            _ms(pruned),
            _of_dense(result, dense.seconds, pruned.seconds, speedup),
        ),
        *_interval_rows(result),
        (f"KL to dense{in_torch}", f"{dense.quality.kl:.3f}", f"{pruned.quality.kl:.3f}", ""),
        (f"perplexity{in_torch}", f"{dense.quality.perplexity:.2f}", f"{pruned.quality.perplexity:.2f}", ""),
        ("parameters", _mega(dense.parameters), _mega(pruned.parameters), _ratio(pruned.parameters, dense.parameters)),
        ("FLOPs", _mega(dense.flops), _mega(pruned.flops), _ratio(pruned.flops, dense.flops)),
        _bytes_row("file", dense.artifact.num_bytes, pruned.artifact.num_bytes),
        _bytes_row("peak memory", dense.measurement.peak_memory_bytes, pruned.measurement.peak_memory_bytes),
    ]
    return joined(
        [
            f"{result.model} on {result.target}, {result.backend}, {result.workload.describe()}",
            "",
            *_aligned(rows),
            "",
            _verdict(result),
            *_format_lines(result),
            *_configuration(result),
            *_speedup_line(result),
            *_quality_lines(result),
            *result.all_notes,
        ]
    )


def _of_dense(result: PruneResult, dense: float, pruned: float, speedup: Interval | None) -> str:
    """Format the pruned latency as a share of the dense one, from the speed-up where that is of the same statistic.

    Only a ratio of medians is called paired: it is paired by rounds, that of p90s only by starts.
    """
    if speedup is None or result.statistic != result.budget.statistic:
        return f"{pruned / dense:.1%}"
    return f"{1 / speedup.value:.1%}{' paired' * (result.statistic == 'p50')}"


def _interval_rows(result: PruneResult) -> list[tuple[str, str, str, str]]:
    """Return the row of 95 % intervals; an estimate has none."""
    low, high = result.dense.interval, result.pruned.interval
    if low is None or high is None or result.is_estimate:
        return []
    name = "95 % interval" if result.statistic == result.budget.statistic else "95 % interval of p50"
    return [(name, _ms_interval(low), _ms_interval(high), "")]


def _bytes_row(name: str, dense: int | None, pruned: int | None) -> tuple[str, str, str, str]:
    """Return a row in megabytes. Memory is not known of an estimate, or where the runner does not tell."""
    if not dense or not pruned:
        return (name, "", "", "not known")
    return (name, f"{dense / 1e6:.1f} MB", f"{pruned / 1e6:.1f} MB", _ratio(pruned, dense))


def _speedup_line(result: PruneResult) -> list[str]:
    """Return the line about the speed-up; an estimate claims none."""
    found = result.speedup
    if found is None or result.is_estimate:
        return []
    remark = "" if result.speedup_shown else f"  (not shown: {result.why_not_shown})"
    return [f"speed-up {found.value:.3f}x [{found.low:.3f}, {found.high:.3f}]{remark}"]


def _quality_lines(result: PruneResult) -> list[str]:
    """Say which models KL and perplexity are about, and on which text."""
    quality, in_torch = result.pruned.quality, result.pruned.in_torch
    text = f"on {quality.text} ({quality.tokens} tokens, never seen by the search)"
    before = f"; KL before recovery {result.kl_without_recovery:.3f}" if result.recovery != "none" else ""
    if quality.through == "torch":
        why = f" ({quality.reason})" if quality.reason else ""
        return [f"KL and perplexity of the torch models in floats, not of the artifacts{why}, {text}{before}"]
    return [
        f"KL and perplexity of the artifacts, read through {quality.through}, {text}",
        f"the pruned torch model in floats: KL {in_torch.kl:.3f}, perplexity {in_torch.perplexity:.2f}{before}",
    ]


def _verdict(result: PruneResult) -> str:
    if result.limit_seconds is None or result.predicted_seconds is None:
        counted = "kept" if result.budget_used <= 1 else "MISSED"  # weights are counted, whatever is known of seconds
        estimated = f"; latency {result.verdict}" if result.is_estimate else ""
        return (
            f"pruning {result.budget}: {counted}, {result.budget_used:.1%} of the weights it leaves are used{estimated}"
        )
    return (
        f"budget {result.budget} = {result.limit_seconds * 1e3:.2f} ms: {result.verdict}, "
        f"{percent(result.share)} of it used (predicted {result.predicted_seconds / result.limit_seconds:.1%})"
    )


def _format_lines(result: PruneResult) -> list[str]:
    """Say what the dense model gives in every precision, and whether quantising it would have been enough."""
    if not result.formats:
        return []
    rows = [("the dense model alone", "latency", "KL", "file")]
    for one in result.formats:
        seconds = one.seconds(result.dense, result.budget.statistic)
        rows.append(
            (
                f"  in {one.precision}",
                f"{seconds * 1e3:.2f} ms{one.measurement.mark}",
                f"{one.quality.kl:.3f}",
                f"{one.artifact.num_bytes / 1e6:.1f} MB",
            )
        )
    return ["", *_aligned(rows), _quantising_alone(result), ""]


def _quantising_alone(result: PruneResult) -> str:
    """Say in words whether the dense model in some precision keeps the budget."""
    limit, statistic = result.limit_seconds, result.budget.statistic
    assert limit is not None  # precisions are chosen for latencies only
    timed = [(one.seconds(result.dense, statistic), one) for one in result.formats]
    kept = [one for seconds, one in timed if seconds <= limit]
    if not kept:
        seconds, fastest = min(timed, key=lambda pair: pair[0])
        return (
            f"quantising alone is not enough: the fastest format of the dense model, {fastest.precision}, takes "
            f"{seconds / limit:.0%} of this budget"
        )
    best = min(kept, key=lambda one: one.quality.kl)
    alone = f"the dense model in {best.precision} keeps this budget with KL {best.quality.kl:.3f}"
    if result.pruned.flops == result.dense.flops:  # parameters differ where a tied head is stored in two formats
        return f"quantising alone is enough: {alone}; nothing was pruned"
    return f"quantising alone: {alone}; the result here has {result.pruned.quality.kl:.3f}"


def _configuration(result: PruneResult) -> list[str]:
    """Say how to run the model at the latency that is claimed, and what latency the runtime's defaults give."""
    lines = []
    if (plain := result.plain) is not None:
        dense, pruned = (one.seconds(result.budget.statistic) for one in (plain.dense, plain.pruned))
        of_dense = _of_dense(result, dense, pruned, plain.speedup)
        share = "" if plain.budget_used is None else f", {percent(plain.budget_used)} of such a budget"
        lines.append(
            f"in the runtime's plain defaults ({plain.dense.workload.configuration}): dense {dense * 1e3:.2f} ms"
            f"{plain.dense.mark}, pruned {pruned * 1e3:.2f} ms{plain.pruned.mark}, {of_dense}{share}"
        )
    run = result.pruned.artifact.run
    commands = {} if run is None else run.commands
    measured = "estimated" if result.is_estimate else "measured"
    return [*lines, *(f"as {measured}, {name}: {command}" for name, command in commands.items())]


def _aligned(rows: list[tuple[str, str, str, str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = []
    for name, *cells in rows:
        right = (cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))
        lines.append("  ".join([name.ljust(widths[0]), *right]).rstrip())
    return lines


def _ms(side: Side) -> str:
    return f"{side.seconds * 1e3:.2f} ms{side.measurement.mark}"


def _ms_interval(found: Interval) -> str:
    return f"{found.low * 1e3:.2f}-{found.high * 1e3:.2f}"


def _mega(count: int) -> str:
    return f"{count / 1e6:.1f} M"


def _ratio(pruned: float, dense: float) -> str:
    return f"{pruned / dense:.1%}"


def summary(result: PruneResult) -> dict[str, Any]:
    """Return the main numbers of a result, for programs that compare runs."""
    dense, pruned = result.dense, result.pruned
    return {
        "status": result.status,
        "verdict": result.verdict,
        "budget": str(result.budget),
        "budget_used": result.budget_used,
        "budget_used_low": result.share.low,
        "budget_used_high": result.share.high,
        "limit_seconds": result.limit_seconds,
        "dense_seconds": dense.seconds,
        "pruned_seconds": pruned.seconds,
        "speedup": None if result.speedup is None else result.speedup.value,
        "measurement": {"dense": dense.measurement.words, "pruned": pruned.measurement.words},
        "kl": pruned.quality.kl,
        "perplexity": pruned.quality.perplexity,
        "dense_kl": dense.quality.kl,
        "dense_perplexity": dense.quality.perplexity,
        "precisions": result.precisions,
        "dense_formats": {
            one.precision: {
                "seconds": one.seconds(dense, result.budget.statistic),
                "kl": one.quality.kl,
                "perplexity": one.quality.perplexity,
                "bytes": one.artifact.num_bytes,
            }
            for one in result.formats
        },
        "quality_through": pruned.quality.through,
        "torch_kl": pruned.in_torch.kl,
        "torch_perplexity": pruned.in_torch.perplexity,
        "torch_kl_without_recovery": result.kl_without_recovery,
        "plan_digest": result.plan_digest,
        "notes": list(result.all_notes),
    }

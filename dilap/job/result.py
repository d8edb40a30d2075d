"""The result of a prune job: the document that is kept, and the table that is shown at the end."""

import functools
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Generic

from dilap import __version__, backends
from dilap.core.artifact import Artifact
from dilap.core.codec import decode, read_json
from dilap.core.errors import InvalidInput
from dilap.core.measurement import Interval, Measurement
from dilap.core.printable import joined, milliseconds
from dilap.core.shape import PRECISION_BITS, Architecture
from dilap.core.vocabulary import VocabularyCut
from dilap.core.workload import Budget, Statistic, Workload
from dilap.job.quality import AnyQuality, Quality, in_words, words
from dilap.job.verdict import Verdict, percent
from dilap.job.verdict import words as verdict_in_words
from dilap.profilers.profiler import is_shown


@dataclass(frozen=True, kw_only=True)
class Side(Generic[AnyQuality]):
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
    quality: AnyQuality
    torch_quality: AnyQuality | None = None

    def __post_init__(self) -> None:
        if self.seconds <= 0 or min(self.parameters, self.flops) < 0 or (self.interval and self.interval.low <= 0):
            raise ValueError(f"{self.seconds} seconds, {self.parameters} parameters and {self.flops} FLOPs of a model")

    @property
    def in_torch(self) -> AnyQuality:
        """Quality of the torch model in floats, which is the only one in results of earlier versions."""
        return self.torch_quality or self.quality


@dataclass(frozen=True, kw_only=True)
class DenseFormat(Generic[AnyQuality]):
    """The dense model in one precision, quantised by the runtime's own tools: what is had without pruning.

    `speedup` is against the dense model in the precision that ships; None in an estimate.
    """

    precision: str
    artifact: Artifact
    measurement: Measurement
    speedup: Interval | None
    quality: AnyQuality

    def seconds(self, dense: Side[AnyQuality], statistic: Statistic) -> float:
        """Return its latency, on the scale of the measurement of `dense`, the dense model that ships."""
        if self.speedup is None:
            return self.measurement.seconds(statistic)
        return dense.seconds / self.speedup.value

    def interval(self, dense: Side[AnyQuality]) -> Interval | None:
        """Return its latency on the same scale with the 95 % interval of the speed-up; None in an estimate."""
        if (found := self.speedup) is None:
            return None
        value, low, high = (dense.seconds / one for one in (found.value, found.high, found.low))
        return Interval(value=value, low=low, high=high)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """How both torch models go on after the beginning of a text, always with the likeliest token."""

    prompt: str
    dense: str
    pruned: str


@dataclass(frozen=True, kw_only=True)
class PlainDefaults:
    """Both models measured in the runtime's plain defaults: without any switch, and with the threads asked for."""

    dense: Measurement
    pruned: Measurement
    speedup: Interval
    budget_used: Interval | None


@dataclass(frozen=True, kw_only=True)
class PruneResult(Generic[AnyQuality]):
    """Everything that a run claims, with what the claims rest on.

    `kl_without_recovery` and `perplexity_without_recovery` are of the pruned torch model before recovery. An estimate
    has no intervals and no speed-up. Of an image network, the sequences of the calibration are photographs; it has no
    layout and no perplexity. Neither has an encoder of texts, whose sequences are sentences, and whose `kl`s here are
    cosine distances: 1 less the mean cosine similarity of its embeddings to the dense ones.
    """

    status: Verdict
    budget_used: float
    target: str
    backend: str
    model: str
    model_digest: str
    method: str
    budget: Budget
    workload: Workload
    limit_seconds: float | None
    floor_seconds: float | None
    fastest_seconds: float | None
    predicted_seconds: float | None
    dense: Side[AnyQuality]
    pruned: Side[AnyQuality]
    speedup: Interval | None
    speedup_shown: bool
    plan_digest: str
    validation_kl: float
    kl_without_recovery: float
    recovery: str
    calibration: str
    calibration_sha256: str
    calibration_sequences: int
    options: dict[str, Any]
    stage_seconds: dict[str, float]
    versions: dict[str, str]
    seed: int
    notes: tuple[str, ...] = ()
    layout: str = ""  # of a decoder
    calibration_sequence_length: int | None = None  # tokens; None for photographs and sentences
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
    formats: tuple[DenseFormat[AnyQuality], ...] = ()  # the dense model in all precisions, where those were chosen
    precisions: dict[str, str] = field(default_factory=dict)  # of the pruned model's parts, beside the artifact's own
    answers: tuple[Answer, ...] = ()
    kl_cut: float | None = None  # of the plan's units with the dense model's values, in torch; None where not asked for
    kl_refit: float | None = None  # of the same units with projections refitted in closed form
    ffn_multiple: int = 1  # of which all FFN widths are whole multiples, as the runtime or the layout needs

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
        return verdict_in_words(self.status, self.share)

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
    def is_of_network(self) -> bool:
        """Whether it is about an image network or an encoder of texts, and not about a decoder."""
        return self.dense.artifact.input is not None

    @property
    def is_only_quantised(self) -> bool:
        """Whether the result is the dense model in other precisions: nothing of its layers was removed."""
        if self.is_of_network:
            return bool(self.formats) and self.pruned.flops == self.dense.flops
        return self.dense.artifact.decoder.layers == self.pruned.artifact.decoder.layers

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


def read_result(path: Path) -> PruneResult[Any]:
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


def measured_rows(result: PruneResult[Any]) -> list[tuple[str, str, str, str]]:
    """Return the rows of the table of both models, the headings first."""
    dense, pruned = result.dense, result.pruned
    speedup = None if result.is_estimate else result.speedup
    return [
        ("", "dense", "pruned", "pruned / dense"),
        (
            f"{'ESTIMATED ' * result.is_estimate}latency {result.budget.statistic}",
            _ms(dense),
            _ms(pruned),
            _of_dense(result, dense.seconds, pruned.seconds, speedup),
        ),
        *_interval_rows(result),
        _rate_row(result),
        *_quality_rows(result),
        ("parameters", _mega(dense.parameters), _mega(pruned.parameters), _ratio(pruned.parameters, dense.parameters)),
        ("FLOPs", _mega(dense.flops), _mega(pruned.flops), _ratio(pruned.flops, dense.flops)),
        _bytes_row("file", dense.artifact.num_bytes, pruned.artifact.num_bytes),
        _bytes_row("peak memory", dense.measurement.peak_memory_bytes, pruned.measurement.peak_memory_bytes),
    ]


def table(result: PruneResult[Any]) -> str:
    """Return a table of both models, the verdict, and the notes."""
    return joined(
        [
            f"{result.model} on {result.target}, {result.backend}, {result.workload.describe()}",
            "",
            *_aligned(measured_rows(result)),
            "",
            _verdict(result),
            *_format_lines(result),
            *_configuration(result),
            *_speedup_line(result),
            *_quality_lines(result),
            *result.all_notes,
        ]
    )


def _of_dense(result: PruneResult[Any], dense: float, pruned: float, speedup: Interval | None) -> str:
    """Format the pruned latency as a share of the dense one, from the speed-up where that is of the same statistic.

    Only a ratio of medians is called paired: it is paired by rounds, that of p90s only by starts.
    """
    if speedup is None or result.statistic != result.budget.statistic:
        return f"{pruned / dense:.1%}"
    return f"{1 / speedup.value:.1%}{' paired' * (result.statistic == 'p50')}"


def _interval_rows(result: PruneResult[Any]) -> list[tuple[str, str, str, str]]:
    """Return the row of 95 % intervals, or of the ranges of an estimate."""
    if result.is_estimate:
        dense, pruned = (_range(side.measurement.range_ns) for side in (result.dense, result.pruned))
        return [("range", dense, pruned, "")] if dense else []
    low, high = result.dense.interval, result.pruned.interval
    if low is None or high is None:
        return []
    name = "95 % interval" if result.statistic == result.budget.statistic else "95 % interval of p50"
    return [(name, _ms_interval(low), _ms_interval(high), "")]


def _range(found: tuple[int, int] | None) -> str:
    return "-".join(milliseconds(one / 1e9) for one in found or ())


def _rate_row(result: PruneResult[Any]) -> tuple[str, str, str, str]:
    """Return the row of what a second brings: tokens of a decoder, images or texts."""
    dense, pruned = (result.workload.per_second(side.seconds) for side in (result.dense, result.pruned))
    unit = result.pruned.quality.EXAMPLE if result.is_of_network else "token"
    return (f"{unit}s a second", _rate(dense), _rate(pruned), _ratio(pruned, dense))


def _rate(per_second: float) -> str:
    return f"{per_second:,.0f}" if per_second >= 100 else f"{per_second:.3g}"


def _quality_rows(result: PruneResult[Any]) -> list[tuple[str, str, str, str]]:
    dense, pruned = result.dense.quality.shown, result.pruned.quality.shown
    in_torch = " (torch)" if result.pruned.quality.through == "torch" else ""
    names = {name: "KL to dense" if name == "KL" else name for name in pruned}
    return [(f"{title}{in_torch}", dense[name], pruned[name], "") for name, title in names.items()]


def _bytes_row(name: str, dense: int | None, pruned: int | None) -> tuple[str, str, str, str]:
    """Return a row in megabytes; an empty one where memory is not known, as of an estimate."""
    if not dense or not pruned:
        return (name, "", "", "")
    return (name, f"{dense / 1e6:.1f} MB", f"{pruned / 1e6:.1f} MB", _ratio(pruned, dense))


def _speedup_line(result: PruneResult[Any]) -> list[str]:
    """Return the line about the speed-up; an estimate claims none."""
    found = result.speedup
    if found is None or result.is_estimate:
        return []
    remark = "" if result.speedup_shown else f"  (not shown: {result.why_not_shown})"
    return [f"speed-up {found.value:.3f}x [{found.low:.3f}, {found.high:.3f}]{remark}"]


def _quality_lines(result: PruneResult[Any]) -> list[str]:
    """Say which models the numbers of quality are about, and on what they were found."""
    quality, in_torch = result.pruned.quality, result.pruned.in_torch
    on = f"on {quality.read}"
    before = (
        f"; {quality.DISTANCE} before recovery {result.kl_without_recovery:.3f}" if result.recovery != "none" else ""
    )
    if quality.through == "torch":
        why = f" ({quality.reason})" if quality.reason else ""
        return [f"{words(quality.shown)} of the torch models in floats, not of the artifacts{why}, {on}{before}"]
    return [
        f"{words(quality.shown)} of the artifacts, read through {quality.through}, {on}",
        f"the pruned torch model in floats: {in_words(in_torch.shown)}{before}",
    ]


def _verdict(result: PruneResult[Any]) -> str:
    if result.limit_seconds is None or result.predicted_seconds is None:
        counted = "kept" if result.budget_used <= 1 else "MISSED"  # weights are counted, whatever is known of seconds
        estimated = f"; latency {result.verdict}" if result.is_estimate else ""
        return (
            f"pruning {result.budget}: {counted}, {result.budget_used:.1%} of the weights it leaves are used{estimated}"
        )
    return (
        f"budget {result.budget} = {milliseconds(result.limit_seconds)} ms: {result.verdict}, "
        f"{percent(result.share)} of it used (predicted {result.predicted_seconds / result.limit_seconds:.1%})"
    )


def _format_lines(result: PruneResult[Any]) -> list[str]:
    """Say what the dense model gives in every precision, and whether quantising it would have been enough."""
    if not result.formats:
        return []
    more = ["perplexity"] if isinstance(result.dense.quality, Quality) else []
    rows = [("the dense model alone", "latency", "95 % interval", result.dense.quality.DISTANCE, *more, "file")]
    for one in result.formats:
        seconds, found = one.seconds(result.dense, result.budget.statistic), one.interval(result.dense)
        rows.append(
            (
                f"  in {one.precision}",
                f"{milliseconds(seconds)} ms{one.measurement.mark}",
                "" if found is None else _ms_interval(found),
                f"{one.quality.distance:.3f}",
                *([f"{one.quality.perplexity:.2f}"] if isinstance(one.quality, Quality) else []),
                f"{one.artifact.num_bytes / 1e6:.1f} MB",
            )
        )
    return ["", *_aligned(rows), quantising_alone(result), ""]


def quantising_alone(result: PruneResult[Any]) -> str:
    """Say in words whether the dense model in some precision keeps the budget."""
    limit, statistic, measure = result.limit_seconds, result.budget.statistic, result.dense.quality.DISTANCE
    assert limit is not None  # precisions are chosen for latencies only
    timed = [(one.seconds(result.dense, statistic), one) for one in result.formats]
    kept = [one for seconds, one in timed if seconds <= limit]
    if not kept:
        seconds, fastest = min(timed, key=lambda pair: pair[0])
        return (
            f"quantising alone is not enough: the fastest format of the dense model, {fastest.precision}, takes "
            f"{seconds / limit:.0%} of this budget"
        )
    best = min(kept, key=lambda one: one.quality.distance)
    alone = f"the dense model in {best.precision} keeps this budget with {measure} {best.quality.distance:.3f}"
    if result.is_only_quantised:
        return f"quantising alone is enough: {alone}; nothing was pruned"
    return f"quantising alone: {alone}; the result here has {result.pruned.quality.distance:.3f}"


def _configuration(result: PruneResult[Any]) -> list[str]:
    """Say how to run the model at the latency that is claimed, and what latency the runtime's defaults give."""
    lines = []
    if (plain := result.plain) is not None:
        dense, pruned = (one.seconds(result.budget.statistic) for one in (plain.dense, plain.pruned))
        of_dense = _of_dense(result, dense, pruned, plain.speedup)
        share = "" if plain.budget_used is None else f", {percent(plain.budget_used)} of such a budget"
        lines.append(
            f"in the runtime's plain defaults ({plain.dense.workload.configuration}): dense {milliseconds(dense)} ms"
            f"{plain.dense.mark}, pruned {milliseconds(pruned)} ms{plain.pruned.mark}, {of_dense}{share}"
        )
    run = result.pruned.artifact.run
    commands = {} if run is None else run.commands
    measured = "estimated" if result.is_estimate else "measured"
    return [*lines, *(f"as {measured}, {name}: {command}" for name, command in commands.items())]


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for name, *cells in rows:
        right = (cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))
        lines.append("  ".join([name.ljust(widths[0]), *right]).rstrip())
    return lines


def _ms(side: Side[Any]) -> str:
    return f"{milliseconds(side.seconds)} ms{side.measurement.mark}"


def _ms_interval(found: Interval) -> str:
    return f"{milliseconds(found.low)}-{milliseconds(found.high)}"


def _mega(count: int) -> str:
    return f"{count / 1e6:.1f} M"


def _ratio(pruned: float, dense: float) -> str:
    return f"{pruned / dense:.1%}"


def summary(result: PruneResult[Any]) -> dict[str, Any]:
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
        **pruned.quality.numbers,
        **{f"dense_{name}": value for name, value in dense.quality.numbers.items()},
        "precisions": result.precisions,
        "dense_formats": {
            one.precision: {
                "seconds": one.seconds(dense, result.budget.statistic),
                "seconds_low": None if (found := one.interval(dense)) is None else found.low,
                "seconds_high": None if found is None else found.high,
                **one.quality.numbers,
                "bytes": one.artifact.num_bytes,
            }
            for one in result.formats
        },
        "quality_through": pruned.quality.through,
        **{f"torch_{name}": value for name, value in pruned.in_torch.numbers.items()},
        f"torch_{pruned.quality.DISTANCE.lower().replace(' ', '_')}_without_recovery": result.kl_without_recovery,
        "plan_digest": result.plan_digest,
        "notes": list(result.all_notes),
    }

"""The result of a prune job, as a document and as the table that ends it."""

import platform
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from dilap import __version__
from dilap.codec import decode, read_json
from dilap.errors import InvalidInput
from dilap.types import Architecture, Artifact, Budget, Interval, Measurement, Workload


@dataclass(frozen=True, kw_only=True)
class Quality:
    """On text that no search saw. KL is to the dense torch model, in nats a token.

    `through` is what read the text: the artifact's runtime, or `torch`, which scores the model in floats, as all
    results of earlier versions do. `reason` says why torch's numbers stand where the artifact's should.
    """

    text: str
    text_sha256: str
    tokens: int
    kl: float
    perplexity: float
    through: str = "torch"
    reason: str = ""
    artifact_sha256: str = ""


@dataclass(frozen=True, kw_only=True)
class Side:
    """One of the two models: what it is, what it costs and how good it is. `quality` is the artifact's own, where its
    runtime can read it here; `torch_quality` that of the torch model that it was exported from."""

    artifact: Artifact
    measurement: Measurement
    seconds: float
    interval: Interval
    parameters: int
    flops: int
    quality: Quality
    torch_quality: Quality | None = None

    @property
    def in_torch(self) -> Quality:
        """The only one that results of earlier versions have."""
        return self.torch_quality or self.quality


@dataclass(frozen=True, kw_only=True)
class PlainDefaults:
    """Both models as the runtime runs them by default: what a user gets who sets no switch and no number of threads."""

    dense: Measurement
    pruned: Measurement
    speedup: Interval
    budget_used: float | None


@dataclass(frozen=True, kw_only=True)
class PruneResult:
    """Everything that a run claims, with what it rests on. What is `*_without_recovery` is of the torch model."""

    status: Literal["kept", "missed", "estimated"]
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
    speedup: Interval
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
    # What the first runs of this version do not have; they are read all the same.
    perplexity_without_recovery: float | None = None
    recovery_kls: tuple[float, ...] = ()
    pruning_seconds: float | None = None
    pruning_peak_memory_bytes: int | None = None
    method_facts: dict[str, Any] = field(default_factory=dict)
    plain: PlainDefaults | None = None  # where the configuration measured is another


def flops_of(architecture: Architecture, workload: Workload) -> int:
    """Of one workload: a decoded token, or a prompt."""
    if workload.phase == "decode":
        return architecture.decode_flops(context=workload.context)
    return architecture.prefill_flops(prompt_tokens=workload.prompt_tokens)


def read_result(path: Path) -> PruneResult:
    """Of the folder of a run. Raises InvalidInput, with what to do, for a run that measured no latency."""
    result = path / "result.json"
    document = read_json(result)
    if document.get("type") == "SparseResult":
        raise InvalidInput(
            f"{path} has zeros inside matrices (--pattern): no latency was measured, so there is nothing to report; "
            f"score it with dilap-eval {path}, and report the evaluation"
        )
    return decode(PruneResult, document, source=str(result))


def versions() -> dict[str, str]:
    """Of everything that a result depends on and that is installed."""
    wanted = {"torch", "transformers", "tokenizers", "numpy", "scipy", "peft", "gguf", "llama-cpp-python"}
    wanted |= {"onnx", "onnx-ir", "onnxruntime", "executorch"}
    found = {one.name.lower().replace("_", "-"): one.version for one in metadata.distributions() if one.name}
    return {"dilap": __version__, "python": platform.python_version()} | {
        name: found[name] for name in sorted(wanted & set(found))
    }


def table(result: PruneResult) -> str:
    """The proof in a dozen lines."""
    dense, pruned = result.dense, result.pruned
    is_estimate = result.status == "estimated"
    in_torch = " (torch)" if pruned.quality.through == "torch" else ""
    rows: list[tuple[str, str, str, str]] = [
        ("", "dense", "pruned", "pruned / dense"),
        (
            f"{'ESTIMATED ' * is_estimate}latency {result.budget.statistic}",
            _ms(dense),
            _ms(pruned),
            f"{1 / result.speedup.value:.1%} paired",
        ),
        ("95 % interval", _ms_interval(dense), _ms_interval(pruned), ""),
        (f"KL to dense{in_torch}", f"{dense.quality.kl:.3f}", f"{pruned.quality.kl:.3f}", ""),
        (f"perplexity{in_torch}", f"{dense.quality.perplexity:.2f}", f"{pruned.quality.perplexity:.2f}", ""),
        ("parameters", _mega(dense.parameters), _mega(pruned.parameters), _ratio(pruned.parameters, dense.parameters)),
        ("FLOPs", _mega(dense.flops), _mega(pruned.flops), _ratio(pruned.flops, dense.flops)),
        (
            "file",
            f"{dense.artifact.num_bytes / 1e6:.1f} MB",
            f"{pruned.artifact.num_bytes / 1e6:.1f} MB",
            _ratio(pruned.artifact.num_bytes, dense.artifact.num_bytes),
        ),
        (
            "peak memory",
            f"{dense.measurement.peak_memory_bytes / 1e6:.1f} MB",
            f"{pruned.measurement.peak_memory_bytes / 1e6:.1f} MB",
            _ratio(pruned.measurement.peak_memory_bytes, dense.measurement.peak_memory_bytes),
        ),
    ]
    shown = "" if result.speedup_shown else "  (not shown: the interval includes 1)"
    if is_estimate:
        shown = "  (ESTIMATED)"
    return "\n".join(
        [
            f"{result.model} on {result.target}, {result.backend}, {result.workload.describe()}",
            "",
            *_aligned(rows),
            "",
            _verdict(result),
            *_configuration(result),
            f"speed-up {result.speedup.value:.3f}x [{result.speedup.low:.3f}, {result.speedup.high:.3f}]{shown}",
            *_quality_lines(result),
            *result.notes,
        ]
    )


def _quality_lines(result: PruneResult) -> list[str]:
    """What KL and perplexity are of."""
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
    verdict = {"kept": "kept", "missed": "MISSED", "estimated": "ESTIMATED, measured on no device"}[result.status]
    if result.limit_seconds is None or result.predicted_seconds is None:
        return f"pruning {result.budget}: {verdict}, {result.budget_used:.1%} of the weights it leaves are used"
    return (
        f"budget {result.budget} = {result.limit_seconds * 1e3:.2f} ms: {verdict}, "
        f"{result.budget_used:.1%} of it used (predicted {result.predicted_seconds / result.limit_seconds:.1%})"
    )


def _configuration(result: PruneResult) -> list[str]:
    """How to get the latency that is claimed, and what there is without it."""
    lines = []
    if (plain := result.plain) is not None:
        dense, pruned = (one.seconds(result.budget.statistic) * 1e3 for one in (plain.dense, plain.pruned))
        share = "" if plain.budget_used is None else f", {plain.budget_used:.1%} of such a budget"
        lines.append(
            f"in the runtime's plain defaults ({plain.dense.workload.configuration}): dense {dense:.2f} ms, pruned "
            f"{pruned:.2f} ms, {1 / plain.speedup.value:.1%} paired{share}"
        )
    run = result.pruned.artifact.run
    commands = {} if run is None else run.commands
    return [*lines, *(f"as measured, {name}: {command}" for name, command in commands.items())]


def _aligned(rows: list[tuple[str, str, str, str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = []
    for name, *cells in rows:
        right = (cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))
        lines.append("  ".join([name.ljust(widths[0]), *right]).rstrip())
    return lines


def _ms(side: Side) -> str:
    return f"{side.seconds * 1e3:.2f} ms"


def _ms_interval(side: Side) -> str:
    return f"{side.interval.low * 1e3:.2f}-{side.interval.high * 1e3:.2f}"


def _mega(count: int) -> str:
    return f"{count / 1e6:.1f} M"


def _ratio(pruned: float, dense: float) -> str:
    return f"{pruned / dense:.1%}" if dense else "not known"  # memory, where a runner does not tell


def summary(result: PruneResult) -> dict[str, Any]:
    """The few numbers that a script compares."""
    dense, pruned = result.dense, result.pruned
    return {
        "status": result.status,
        "budget": str(result.budget),
        "budget_used": result.budget_used,
        "limit_seconds": result.limit_seconds,
        "dense_seconds": dense.seconds,
        "pruned_seconds": pruned.seconds,
        "speedup": result.speedup.value,
        "kl": pruned.quality.kl,
        "perplexity": pruned.quality.perplexity,
        "dense_kl": dense.quality.kl,
        "dense_perplexity": dense.quality.perplexity,
        "quality_through": pruned.quality.through,
        "torch_kl": pruned.in_torch.kl,
        "torch_perplexity": pruned.in_torch.perplexity,
        "torch_kl_without_recovery": result.kl_without_recovery,
        "plan_digest": result.plan_digest,
    }

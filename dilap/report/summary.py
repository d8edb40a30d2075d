"""The summary of a report: the numbers of every model in one row, for the tables of all formats."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from dilap import backends
from dilap.core.workload import Workload
from dilap.evaluation.document import Evaluation
from dilap.job.result import DenseFormat, PruneResult, Side
from dilap.report.inputs import Contents, Run


@dataclass(frozen=True, kw_only=True)
class SummaryRow:
    """The numbers of one model. `of_dense` is its share of the dense model's latency; memory and files are in bytes.

    `seconds` is the budget's `statistic` of the latency, with its 95 % interval. (Results of earlier versions have only
    that of the median, which is left out beside a p90.) `verdict` is the status in words. `measurement` says what a
    reader of the latency must know: whether it is noisy, contended, forced or only estimated. An estimate has no
    intervals and no memory.

    `kl` and `perplexity` are of the artifact, read through `quality_through`. Where that says `torch`, they are of the
    torch model in floats, as `torch_*` are. An image network has no perplexity and no tokens, but `agreement` with the
    dense one, `top1` and `top5` (as shares of the photographs; None without labels), and FLOPs an image. An encoder of
    texts has the numbers of `dilap.evaluation.document.SentenceQuality` instead, and FLOPs a text.
    """

    run: str
    method: str
    budget: str
    status: str
    statistic: str
    seconds: float
    seconds_low: float | None
    seconds_high: float | None
    of_dense: float
    of_dense_low: float | None
    of_dense_high: float | None
    verdict: str
    budget_used: float | None
    budget_used_low: float | None
    budget_used_high: float | None
    kl: float | None = None
    perplexity: float | None = None
    agreement: float | None = None
    top1: float | None = None
    top5: float | None = None
    cosine: float | None = None
    low_cosine: float | None = None
    same_nearest: float | None = None
    quality_through: str
    torch_kl: float | None = None
    torch_perplexity: float | None = None
    torch_cosine: float | None = None
    mean_accuracy: float | None
    parameters: int
    decode_flops: int | None = None
    decode_bytes: int | None = None
    prefill_flops: int | None = None
    prefill_bytes: int | None = None
    image_flops: int | None = None
    images_per_second: float | None = None
    text_flops: int | None = None
    texts_per_second: float | None = None
    file_bytes: int
    peak_memory_bytes: int | None
    measurement: str
    notes: str

    @property
    def is_of_images(self) -> bool:
        return self.image_flops is not None

    @property
    def is_of_sentences(self) -> bool:
        return self.text_flops is not None

    @property
    def is_estimate(self) -> bool:
        return self.measurement == "estimated"


def rows(contents: Contents) -> list[SummaryRow]:
    """Return a row for the dense model, as it was measured beside the first run, and one for each run.

    Where that run chose precisions, the dense model has a row for each of them.

    The shares in a run's row are of the dense model that was measured beside that run.
    """
    scored = {one.digest: one for one in contents.evaluations}
    dense = [
        _row(run, run.result.dense, scored.get(run.result.dense.artifact.sha256), is_dense=True)
        for run in contents.runs[:1]
    ]
    formats = [_format_row(run, one) for run in contents.runs[:1] for one in run.result.formats]
    return dense + formats + [_row(run, run.result.pruned, run.evaluation, is_dense=False) for run in contents.runs]


def mean_accuracy(evaluation: Evaluation | None) -> float | None:
    """Return the mean over the tasks that have an accuracy, or None; it compares only models with the same tasks."""
    if evaluation is None:
        return None
    found = [metrics["acc"] for metrics in evaluation.tasks.values() if "acc" in metrics]
    return sum(found) / len(found) if found else None


def _row(run: Run, side: Side[Any], evaluation: Evaluation | None, *, is_dense: bool) -> SummaryRow:
    result = run.result
    measurement = side.measurement
    share = (1.0, 1.0, 1.0) if is_dense else _share(result)
    is_known = measurement.status != "estimated" and result.statistic == result.budget.statistic
    interval = side.interval if is_known else None
    return SummaryRow(
        run="dense" if is_dense else run.name,
        method="none" if is_dense else result.method,
        budget="" if is_dense else str(result.budget),
        status="" if is_dense else result.status,
        statistic=result.budget.statistic,
        seconds=side.seconds,
        seconds_low=None if interval is None else interval.low,
        seconds_high=None if interval is None else interval.high,
        of_dense=share[0],
        of_dense_low=share[1],
        of_dense_high=share[2],
        verdict="" if is_dense else result.verdict,
        budget_used=None if is_dense else result.budget_used,
        budget_used_low=None if is_dense else result.share.low,
        budget_used_high=None if is_dense else result.share.high,
        **side.quality.numbers,
        quality_through=side.quality.through,
        mean_accuracy=mean_accuracy(evaluation),
        parameters=side.parameters,
        **(_of_network(result.workload, side) if result.is_of_network else _of_decoder(result, side)),
        file_bytes=side.artifact.num_bytes,
        peak_memory_bytes=measurement.peak_memory_bytes or None,
        measurement=measurement.words,
        notes="; ".join(measurement.caveats),
    )


def _of_decoder(result: PruneResult, side: Side) -> dict[str, Any]:
    """Return the numbers that only a decoder has."""
    architecture, workload, precision = side.artifact.decoder, result.workload, side.artifact.precision
    read: dict[str, Any] = {"precision": precision, "precisions": side.artifact.precisions}
    read["cache_bits"] = backends.get(result.backend).cache_bits(workload)
    context, prompt = workload.context, workload.prompt_tokens
    return {
        "torch_kl": side.in_torch.kl,
        "torch_perplexity": side.in_torch.perplexity,
        "decode_flops": architecture.decode_flops(context=context),
        "decode_bytes": architecture.decode_bytes(context=context, **read),
        "prefill_flops": architecture.prefill_flops(prompt_tokens=prompt),
        "prefill_bytes": architecture.prefill_bytes(prompt_tokens=prompt, **read),
    }


def _of_network(workload: Workload, side: Side[Any]) -> dict[str, Any]:
    """Return the numbers that only an image network or an encoder of texts has."""
    measure = "cosine" if side.quality.EXAMPLE == "text" else "kl"
    return {
        f"torch_{measure}": side.in_torch.numbers[measure],
        f"{side.quality.EXAMPLE}_flops": side.flops // workload.batch,
        f"{side.quality.EXAMPLE}s_per_second": workload.per_second(side.seconds),
    }


def _format_row(run: Run, one: DenseFormat[Any]) -> SummaryRow:
    """Return the row of the dense model in one precision, on the scale of the dense model that ships."""
    result = run.result
    side = replace(
        result.dense,
        artifact=one.artifact,
        measurement=one.measurement,
        seconds=one.seconds(result.dense, result.budget.statistic),
        interval=one.interval(result.dense),
        quality=one.quality,
        torch_quality=result.dense.in_torch,
    )
    row = replace(_row(run, side, None, is_dense=True), run=f"dense in {one.precision}")
    if (found := one.speedup) is None:
        return replace(row, of_dense=side.seconds / result.dense.seconds)
    return replace(row, of_dense=1 / found.value, of_dense_low=1 / found.high, of_dense_high=1 / found.low)


def _share(result: PruneResult[Any]) -> tuple[float, float | None, float | None]:
    found = None if result.is_estimate or result.statistic != result.budget.statistic else result.speedup
    if found is None:
        return result.share_of_dense, None, None
    return result.share_of_dense, 1 / found.high, 1 / found.low


def documents(found: Sequence[SummaryRow]) -> list[dict[str, Any]]:
    return [asdict(row) for row in found]

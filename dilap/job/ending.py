"""What a prune job ends with: one sentence that says what came of it, the table, and a few answers to read."""

from typing import Any

from dilap.core.printable import joined, milliseconds
from dilap.job import meaning
from dilap.job.outputs import name_of
from dilap.job.quality import Quality, in_words
from dilap.job.result import DenseFormat, PruneResult, quantising_alone, table

_SHOWN = 90  # characters of an answer


def text(result: PruneResult[Any]) -> str:
    """Return the text that a job ends with."""
    return "\n".join([joined([verdict_sentence(result), ""]), table(result), *answer_lines(result)])


def verdict_sentence(result: PruneResult[Any]) -> str:
    """Say whether the budget is kept and in which configuration, and how good the model is beside others."""
    return f"{_of_budget(result)}. {_of_quality(result)}."


def _of_budget(result: PruneResult[Any]) -> str:
    name, budget = name_of(result.model), result.budget
    if budget.ratio is not None:
        return f"{name}, pruned, lacks {budget.ratio:.0%} of the weights of its layers"
    keeps = {"kept": "keeps", "missed": "MISSES"}.get(result.status, "may or may not keep")
    if result.is_estimate:
        keeps = f"{'would keep' if result.budget_used <= 1 else 'would miss'}, by an estimate that no device has seen,"
    work = {"decode": "a token", "prefill": "a prompt", "forward": "a run"}[result.workload.phase]
    dense, pruned = milliseconds(result.dense.seconds), milliseconds(result.pruned.seconds)
    changed = "quantised and not pruned" if result.is_only_quantised else "pruned"
    if result.is_of_network and result.formats:
        changed += f", in {result.pruned.artifact.precision}"
    return (
        f"{name}, {changed}, {keeps} the budget of {budget} on {result.target}: {pruned} ms{_range(result)} {work} "
        f"instead of {dense}, in {result.backend} with {result.workload.configuration}"
    )


def _range(result: PruneResult[Any]) -> str:
    """Say between which times an estimate lies; results of earlier versions have one time alone, the best."""
    if not result.is_estimate:
        return ""
    if (found := result.pruned.measurement.range_ns) is None:
        return " at best"
    low, high = (milliseconds(one / 1e9) for one in found)
    return f" ({low} to {high})"


def _of_quality(result: PruneResult[Any]) -> str:
    """Say what the KL means, and which plain format of the dense model comes nearest in latency."""
    quality = result.pruned.quality
    if isinstance(quality, Quality):
        said = f"Its KL to the dense model is {quality.kl:.3f} a token: {meaning.of_kl(quality.kl)}"
    else:
        said = f"Beside the dense model, on {quality.read}: {in_words(quality.shown)}"
    if result.is_only_quantised:
        return f"{said}; {quantising_alone(result)}" if result.formats else said
    nearest = _nearest_format(result)
    if nearest is None:
        return said
    seconds = nearest.seconds(result.dense, result.budget.statistic)
    return (
        f"{said}; unpruned, the nearest format is {nearest.precision} with {milliseconds(seconds)} ms and a "
        f"{quality.DISTANCE} of {nearest.quality.distance:.3f}"
    )


def _nearest_format(result: PruneResult[Any]) -> DenseFormat[Any] | None:
    statistic = result.budget.statistic
    return min(
        result.formats,
        key=lambda one: abs(one.seconds(result.dense, statistic) - result.pruned.seconds),
        default=None,
    )


def answer_lines(result: PruneResult[Any]) -> list[str]:
    """Return the answers of both models, each on a line."""
    if not result.answers:
        return []
    lines = ["", "how both torch models go on after unseen text, always with the likeliest token:"]
    for one in result.answers:
        said = (("after", one.prompt), ("dense", one.dense), ("pruned", one.pruned))
        lines += [f"  {name:7}{_short(words, from_the_end=name == 'after')}" for name, words in said]
    return joined(lines).split("\n")


def _short(words: str, *, from_the_end: bool) -> str:
    line = " ".join(words.split())
    if len(line) <= _SHOWN:
        return line
    return f"... {line[-_SHOWN:]}" if from_the_end else f"{line[:_SHOWN]} ..."

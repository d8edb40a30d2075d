"""The model card of what a job or an export wrote: README.md, so that the folder can be published as it is."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from dilap import __version__, backends
from dilap.core.artifact import Artifact
from dilap.core.codec import decode, read_json, written_aside
from dilap.core.graph import Network
from dilap.core.network_input import TokenInput
from dilap.core.plan import Plan
from dilap.core.printable import markdown, printable
from dilap.core.workload import Workload
from dilap.job import loading, meaning
from dilap.job.command import command_line
from dilap.job.ending import verdict_sentence
from dilap.job.outputs import name_of
from dilap.job.result import PruneResult, measured_rows
from dilap.models.convolutional.load import NetworkSource
from dilap.models.convolutional.narrowing import RECORD
from dilap.models.origin import Origin

_LIBRARIES: Mapping[str, str] = {
    "llamacpp": "llama.cpp",
    "onnxruntime": "onnxruntime-genai",
    "executorch": "executorch",
    "tensorrt": "tensorrt",
}
_PUBLIC_TEXT = "python-docs"
_GENERATION = "text-generation"
_IN_TORCH = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("."{code})
words = AutoTokenizer.from_pretrained(".")"""
_OF_NETWORKS: Mapping[str, str] = {**_LIBRARIES, "onnxruntime": "onnxruntime"}


@dataclass(frozen=True, kw_only=True)
class _Subject:
    """What cards say of one kind of model: the hub's name of its task, what it is in facts, what it was scored on."""

    task: str
    facts: tuple[str, ...]
    scored_on: str = "one text"


def write_cards(run: Path, result: PruneResult, origin: Origin) -> None:
    """Write the cards of the checkpoint and of the artifact in the folder of a decoder's run."""
    subject = _Subject(task=_GENERATION, facts=(_widths(result.pruned.artifact),))
    needs_code = (run / "checkpoint" / "modeling_dilap.py").is_file()
    code = _IN_TORCH.format(code=", trust_remote_code=True" if needs_code else "")
    why = ["Its layers have widths of their own, which `modeling_dilap.py` beside it builds."] if needs_code else []
    _write(run / "checkpoint", [*why, _code(code, "python")], result, origin, subject, library="transformers")
    library = _LIBRARIES[result.backend]
    _write(run / "artifact", _as_measured(result), result, origin, subject, library=library)


def write_network_cards(run: Path, result: PruneResult[Any], source: NetworkSource) -> None:
    """Write the cards of the checkpoint and of the artifact in the folder of the run of another network.

    The network in `source` is the pruned one.
    """
    checkpoint, artifact = run / "checkpoint", result.pruned.artifact
    plan: Plan[Network] = decode(Plan, read_json(run / "plan.json"), source=str(run / "plan.json"))
    subject = _Subject(
        task=_task(artifact),
        facts=(_kept(plan), *_input(artifact)),
        scored_on="one set of sentences" if isinstance(artifact.input, TokenInput) else "one set of photographs",
    )
    library = "pytorch" if (checkpoint / RECORD).is_file() else "transformers"
    code = [_code(loading.of_checkpoint(checkpoint, source), "python")]
    _write(checkpoint, code, result, source.origin, subject, library=library)
    lines = [*_stock_code(artifact), *_as_measured(result)]
    _write(run / "artifact", lines, result, source.origin, subject, library=_OF_NETWORKS[result.backend])


def _as_measured(result: PruneResult[Any]) -> list[str]:
    commands = backends.get(result.backend).how_to_run(result.pruned.artifact.path, result.workload)
    return ["As it was measured:", *(f"{name}:\n\n{_code(text)}" for name, text in commands.items())]


def _stock_code(artifact: Artifact) -> list[str]:
    code = loading.of_artifact(artifact)
    return [_code(code, "python")] if code else []


def write_export_card(folder: Path, artifact: Artifact, origin: Origin, *, command: Sequence[str]) -> None:
    """Write the card of an exported model: what it is and how it is loaded. Nothing was measured of it."""
    runtime, name = backends.get(artifact.backend), origin.name or "a model without a name"
    if artifact.input is None:
        task, shape, library = _GENERATION, [_widths(artifact)], _LIBRARIES[artifact.backend]
        workload = Workload(precision=artifact.precision)
    else:
        task, shape, library = _task(artifact), _input(artifact), _OF_NETWORKS[artifact.backend]
        workload = Workload(phase="forward", batch=artifact.input.batch, precision=artifact.precision)
    commands = runtime.how_to_run(artifact.path, workload)
    facts = [
        f"command: `{_in_public(command)}`",
        f"dilap_version: {__version__}",
        _formats(artifact.precision, others=len(artifact.precisions)),
        *shape,
    ]
    if artifact.sqnr_db is not None:
        facts.append(f"outputs beside torch's: {artifact.sqnr_db:.1f} dB, {meaning.of_sqnr(artifact.sqnr_db)}")
    if artifact.plan_digest:
        facts.append(f"plan: {artifact.plan_digest}")
    parts = [
        f"# {markdown(name)} for {artifact.backend}, {artifact.precision}",
        f"Written by DiLAP from {markdown(name)}. {_terms(origin)}",
        "## How to load it",
        *_stock_code(artifact),
        "Threads and switches are yours to choose:",
        *(f"{title}:\n\n{_code(text)}" for title, text in commands.items()),
        "## What it is",
        _list(facts),
        "## What to know before you use it",
        _list([*map(markdown, artifact.details.get("notes", ())), *_EXPORT_LIMITS]),
    ]
    _write_document(folder, _front_matter(origin, library, task=task, tags=["dilap"]), "\n\n".join(parts))


def _write(
    folder: Path, lines: Sequence[str], result: PruneResult[Any], origin: Origin, subject: _Subject, *, library: str
) -> None:
    front = _front_matter(origin, library, task=subject.task, tags=["dilap", _done(result)])
    _write_document(folder, front, _text(result, origin, lines, subject))


def _write_document(folder: Path, front: str, text: str) -> None:
    with written_aside(folder / "README.md") as path:
        path.write_text(f"---\n{front}\n---\n\n{text}\n", encoding="utf-8")


def _front_matter(origin: Origin, library: str, *, task: str, tags: list[str]) -> str:
    """Return what the hub reads of a card; what is not known is left out."""
    found: str = ModelCardData(
        base_model=list(origin.base_models) or None,
        language=list(origin.languages) or None,
        library_name=library,
        license=origin.license or None,
        license_name=origin.license_name or None,
        license_link=origin.license_link or None,
        pipeline_tag=task,
        tags=tags,
    ).to_yaml()
    return found


def _text(result: PruneResult[Any], origin: Origin, lines: Sequence[str], subject: _Subject) -> str:
    name, done, (scored, _) = origin.name or name_of(result.model), _done(result), result.pruned.quality.source
    parts = [
        f"# {markdown(name)}, {done} to {result.budget} on {result.target}",
        markdown(verdict_sentence(result).replace(scored, _public(scored))),
        f"{done.capitalize()} with DiLAP from {markdown(name)}. {_terms(origin)}",
        "## Measured",
        _table(measured_rows(result)),
        f"On {result.target}, in {result.backend} with {markdown(result.workload.describe())}.",
        "## How to load it",
        *lines,
        "## What it is",
        _list(_facts(result, subject)),
        "## What to know before you use it",
        _list([markdown(note) for note in (*result.all_notes, *_limits(subject))]),
        *_answers(result),
    ]
    return "\n\n".join(parts)


def _done(result: PruneResult[Any]) -> str:
    return "quantised" if result.is_only_quantised else "pruned"


def _terms(origin: Origin) -> str:
    if origin.license:
        return f"Its licence is that of its source: {markdown(origin.license)}."
    return "The files of its source name no licence: look for it there before you publish this."


_EXPORT_LIMITS = (
    "Its latency was measured on no device: dilap-eval --costs measures it.",
    "Whatever limits the model has that it was made from, it has too.",
)


def _limits(subject: _Subject) -> tuple[str, ...]:
    return (
        f"It knows less than the model that it was made from, and was scored on {subject.scored_on} only; whatever "
        "limits that model has, it has too.",
        "Its latency is that of one device in one configuration; dilap-eval measures it on others.",
    )


def _facts(result: PruneResult[Any], subject: _Subject) -> list[str]:
    fingerprint = result.pruned.measurement.fingerprint
    return [
        f"command: `{_in_public(shlex.split(command_line(result)))}`",
        f"dilap_version: {result.versions['dilap']}",
        f"method: {markdown(result.method)}, recovery: {result.recovery}, seed {result.seed}",
        f"calibrated on: {markdown(_public(result.calibration))}",
        f"plan: {result.plan_digest}",
        *subject.facts,
        _formats(result.workload.precision, others=len(result.precisions)),
        f"device: {markdown(fingerprint.device)}, {markdown(fingerprint.processor)}",
        f"runtime: {markdown(fingerprint.runtime)} {markdown(fingerprint.runtime_version)}",
    ]


def _formats(precision: str, *, others: int) -> str:
    return f"precision: {precision}{f', parts in others: {others}' if others else ''}"


def _widths(artifact: Artifact) -> str:
    layers = artifact.decoder.layers
    widths = ", ".join(f"{one.num_heads}/{one.num_kv_heads}/{one.num_channels}" for one in layers)
    return f"query heads/KV heads/channels of each layer: {widths}"


def _kept(plan: Plan[Network]) -> str:
    """Say how many units stay in the groups of a network."""
    counts = plan.counts
    groups = [f"{one.name} {counts[one.name]} of {one.num_units}" for one in plan.architecture.groups]
    return f"units kept in each group: {markdown(', '.join(groups))}"


def _input(artifact: Artifact) -> list[str]:
    return [] if artifact.input is None else [f"input: {loading.input_in_words(artifact.input)}"]


def _task(artifact: Artifact) -> str:
    return "feature-extraction" if isinstance(artifact.input, TokenInput) else "image-classification"


def _in_public(words: Sequence[str]) -> str:
    """Return a command with the mere names of files: where they lay is nobody's business."""
    return printable(shlex.join(map(_public, words))).replace("`", " ")


def _public(word: str) -> str:
    path = Path(word)
    return path.name if path.is_absolute() else word


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *rest = (f"| {' | '.join(map(markdown, row))} |" for row in rows)
    return "\n".join([head, "|---|--:|--:|--:|", *rest])


def _list(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _answers(result: PruneResult[Any]) -> list[str]:
    """Return the answers as a table, unless they are about passages of a text that may be private."""
    if not result.answers or result.pruned.quality.text != _PUBLIC_TEXT:
        return []
    rows = [("after", "dense", "pruned"), *((one.prompt, one.dense, one.pruned) for one in result.answers)]
    head, *rest = (f"| {' | '.join(markdown(' '.join(cell.split())) for cell in row)} |" for row in rows)
    return ["## Answers", "\n".join([head, "|---|---|---|", *rest])]


def _code(text: str, language: str = "") -> str:
    return f"```{language}\n{text}\n```"

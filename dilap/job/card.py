"""The model card of what a job or an export wrote: README.md, so that the folder can be published as it is."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from huggingface_hub import ModelCardData

from dilap import __version__, backends
from dilap.core.artifact import Artifact
from dilap.core.codec import written_aside
from dilap.core.printable import markdown, printable
from dilap.core.workload import Workload
from dilap.job import meaning
from dilap.job.command import command_line
from dilap.job.ending import verdict_sentence
from dilap.job.outputs import name_of
from dilap.job.result import PruneResult, measured_rows
from dilap.models.origin import Origin

_LIBRARIES: Mapping[str, str] = {
    "llamacpp": "llama.cpp",
    "onnxruntime": "onnxruntime-genai",
    "executorch": "executorch",
    "tensorrt": "tensorrt",
}
_PUBLIC_TEXT = "python-docs"
_IN_TORCH = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("."{code})
words = AutoTokenizer.from_pretrained(".")"""


def write_cards(run: Path, result: PruneResult, origin: Origin) -> None:
    """Write the cards of the checkpoint and of the artifact in the folder of a run."""
    needs_code = (run / "checkpoint" / "modeling_dilap.py").is_file()
    code = _IN_TORCH.format(code=", trust_remote_code=True" if needs_code else "")
    why = ["Its layers have widths of their own, which `modeling_dilap.py` beside it builds."] if needs_code else []
    _write(run / "checkpoint", "transformers", [*why, _code(code, "python")], result, origin)
    commands = backends.get(result.backend).how_to_run(result.pruned.artifact.path, result.workload)
    lines = ["As it was measured:", *(f"{name}:\n\n{_code(text)}" for name, text in commands.items())]
    _write(run / "artifact", _LIBRARIES[result.backend], lines, result, origin)


def write_export_card(folder: Path, artifact: Artifact, origin: Origin, *, command: Sequence[str]) -> None:
    """Write the card of an exported decoder: what it is and how it is loaded. Nothing was measured of it."""
    runtime, name = backends.get(artifact.backend), origin.name or "a model without a name"
    commands = runtime.how_to_run(artifact.path, Workload(precision=artifact.precision))
    facts = [
        f"command: `{_in_public(command)}`",
        f"dilap_version: {__version__}",
        _formats(artifact.precision, others=len(artifact.precisions)),
        _widths(artifact),
    ]
    if artifact.sqnr_db is not None:
        facts.append(f"logits beside torch's: {artifact.sqnr_db:.1f} dB, {meaning.of_sqnr(artifact.sqnr_db)}")
    if artifact.plan_digest:
        facts.append(f"plan: {artifact.plan_digest}")
    parts = [
        f"# {markdown(name)} for {artifact.backend}, {artifact.precision}",
        f"Written by DiLAP from {markdown(name)}. {_terms(origin)}",
        "## How to load it",
        "Threads and switches are yours to choose:",
        *(f"{title}:\n\n{_code(text)}" for title, text in commands.items()),
        "## What it is",
        _list(facts),
        "## What to know before you use it",
        _list([*map(markdown, artifact.details.get("notes", ())), *_EXPORT_LIMITS]),
    ]
    _write_document(folder, _front_matter(origin, _LIBRARIES[artifact.backend], tags=["dilap"]), "\n\n".join(parts))


def _write(folder: Path, library: str, loading: Sequence[str], result: PruneResult, origin: Origin) -> None:
    front = _front_matter(origin, library, tags=["dilap", _done(result)])
    _write_document(folder, front, _text(result, origin, loading))


def _write_document(folder: Path, front: str, text: str) -> None:
    with written_aside(folder / "README.md") as path:
        path.write_text(f"---\n{front}\n---\n\n{text}\n", encoding="utf-8")


def _front_matter(origin: Origin, library: str, *, tags: list[str]) -> str:
    """Return what the hub reads of a card; what is not known is left out."""
    found: str = ModelCardData(
        base_model=list(origin.base_models) or None,
        language=list(origin.languages) or None,
        library_name=library,
        license=origin.license or None,
        license_name=origin.license_name or None,
        license_link=origin.license_link or None,
        pipeline_tag="text-generation",
        tags=tags,
    ).to_yaml()
    return found


def _text(result: PruneResult, origin: Origin, loading: Sequence[str]) -> str:
    name, done = origin.name or name_of(result.model), _done(result)
    parts = [
        f"# {markdown(name)}, {done} to {result.budget} on {result.target}",
        markdown(verdict_sentence(result)),
        f"{done.capitalize()} with DiLAP from {markdown(name)}. {_terms(origin)}",
        "## Measured",
        _table(measured_rows(result)),
        f"On {result.target}, in {result.backend} with {markdown(result.workload.describe())}.",
        "## How to load it",
        *loading,
        "## What it is",
        _list(_facts(result)),
        "## What to know before you use it",
        _list([markdown(note) for note in (*result.all_notes, *_LIMITS)]),
        *_answers(result),
    ]
    return "\n\n".join(parts)


def _done(result: PruneResult) -> str:
    return "quantised" if result.is_only_quantised else "pruned"


def _terms(origin: Origin) -> str:
    if origin.license:
        return f"Its licence is that of its source: {markdown(origin.license)}."
    return "The files of its source name no licence: look for it there before you publish this."


_EXPORT_LIMITS = (
    "Its latency was measured on no device: dilap-eval --costs measures it.",
    "Whatever limits the model has that it was made from, it has too.",
)
_LIMITS = (
    "It knows less than the model that it was made from, and was scored on one text only; "
    "whatever limits that model has, it has too.",
    "Its latency is that of one device in one configuration; dilap-eval measures it on others.",
)


def _facts(result: PruneResult) -> list[str]:
    fingerprint = result.pruned.measurement.fingerprint
    return [
        f"command: `{_in_public(shlex.split(command_line(result)))}`",
        f"dilap_version: {result.versions['dilap']}",
        f"method: {markdown(result.method)}, recovery: {result.recovery}, seed {result.seed}",
        f"calibration text: {markdown(_public(result.calibration))}",
        f"plan: {result.plan_digest}",
        _widths(result.pruned.artifact),
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


def _answers(result: PruneResult) -> list[str]:
    """Return the answers as a table, unless they are about passages of a text that may be private."""
    if not result.answers or result.pruned.quality.text != _PUBLIC_TEXT:
        return []
    rows = [("after", "dense", "pruned"), *((one.prompt, one.dense, one.pruned) for one in result.answers)]
    head, *rest = (f"| {' | '.join(markdown(' '.join(cell.split())) for cell in row)} |" for row in rows)
    return ["## Answers", "\n".join([head, "|---|---|---|", *rest])]


def _code(text: str, language: str = "") -> str:
    return f"```{language}\n{text}\n```"

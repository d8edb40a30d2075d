"""The model card of what a job wrote: README.md, so that the folder can be published as it is."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from huggingface_hub import ModelCardData

from dilap import backends
from dilap.core.codec import written_aside
from dilap.core.printable import markdown, printable
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


def _write(folder: Path, library: str, loading: Sequence[str], result: PruneResult, origin: Origin) -> None:
    text = f"---\n{_front_matter(origin, library)}\n---\n\n{_text(result, origin, loading)}\n"
    with written_aside(folder / "README.md") as path:
        path.write_text(text, encoding="utf-8")


def _front_matter(origin: Origin, library: str) -> str:
    """Return what the hub reads of a card; what is not known is left out."""
    found: str = ModelCardData(
        base_model=list(origin.base_models) or None,
        language=list(origin.languages) or None,
        library_name=library,
        license=origin.license or None,
        license_name=origin.license_name or None,
        license_link=origin.license_link or None,
        pipeline_tag="text-generation",
        tags=["dilap", "pruned"],
    ).to_yaml()
    return found


def _text(result: PruneResult, origin: Origin, loading: Sequence[str]) -> str:
    name = origin.name or name_of(result.model)
    terms = (
        f"Its licence is that of its source: {markdown(origin.license)}."
        if origin.license
        else "The files of its source name no licence: look for it there before you publish this."
    )
    parts = [
        f"# {markdown(name)}, pruned to {result.budget} on {result.target}",
        markdown(verdict_sentence(result)),
        f"Pruned with DiLAP from {markdown(name)}. {terms}",
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


_LIMITS = (
    "It knows less than the model that it was made from, and was scored on one text only; "
    "whatever limits that model has, it has too.",
    "Its latency is that of one device in one configuration; dilap-eval measures it on others.",
)


def _facts(result: PruneResult) -> list[str]:
    fingerprint, mixed = result.pruned.measurement.fingerprint, len(result.precisions)
    layers = result.pruned.artifact.decoder.layers
    widths = ", ".join(f"{one.num_heads}/{one.num_kv_heads}/{one.num_channels}" for one in layers)
    return [
        f"command: `{_command(result)}`",
        f"dilap_version: {result.versions['dilap']}",
        f"method: {markdown(result.method)}, recovery: {result.recovery}, seed {result.seed}",
        f"calibration text: {markdown(_public(result.calibration))}",
        f"plan: {result.plan_digest}",
        f"query heads/KV heads/channels of each layer: {widths}",
        f"precision: {result.workload.precision}{f', {mixed} parts in others' if mixed else ''}",
        f"device: {markdown(fingerprint.device)}, {markdown(fingerprint.processor)}",
        f"runtime: {markdown(fingerprint.runtime)} {markdown(fingerprint.runtime_version)}",
    ]


def _command(result: PruneResult) -> str:
    """Return the command with the mere names of files: where they lay is nobody's business."""
    words = map(_public, shlex.split(command_line(result)))
    return printable(shlex.join(words)).replace("`", " ")


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

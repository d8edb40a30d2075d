"""Export a checkpoint to a runtime's format, checked against torch."""

import os
from pathlib import Path

from dilap import backends
from dilap.core.artifact import Artifact
from dilap.core.codec import read_json
from dilap.core.errors import InvalidInput
from dilap.core.progress import Progress


def chosen_precision(backend: str, precision: str | None) -> str:
    """Return `precision`, or the runtime's default for None. Raises InvalidInput, Unsupported for an unknown one."""
    runtime = backends.get(backend)
    chosen = precision or runtime.precisions()[0]
    backends.require_precision(runtime, chosen)
    return chosen


def export(
    checkpoint: str,
    *,
    backend: str,
    precision: str | None = None,
    tokenizer: Path | None = None,
    merge_adapter: str | None = None,
    vocabulary: str | None = None,
    out: Path,
    progress: Progress,
) -> Artifact:
    """Write the folder `out`, whole or not at all, with the model file and its sidecar `artifact.json`.

    `checkpoint` is a run, a folder, a GGUF file, a hub id or a built-in name. Raises InvalidInput, Unavailable,
    Unsupported where the runtime cannot hold the model, and VerificationFailed where the runtime computes something
    else than torch.
    """
    chosen = chosen_precision(backend, precision)
    if os.path.lexists(out):
        raise InvalidInput(f"{out} already exists; remove it or choose another --out")
    if tokenizer is not None and not tokenizer.exists():
        raise InvalidInput(f"no tokenizer {str(tokenizer)!r}: give a Hugging Face folder or a GGUF file")
    progress.say(f"exporting {checkpoint} to {backend}, {chosen}")
    # Importing torch takes seconds: bad input is refused first.
    from dilap import export as exporters  # noqa: PLC0415
    from dilap.models.anatomy import architecture_of  # noqa: PLC0415
    from dilap.models.load import checkpoint_of, load  # noqa: PLC0415

    source = load(checkpoint, tokenizer=tokenizer, merge_adapter=merge_adapter, vocabulary=vocabulary)
    backends.require_loadable(backends.get(backend), architecture_of(source.model), precision=chosen)
    for note in source.notes:
        progress.say(note)
    return exporters.get(backend).export(
        source.model,
        tokenizer=source.tokenizer_path,
        precision=chosen,
        plan_digest=_plan_digest(checkpoint_of(Path(checkpoint))),
        out=out,
    )


def _plan_digest(checkpoint: Path) -> str:
    """Return the digest of the plan that the checkpoint was shrunk by; empty for any other model."""
    path = checkpoint / "config.json"
    return str(read_json(path).get("dilap_plan", "")) if path.is_file() else ""

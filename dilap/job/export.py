"""Export a checkpoint to a runtime's format, checked against torch."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from dilap import backends
from dilap.core.artifact import Artifact
from dilap.core.codec import decode, read_json
from dilap.core.errors import InvalidInput, Mismatch
from dilap.core.network_input import NetworkInput
from dilap.core.plan import Plan
from dilap.core.precisions import Mix, for_every_layer
from dilap.core.progress import Progress
from dilap.core.shape import UNMIXED
from dilap.job.network_export import export_network
from dilap.job.networks import is_network


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
    precisions: Mapping[str, str] = UNMIXED,
    plan: Path | None = None,
    tokenizer: Path | None = None,
    merge_adapter: str | None = None,
    vocabulary: str | None = None,
    compute: str = "auto",
    input_: NetworkInput | None = None,
    processor: Path | None = None,
    weights: Path | None = None,
    calib: str | None = None,
    out: Path,
    progress: Progress,
) -> Artifact:
    """Write the folder `out`, whole or not at all, with the model file and its sidecar `artifact.json`.

    It gets a model card, too. `checkpoint` is a run, a folder, a GGUF file, a hub id or a built-in name; or an
    image network, which is every model with an `input_`: `processor`, `weights` and `calib` are for these alone (see
    `export_network`). `precisions` has those of the parts of the model that differ: `head`, `embedding`,
    `layers.N.attention`, `layers.N.ffn`, or `attention` and `ffn` for all layers. `plan` is the plan.json of a run,
    whose precisions are those of the parts that are not named. `compute` is the device on which torch computes. Raises
    InvalidInput, Unavailable, Unsupported where the runtime cannot hold the model, Mismatch for the plan of another
    model, and VerificationFailed where the runtime computes something else than torch.
    """
    if os.path.lexists(out):
        raise InvalidInput(f"{out} already exists; remove it or choose another --out")
    if input_ is not None or is_network(checkpoint):
        changes = {"--tokenizer": tokenizer, "--merge-adapter": merge_adapter, "--vocabulary": vocabulary}
        _refuse(f"the image network {checkpoint}", {"--precision PART=": precisions, "--plan": plan, **changes})
        return export_network(
            checkpoint,
            backend=backend,
            precision=precision,
            input_=input_,
            processor=processor,
            weights=weights,
            calib=calib,
            out=out,
            progress=progress,
        )
    of_networks = {"--processor": processor, "--weights": weights, "--calib": calib}
    _refuse(f"{checkpoint}, which is no image network", of_networks)
    chosen, planned = chosen_precision(backend, precision), None if plan is None else _read_plan(plan, precision)
    for one in precisions.values():
        backends.require_precision(backends.get(backend), one)
    if tokenizer is not None and not tokenizer.exists():
        raise InvalidInput(f"no tokenizer {str(tokenizer)!r}: give a Hugging Face folder or a GGUF file")
    progress.say(f"exporting {checkpoint} to {backend}, {Mix(precision=chosen, precisions=precisions)}")
    # Importing torch takes seconds: bad input is refused first.
    from dilap import export as exporters  # noqa: PLC0415
    from dilap.job.card import write_export_card  # noqa: PLC0415
    from dilap.models.anatomy import architecture_of  # noqa: PLC0415
    from dilap.models.load import checkpoint_of, load  # noqa: PLC0415
    from dilap.models.origin import origin_of  # noqa: PLC0415

    source = load(checkpoint, tokenizer=tokenizer, merge_adapter=merge_adapter, vocabulary=vocabulary, compute=compute)
    architecture = architecture_of(source.model)
    found = for_every_layer(precisions, architecture)
    if planned is not None:
        if planned.pruned_architecture().layers != architecture.layers:
            raise Mismatch(f"{plan} is the plan of a model with other layers than {checkpoint} has")
        found = planned.pruned_precisions() | found
    backends.require_loadable(backends.get(backend), architecture, precision=chosen, precisions=found)
    for note in source.notes:
        progress.say(note)
    artifact = exporters.get(backend).export(
        source.model,
        tokenizer=source.tokenizer_path,
        precision=chosen,
        precisions=found,
        plan_digest=_plan_digest(checkpoint_of(Path(checkpoint))),
        out=out,
    )
    options = {"--plan": plan, "--tokenizer": tokenizer, "--merge-adapter": merge_adapter, "--vocabulary": vocabulary}
    command = _command([f"{part}={one}" for part, one in precisions.items()], options)
    command = ["dilap-export", "--backend", backend, "--precision", chosen, *command, checkpoint]
    write_export_card(out, artifact, origin_of(source.model.config), command=command)
    return artifact


def _command(precisions: Sequence[str], options: Mapping[str, object]) -> list[str]:
    """Return the words of the command for parts with precisions of their own and for options that have a value."""
    words = [word for one in precisions for word in ("--precision", one)]
    return words + [word for name, value in options.items() if value for word in (name, str(value))]


def _refuse(model: str, options: Mapping[str, object]) -> None:
    """Raise InvalidInput where one of these options, by name, is given for a model that has no use for it."""
    if given := [name for name, value in options.items() if value]:
        raise InvalidInput(f"{given[0]} does not apply to {model}: leave it away")


def _read_plan(path: Path, precision: str | None) -> Plan:
    """Read a plan. Raises InvalidInput, also where it says only which parts differ from a precision that is missing."""
    plan = decode(Plan, read_json(path), source=str(path))
    if plan.precisions and precision is None:
        raise InvalidInput(f"{path} says which parts differ from the others: name the precision of the others, too")
    return plan


def _plan_digest(checkpoint: Path) -> str:
    """Return the digest of the plan that the checkpoint was shrunk by; empty for any other model."""
    path = checkpoint / "config.json"
    return str(read_json(path).get("dilap_plan", "")) if path.is_file() else ""

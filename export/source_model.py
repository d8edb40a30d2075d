"""What all exporters take from the torch model: its tensors, and the facts that an artifact keeps of it."""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from dilap import backends
from dilap.core.artifact import Artifact
from dilap.core.errors import InvalidInput, Unsupported
from dilap.core.precisions import Mix
from dilap.core.shape import Architecture
from dilap.models.compute_device import HOST
from dilap.models.context import context_notes
from dilap.models.vocabulary import vocabulary_notes

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def require_held(architecture: Architecture, *, backend: str, mix: Mix) -> None:
    """Raise Unsupported, with the reason that the runtime gives, where it holds no model of this kind in `mix`.

    Raises InvalidInput for a part or a precision that is not known.
    """
    for limits in backends.capabilities_of(backends.get(backend), architecture, mix):
        if limits.unsupported:
            raise Unsupported(limits.unsupported)


def tensor(
    tensors: Mapping[str, torch.Tensor], name: str, shape: tuple[int, ...], *, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Return the tensor `name` in the host's memory in `dtype`.

    Raises InvalidInput, naming it, where it is missing, has another shape, or holds what `dtype` cannot.
    """
    try:
        found = tensors[name].detach()
    except KeyError:
        raise InvalidInput(f"the model has no tensor {name}") from None
    if tuple(found.shape) != shape:
        raise InvalidInput(f"{name} is {tuple(found.shape)}, the architecture needs {shape}")
    found = found.to(device=HOST, dtype=dtype)
    if not torch.isfinite(found).all():
        raise InvalidInput(f"{name} holds NaN, infinity or a value too large for {str(dtype).removeprefix('torch.')}")
    return found


def end_tokens(model: "PreTrainedModel", end: int | None) -> list[int]:
    """Return the tokens at which a generated text ends: the tokenizer's `end`, and those of the generation config."""
    generation = model.generation_config
    said = None if generation is None else generation.eos_token_id
    said = model.config.eos_token_id if said is None else said
    found = [end, *(said if isinstance(said, list | tuple) else [said])]
    return list(dict.fromkeys(token for token in found if token is not None))


def described(
    artifact: Artifact, model: "PreTrainedModel", *, plan_digest: str, notes: tuple[str, ...] = ()
) -> Artifact:
    """Return `artifact` with the facts of the model that it was made from; `notes` say what was checked."""
    details = {
        **artifact.details,
        "torch_dtype": str(model.dtype),
        "notes": [*notes, *context_notes(model.config), *vocabulary_notes(model.config)],
    }
    return replace(artifact, plan_digest=plan_digest, details=details)

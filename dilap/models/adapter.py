"""An adapter of peft is merged into the matrices of its model, exactly as peft computes with it, or refused."""

import json
import warnings
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel

from dilap.core.codec import read_json
from dilap.core.errors import InvalidInput
from dilap.models.families.family import has_tied_head
from dilap.models.pretrained import errors_of_damaged_files

CONFIG = "adapter_config.json"
# Of the kinds that peft has, those that are a change of single matrices, whatever the text is.
KINDS = ("LORA", "LOHA", "LOKR", "IA3")
# Entries of an adapter's config with which it is none, and what they do; peft imports a module that stands beside the
# first one, and merges with the second as if it were not there.
_NO_CHANGE_OF_MATRICES = {
    "megatron_config": "names modules of Megatron's code",
    "layer_replication": "repeats layers",
    "alora_invocation_tokens": "adapts only what stands behind certain tokens",
}
_WEIGHTS, _PICKLE = "adapter_model.safetensors", "adapter_model.bin"
Shapes = Mapping[str, tuple[int, ...]]


def merge_adapter_(model: PreTrainedModel, folder: Path) -> None:
    """Add the adapter in `folder` to the weights of `model`, in their precision.

    Raises InvalidInput, in one line, for a folder without an adapter in safetensors, for an adapter that is no change
    of the weights alone, and for one whose tensors are not all those that it needs in this model.
    """
    _require_mergeable(folder)
    try:
        with errors_of_damaged_files(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft warns of tensors that it passes over; they are refused below
            shapes = _shapes_of(folder / _WEIGHTS)
            adapted: Any = PeftModel.from_pretrained(
                model, folder, torch_device=str(model.device), ignore_mismatched_sizes=True, local_files_only=True
            )
            _require_its_tensors(adapted, shapes)
            _untie_(adapted.get_base_model())
            adapted.merge_and_unload(safe_merge=True)
    except InvalidInput as error:
        raise InvalidInput(f"adapter {folder} cannot be merged: {error}") from error
    model.config.tie_word_embeddings = has_tied_head(model)
    model.eval().requires_grad_(True)  # as a model is when it was loaded; peft freezes it


def _require_mergeable(folder: Path) -> None:
    """Raise InvalidInput where the folder has no adapter, one that runs code, or one that is no change of matrices."""
    if not (folder / CONFIG).is_file():
        raise InvalidInput(f"no adapter in {str(folder)!r}: there is no {CONFIG}; give the folder that peft wrote")
    if not (folder / _WEIGHTS).is_file():
        is_pickle = (folder / _PICKLE).is_file()
        found = f"{_PICKLE} is a pickle, which can run code and is never read" if is_pickle else "it holds no weights"
        raise InvalidInput(f"adapter {folder}: {found}; save the adapter as {_WEIGHTS}")
    config = read_json(folder / CONFIG)
    if (kind := config.get("peft_type")) not in KINDS:
        raise InvalidInput(f"adapter {folder}: it is of the kind {kind!r:.80}; {', '.join(KINDS)} can be merged")
    for name, why in _NO_CHANGE_OF_MATRICES.items():
        if config.get(name):
            raise InvalidInput(f"adapter {folder}: its {name} {why}, which cannot be merged")
    known = {one.name for one in fields(PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind)])}
    if unknown := [name for name, value in config.items() if value and name not in known]:
        raise InvalidInput(f"adapter {folder}: peft does not know its {unknown[0]}; pip install -U peft")


def _shapes_of(path: Path) -> Shapes:
    with safe_open(path, framework="pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (no mapping)


def _require_its_tensors(adapted: Any, shapes: Shapes) -> None:
    """Raise InvalidInput unless an adapter's file has the tensors that its config asks for in this model, and no more.

    It may hold the embedding and the head as well.
    """
    needed, allowed = (
        {name: tuple(one.shape) for name, one in get_peft_model_state_dict(adapted, save_embedding_layers=more).items()}
        for more in (False, True)
    )
    for name, shape in sorted(shapes.items()):
        if name not in allowed:
            raise InvalidInput(f"its tensor {name} has no place in this model: it is an adapter of another one")
        if shape != allowed[name]:
            raise InvalidInput(
                f"its tensor {name} is {json.dumps(shape)}, and {json.dumps(allowed[name])} by its config in this model"
            )
    if missing := sorted(set(needed) - set(shapes)):
        raise InvalidInput(f"its tensor {missing[0]} is missing from its file, and its config asks for it")


def _untie_(model: PreTrainedModel) -> None:
    """Give the head a matrix of its own where an adapter changes it or the embedding, which one matrix serves as.

    peft computes with the sum in the one place and would merge it into both.
    """
    pair = (model.get_input_embeddings(), model.get_output_embeddings())
    if not any(isinstance(one, BaseTunerLayer) for one in pair):
        return
    embedding, head = (one.get_base_layer() if isinstance(one, BaseTunerLayer) else one for one in pair)
    assert isinstance(head.weight, torch.Tensor)
    if head.weight is embedding.weight:
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)

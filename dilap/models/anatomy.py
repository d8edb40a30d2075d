"""Find the prunable parts of a loaded model."""

import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from dilap.core.codec import digest
from dilap.core.errors import InvalidInput, Unsupported
from dilap.core.shape import Architecture, LayerWidths
from dilap.models.modeling_dilap import FAMILIES, Family, linear_at

_OF_THE_READING = ("_name_or_path", "transformers_version", "architectures")


@dataclass(frozen=True, kw_only=True)
class Sublayer:
    """One attention or feed-forward network of a model; `out` is its output projection (hidden x inputs),
    at `path` in the model."""

    layer: int
    kind: str
    path: str
    out: nn.Linear

    @property
    def name(self) -> str:
        return f"layers.{self.layer}.{self.kind}"


def family_of(config: PreTrainedConfig) -> Family:
    """The adapter of the model's family. Raises Unsupported with the known ones."""
    if config.model_type not in FAMILIES:
        raise Unsupported(
            f"architecture {config.model_type!r} is not known; DiLAP prunes: {', '.join(sorted(FAMILIES))}"
        )
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if len(kinds) > 1:
        raise Unsupported(f"layers of several attention types ({', '.join(sorted(kinds))}) cannot be pruned yet")
    return FAMILIES[config.model_type]


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    layers = model.get_submodule(family_of(model.config).layers)
    assert isinstance(layers, nn.ModuleList)
    return layers


def head_dim_of(config: PreTrainedConfig) -> int:
    """Channels of one head: heads * head_dim need not equal the hidden size."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def architecture_of(model: PreTrainedModel) -> Architecture:
    """The shape of a loaded model, its widths read from the tensors themselves."""
    config, family = model.config, family_of(model.config)
    head_dim = head_dim_of(config)
    first = {
        path: _first(model, path) for path in (family.query, family.attention_out, family.ffn_in[0], family.ffn_out)
    }
    positions = getattr(model.get_submodule(family.layers.rpartition(".")[0]), "embed_positions", None)
    if config.hidden_size != model.get_input_embeddings().weight.shape[1]:
        raise Unsupported("embeddings of another width than the hidden size (OPT-350m) cannot be pruned yet")
    return Architecture(
        family=config.model_type,
        hidden_size=config.hidden_size,
        head_dim=head_dim,
        vocab_size=model.get_input_embeddings().weight.shape[0],
        tied_embeddings=bool(config.tie_word_embeddings),
        ffn_matrices=len(family.ffn_in) + 1,
        norm_vectors=len(list(_final_norm(model).parameters())),
        qkv_bias=_has_bias(first[family.query]),
        out_bias=_has_bias(first[family.attention_out]),
        ffn_bias=_has_bias(first[family.ffn_in[0]]),
        ffn_out_bias=_has_bias(first[family.ffn_out]),
        qk_norm=any(name.endswith("q_norm.weight") for name, _ in model.named_parameters()),
        num_positions=0 if positions is None else positions.weight.shape[0],
        layers=tuple(_widths(layer, family, head_dim) for layer in decoder_layers(model)),
    )


def _widths(layer: nn.Module, family: Family, head_dim: int) -> LayerWidths:
    heads, kv_heads, channels = 0, 0, 0
    query, key = linear_at(layer, family.query), linear_at(layer, family.key)
    if query is not None and key is not None:
        heads, kv_heads = query.out_features // head_dim, key.out_features // head_dim
    if (out := linear_at(layer, family.ffn_out)) is not None:
        channels = out.in_features
    return LayerWidths(num_heads=heads, num_kv_heads=kv_heads, num_channels=channels)


def _first(model: PreTrainedModel, path: str) -> nn.Linear | None:
    """The first layer's matrix at `path` that was not removed."""
    found = (linear_at(layer, path) for layer in decoder_layers(model))
    return next((module for module in found if module is not None), None)


def _has_bias(module: nn.Linear | None) -> bool:
    return module is not None and module.bias is not None


def _final_norm(model: PreTrainedModel) -> nn.Module:
    stack = model.get_submodule(family_of(model.config).layers.rpartition(".")[0])
    norm = getattr(stack, "norm", None) or getattr(stack, "final_layer_norm", None)
    return norm if isinstance(norm, nn.Module) else nn.Identity()


def sublayers(model: PreTrainedModel) -> Iterator[Sublayer]:
    """Every sublayer that a model has, layer by layer, attention first."""
    family = family_of(model.config)
    for index, layer in enumerate(decoder_layers(model)):
        for kind, path in (("attention", family.attention_out), ("ffn", family.ffn_out)):
            if (out := linear_at(layer, path)) is not None:
                yield Sublayer(layer=index, kind=kind, path=f"{family.layers}.{index}.{path}", out=out)


def model_digest(model: PreTrainedModel) -> str:
    """SHA-256 over the configuration and the name, shape, type and every byte of every tensor.

    Tensors are hashed beside each other, because one core reads 1 to 2 GB/s.
    """
    tensors = sorted(model.state_dict().items())
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        contents = list(pool.map(lambda one: _content_sha256(one[1]), tensors))
    described = [
        [name, list(tensor.shape), str(tensor.dtype), content]
        for (name, tensor), content in zip(tensors, contents, strict=True)
    ]
    return digest([_configuration(model.config), described])


def _configuration(config: PreTrainedConfig) -> dict[str, Any]:
    """What the numbers depend on beside the weights (the rotary base, epsilons), not where and by what it was read."""
    settings: dict[str, Any] = json.loads(config.to_json_string())
    return {name: value for name, value in settings.items() if name not in _OF_THE_READING}


def _content_sha256(tensor: torch.Tensor) -> str:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return hashlib.sha256(flat.view(torch.uint8).numpy().data).hexdigest()


def require_finite(model: PreTrainedModel) -> None:
    """Raises InvalidInput naming the first tensor that holds NaN or infinity."""
    for name, tensor in model.named_parameters():
        if not torch.isfinite(tensor).all():
            raise InvalidInput(f"tensor {name} of the model holds NaN or infinite values; the checkpoint is damaged")

"""Find the prunable parts of a loaded model."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from dilap.codec import canonical
from dilap.errors import InvalidInput, Unsupported
from dilap.modeling_dilap import FAMILIES, Family
from dilap.types import Architecture, LayerWidths


@dataclass(frozen=True, kw_only=True)
class Sublayer:
    """One attention or feed-forward network of a model; `out` is its output projection (hidden x inputs)."""

    layer: int
    kind: str
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
    first = {path: _first(model, path) for path in (family.query, family.attention_out, family.ffn_in[0])}
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
        qk_norm=any(name.endswith("q_norm.weight") for name, _ in model.named_parameters()),
        num_positions=0 if positions is None else positions.weight.shape[0],
        layers=tuple(_widths(layer, family, head_dim) for layer in decoder_layers(model)),
    )


def _widths(layer: nn.Module, family: Family, head_dim: int) -> LayerWidths:
    heads, kv_heads, channels = 0, 0, 0
    query, key = _linear(layer, family.query), _linear(layer, family.key)
    if isinstance(query, nn.Linear) and isinstance(key, nn.Linear):
        heads, kv_heads = query.out_features // head_dim, key.out_features // head_dim
    if isinstance(out := _linear(layer, family.ffn_out), nn.Linear):
        channels = out.in_features
    return LayerWidths(num_heads=heads, num_kv_heads=kv_heads, num_channels=channels)


def _linear(layer: nn.Module, path: str) -> nn.Module | None:
    """The module at `path`, None where its sublayer was removed."""
    try:
        return layer.get_submodule(path)
    except AttributeError:
        return None


def _first(model: PreTrainedModel, path: str) -> nn.Module | None:
    """The first layer's matrix at `path` that was not removed."""
    found = (_linear(layer, path) for layer in decoder_layers(model))
    return next((module for module in found if isinstance(module, nn.Linear)), None)


def _has_bias(module: nn.Module | None) -> bool:
    return isinstance(module, nn.Linear) and module.bias is not None


def _final_norm(model: PreTrainedModel) -> nn.Module:
    stack = model.get_submodule(family_of(model.config).layers.rpartition(".")[0])
    norm = getattr(stack, "norm", None) or getattr(stack, "final_layer_norm", None)
    return norm if isinstance(norm, nn.Module) else nn.Identity()


def sublayers(model: PreTrainedModel) -> Iterator[Sublayer]:
    """Every sublayer that a model has, layer by layer, attention first."""
    family = family_of(model.config)
    for index, layer in enumerate(decoder_layers(model)):
        for kind, path in (("attention", family.attention_out), ("ffn", family.ffn_out)):
            if isinstance(out := _linear(layer, path), nn.Linear):
                yield Sublayer(layer=index, kind=kind, out=out)


def model_digest(model: PreTrainedModel) -> str:
    """SHA-256 over the shapes and a sample of every tensor's values, in f32.

    The sample (first and last 1,024 values) tells fine-tunes of one model apart at the cost of no second read.
    """
    hasher = hashlib.sha256(model.config.model_type.encode())
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.detach().reshape(-1)
        sample = torch.cat([flat[:1024], flat[-1024:]]).to(torch.float32).cpu()
        hasher.update(canonical([name, list(tensor.shape)]).encode())
        hasher.update(sample.numpy().tobytes())
    return hasher.hexdigest()


def require_finite(model: PreTrainedModel) -> None:
    """Raises InvalidInput naming the first tensor that holds NaN or infinity."""
    for name, tensor in model.named_parameters():
        if not torch.isfinite(tensor).all():
            raise InvalidInput(f"tensor {name} of the model holds NaN or infinite values; the checkpoint is damaged")

"""Apply a plan physically: the same values in smaller matrices."""

from collections.abc import Mapping

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from dilap.anatomy import architecture_of, decoder_layers, family_of
from dilap.errors import Mismatch
from dilap.modeling_dilap import PRUNED_CLASSES, Family, narrow_layers_
from dilap.types import Plan

Weights = Mapping[str, torch.Tensor]  # sublayer name -> its compensated output projection (hidden x kept columns)


def out_columns(plan: Plan, layer: int, kind: str) -> torch.Tensor:
    """The columns of a sublayer's output projection that a plan keeps, ascending.

    Attention: head_dim columns for every kept slot of every kept KV group; query head = group * ratio + slot.
    """
    if kind == "ffn":
        return torch.tensor(plan.units(layer, "channels"), dtype=torch.long)
    dense = plan.architecture.layers[layer]
    ratio = dense.num_heads // dense.num_kv_heads
    heads = [g * ratio + s for g in plan.units(layer, "kv_groups") for s in plan.units(layer, "query_slots")]
    return _rows_of(heads, plan.architecture.head_dim)


def _rows_of(heads: list[int] | tuple[int, ...], head_dim: int) -> torch.Tensor:
    starts = torch.tensor(heads, dtype=torch.long)[:, None] * head_dim
    return (starts + torch.arange(head_dim)).reshape(-1)


@torch.no_grad()
def shrink_(model: PreTrainedModel, plan: Plan, *, weights: Weights | None = None) -> PreTrainedModel:
    """Cut `model` in place to the units that `plan` keeps, one layer at a time; returns it.

    `weights` replaces output projections by compensated ones. Raises Mismatch when the plan is for another shape.
    """
    if architecture_of(model) != plan.architecture:
        raise Mismatch("the plan was made for a model of another shape")
    family, layers = family_of(model.config), decoder_layers(model)
    sliced = [_kept_values(layers[i], family, plan, i, weights or {}) for i in range(len(layers))]
    narrow_layers_(model, [(w.num_heads, w.num_kv_heads, w.num_channels) for w in plan.all_widths()])
    for layer, values in zip(layers, sliced, strict=True):
        for path, value in values.items():
            module, _, attribute = path.rpartition(".")
            setattr(layer.get_submodule(module), attribute, nn.Parameter(value))
        values.clear()
    _delete_empty_layers_(model, plan)
    _describe_(model, plan)
    return model


def _kept_values(layer: nn.Module, family: Family, plan: Plan, index: int, weights: Weights) -> dict[str, torch.Tensor]:
    """The kept rows and columns of one layer's matrices, by parameter path; whole matrices are left alone."""
    values: dict[str, torch.Tensor] = {}
    widths, dense = plan.all_widths()[index], plan.architecture.layers[index]
    if widths.num_heads:
        query = out_columns(plan, index, "attention")
        key_value = _rows_of(plan.units(index, "kv_groups"), plan.architecture.head_dim)
        if widths.num_heads < dense.num_heads:
            values |= _rows(layer, family.query, query)
        if widths.num_kv_heads < dense.num_kv_heads:
            values |= _rows(layer, family.key, key_value) | _rows(layer, family.value, key_value)
        values |= _columns(layer, family.attention_out, query, weights.get(f"layers.{index}.attention"))
    if widths.num_channels:
        channels = out_columns(plan, index, "ffn")
        if widths.num_channels < dense.num_channels:
            for path in family.ffn_in:
                values |= _rows(layer, path, channels)
        values |= _columns(layer, family.ffn_out, channels, weights.get(f"layers.{index}.ffn"))
    return values


def _rows(layer: nn.Module, path: str, rows: torch.Tensor) -> dict[str, torch.Tensor]:
    return {f"{path}.{name}": p.detach()[rows] for name, p in layer.get_submodule(path).named_parameters()}


def _columns(
    layer: nn.Module, path: str, columns: torch.Tensor, weight: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    out = layer.get_submodule(path)
    assert isinstance(out, nn.Linear)
    if weight is None and len(columns) == out.in_features:
        return {}
    kept = out.weight.detach()[:, columns] if weight is None else weight.to(out.weight.dtype)
    # A narrowed matrix is a new module: its bias has to come along.
    bias = {} if out.bias is None else {f"{path}.bias": out.bias.detach()}
    return {f"{path}.weight": kept.contiguous(), **bias}


def _delete_empty_layers_(model: PreTrainedModel, plan: Plan) -> None:
    family = family_of(model.config)
    layers = decoder_layers(model)
    kept = [i for i, widths in enumerate(plan.all_widths()) if not widths.is_empty]
    model.set_submodule(family.layers, nn.ModuleList(layers[i] for i in kept))
    model.config.num_hidden_layers = len(kept)
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [model.config.layer_types[i] for i in kept]


def _describe_(model: PreTrainedModel, plan: Plan) -> None:
    """Make class and config say what the tensors are: a stock model where the stock class can hold it."""
    config, layers = model.config, plan.pruned_architecture().layers
    if hasattr(config, "max_window_layers"):
        config.max_window_layers = min(config.max_window_layers, len(layers))
    stock = _stock_config(config, plan) if len(set(layers)) == 1 else None
    if stock is not None:
        model.config = stock
        return
    config.layer_widths = [[w.num_heads, w.num_kv_heads, w.num_channels] for w in layers]
    model.__class__ = PRUNED_CLASSES[config.model_type]
    config.architectures = [model.__class__.__name__]


def _stock_config(config: PreTrainedConfig, plan: Plan) -> PreTrainedConfig | None:
    """The family's own config for equal widths; None where its class cannot hold them."""
    widths = plan.pruned_architecture().layers[0]
    if widths.num_heads == 0 or widths.num_channels == 0:
        return None
    sizes = {"num_attention_heads": widths.num_heads}
    if config.model_type == "opt":  # derives head_dim from hidden_size // heads, so it cannot lose heads
        if widths.num_heads * plan.architecture.head_dim != config.hidden_size:
            return None
        sizes |= {"ffn_dim": widths.num_channels}
    else:
        sizes |= {"num_key_value_heads": widths.num_kv_heads, "intermediate_size": widths.num_channels}
        sizes |= {"head_dim": plan.architecture.head_dim}
    try:
        return type(config).from_dict(config.to_dict() | sizes)
    except StrictDataclassError:  # Llama demands that the heads divide the hidden size
        return None

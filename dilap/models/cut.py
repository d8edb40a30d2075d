"""Apply a plan physically: the same values in smaller matrices."""

from collections.abc import Mapping
from types import MappingProxyType

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from dilap.core.errors import Mismatch
from dilap.core.plan import Plan
from dilap.models.anatomy import architecture_of, decoder_layers, family_of
from dilap.models.modeling_dilap import PRUNED_CLASSES, Family, add_output_biases_, linear_at, narrow_layers_

# New values of a dense model's parameters, by their names: in the dense shape, or cut to a plan already. An output
# projection's bias may be among them where the dense model has none.
Parameters = Mapping[str, torch.Tensor]
_NONE: Parameters = MappingProxyType({})


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
def shrink_(model: PreTrainedModel, plan: Plan, *, parameters: Parameters = _NONE) -> PreTrainedModel:
    """Cut `model` in place to the units that `plan` keeps, one layer at a time; returns it.

    `parameters` replaces values of decoder layers; what belongs to removed units is cut off. Raises Mismatch when the
    plan is for another shape or a parameter is unknown.
    """
    if architecture_of(model) != plan.architecture:
        raise Mismatch("the plan was made for a model of another shape")
    family, layers = family_of(model.config), decoder_layers(model)
    _add_missing_biases_(model, family, parameters)
    own, prefix = dict(model.named_parameters()), f"{family.layers}."
    for name in parameters:
        if name not in own or not name.startswith(prefix):
            raise Mismatch(f"there is no parameter {name!r} in the decoder layers of this model")
    cut = []
    for index, layer in enumerate(layers):
        start = f"{prefix}{index}."
        new = {name.removeprefix(start): value for name, value in parameters.items() if name.startswith(start)}
        cut.append(_cut_values(layer, _cuts(family, plan, index), new))
    narrow_layers_(model, [(w.num_heads, w.num_kv_heads, w.num_channels) for w in plan.all_widths()])
    for layer, values in zip(layers, cut, strict=True):
        left = dict(layer.named_parameters())
        for path, value in values.items():
            if path in left:  # not where its sublayer is gone
                module, _, attribute = path.rpartition(".")
                setattr(layer.get_submodule(module), attribute, nn.Parameter(value.to(left[path].dtype)))
        values.clear()
    _delete_empty_layers_(model, plan)
    _describe_(model, plan)
    return model


def _add_missing_biases_(model: PreTrainedModel, family: Family, parameters: Parameters) -> None:
    own, biases = dict(model.named_parameters()), (f".{family.attention_out}.bias", f".{family.ffn_out}.bias")
    if any(name.endswith(biases) and name not in own for name in parameters):
        add_output_biases_(model)


def _cuts(family: Family, plan: Plan, index: int) -> dict[str, tuple[int, torch.Tensor]]:
    """For every matrix that a layer keeps: the dimension that is cut, and the indices that stay."""
    widths = plan.all_widths()[index]
    cuts: dict[str, tuple[int, torch.Tensor]] = {}
    if widths.num_heads:
        query = out_columns(plan, index, "attention")
        key_value = _rows_of(plan.units(index, "kv_groups"), plan.architecture.head_dim)
        cuts |= {family.query: (0, query), family.key: (0, key_value), family.value: (0, key_value)}
        cuts |= {family.attention_out: (1, query)}
    if widths.num_channels:
        channels = out_columns(plan, index, "ffn")
        cuts |= dict.fromkeys(family.ffn_in, (0, channels)) | {family.ffn_out: (1, channels)}
    return cuts


def _cut_values(
    layer: nn.Module, cuts: Mapping[str, tuple[int, torch.Tensor]], new: Parameters
) -> dict[str, torch.Tensor]:
    """The new and the cut parameters of one layer, by path; what stays as it was is left out."""
    values = dict(new)
    for path, (dim, kept) in cuts.items():
        matrix = linear_at(layer, path)
        assert matrix is not None
        is_narrowed = len(kept) < matrix.weight.shape[dim]  # then it will be a new module: its bias has to come along
        for name, parameter in matrix.named_parameters():
            value = new.get(f"{path}.{name}", parameter.detach())
            if is_narrowed and dim < value.dim() and value.shape[dim] != len(kept):
                value = value.index_select(dim, kept)
            if is_narrowed or f"{path}.{name}" in new:
                values[f"{path}.{name}"] = value.contiguous()
    return values


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
    if widths.num_heads == 0 or widths.num_channels == 0 or getattr(config, "output_biases", False):
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

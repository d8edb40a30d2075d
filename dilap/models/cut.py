"""Apply a plan to a model: the values that stay are put into smaller matrices."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from dilap.core.errors import Mismatch
from dilap.core.groups import indices_kept
from dilap.core.plan import Plan
from dilap.models.anatomy import architecture_of, blocks_of, decoder_layers
from dilap.models.convolutional.narrowing import set_tensor_
from dilap.models.families import family_of
from dilap.models.families.family import has_tied_head
from dilap.models.matrices import embedding_name, head_name
from dilap.models.modeling_dilap import add_output_biases_, narrow_layers_, number_layers_, pruned_class

# New values of a dense model's parameters, by their names, in the dense shape or already cut to a plan. An output
# projection's bias may be among them even where the dense model has none.
Parameters = Mapping[str, torch.Tensor]
_NONE: Parameters = MappingProxyType({})
_BY_LAYER = ("layer_types", "no_rope_layers")  # entries of configs that are lists with a value for every layer


@torch.no_grad()
def shrink_(model: PreTrainedModel, plan: Plan, *, parameters: Parameters = _NONE) -> PreTrainedModel:
    """Cut `model` in place to the units that `plan` keeps, one layer at a time, and return it.

    `parameters` are new values of decoder layers, of which what belongs to removed units is cut off, and of embedding
    and head, which are no longer tied where the head has values of its own. Raises Mismatch when the plan is for
    another shape or a parameter is unknown.
    """
    if architecture_of(model) != plan.architecture:
        raise Mismatch("the plan was made for a model of another shape")
    _add_missing_biases_(model, parameters)
    _require_known(model, parameters)
    _replace_ends_(model, parameters)
    prefix = f"{family_of(model.config).layers}."
    layers, blocks = decoder_layers(model), blocks_of(model)
    for index, layer in enumerate(layers):
        kept = [one for one in blocks if one.layer == index and plan.kept[one.main.name]]
        groups = [group for block in kept for group in block.groups]
        start = f"{prefix}{index}."
        new = {name.removeprefix(start): value for name, value in parameters.items() if name.startswith(start)}
        cut_(layer, indices_kept(groups, plan.kept), prefix=start, values=new)
    widths = [(w.num_heads, w.num_kv_heads, w.num_channels) for w in plan.all_widths()]
    narrow_layers_(model, widths, family_of(model.config))
    _delete_empty_layers_(model, plan)
    _describe_(model, plan)
    return model


def cut_(
    layer: nn.Module,
    kept: Mapping[tuple[str, int], NDArray[np.int64]],
    *,
    prefix: str = "",
    values: Parameters = _NONE,
    requires_grad: bool = True,
) -> None:
    """Give a layer new, narrower tensors that have only the indices `kept` of each tensor and axis.

    Names in `kept` begin with `prefix`, which the layer's own names lack. `values` are new values by the layer's own
    names; they may be in the full shape or in the narrower one. All other tensors stay as they are. Nothing is written
    into the old tensors, which another model may hold.
    """
    axes: dict[str, dict[int, torch.Tensor]] = {}
    for (tensor, axis), indices in kept.items():
        axes.setdefault(tensor.removeprefix(prefix), {})[axis] = torch.from_numpy(indices)
    for name in {**axes, **values}:
        path, _, attribute = name.rpartition(".")
        module = layer.get_submodule(path)
        own = getattr(module, attribute)
        value: torch.Tensor = values[name] if name in values else own.detach()
        for axis, stay in axes.get(name, {}).items():
            if value.shape[axis] != len(stay):
                value = value.index_select(axis, stay.to(value.device))
        if name in values or value.shape != own.shape:
            value = value.to(own).contiguous()
            set_tensor_(module, attribute, value, requires_grad=requires_grad and own.requires_grad)


def _require_known(model: PreTrainedModel, parameters: Parameters) -> None:
    """Raise Mismatch for a parameter that is neither embedding nor head and that the decoder layers do not have."""
    own, prefix = dict(model.named_parameters()), f"{family_of(model.config).layers}."
    ends = embedding_name(model), head_name(model)
    for name in parameters:
        if name not in ends and (name not in own or not name.startswith(prefix)):
            raise Mismatch(f"there is no parameter {name!r} in the decoder layers of this model")


def _replace_ends_(model: PreTrainedModel, parameters: Parameters) -> None:
    """Give embedding and head their new values; a tied head has those of the embedding unless it has its own."""
    embedding, head, is_tied = model.get_input_embeddings(), model.get_output_embeddings(), has_tied_head(model)
    names = {embedding_name(model): embedding, head_name(model): head}
    for name in set(names) & set(parameters):
        own = names[name].weight
        names[name].weight = nn.Parameter(parameters[name].to(own), requires_grad=own.requires_grad)
    if is_tied and head_name(model) in parameters:
        model.config.tie_word_embeddings = False
    elif is_tied:
        head.weight = embedding.weight


def _add_missing_biases_(model: PreTrainedModel, parameters: Parameters) -> None:
    family, own = family_of(model.config), dict(model.named_parameters())
    biases = tuple(f".{family.output_of(kind)}.bias" for kind in family.kinds)
    if any(name.endswith(biases) and name not in own for name in parameters):
        add_output_biases_(model, family)


def _delete_empty_layers_(model: PreTrainedModel, plan: Plan) -> None:
    family = family_of(model.config)
    layers = decoder_layers(model)
    kept = [i for i, widths in enumerate(plan.all_widths()) if not widths.is_empty]
    model.set_submodule(family.layers, nn.ModuleList(layers[i] for i in kept))
    number_layers_(model, family)
    model.config.num_hidden_layers = len(kept)
    for name in _BY_LAYER:
        if values := getattr(model.config, name, None):
            setattr(model.config, name, [values[i] for i in kept])


def _describe_(model: PreTrainedModel, plan: Plan) -> None:
    """Set class and config to what the tensors are now: those of a stock model where the stock class can hold them."""
    config, layers = model.config, plan.pruned_architecture().layers
    if hasattr(config, "max_window_layers"):
        config.max_window_layers = min(config.max_window_layers, len(layers))
    stock = _stock_config(config, plan) if len(set(layers)) == 1 else None
    if stock is not None:
        model.config = stock
        model.__class__ = _stock_class(type(model))
        return
    config.layer_widths = [[w.num_heads, w.num_kv_heads, w.num_channels] for w in layers]
    config.module_paths = family_of(config).module_paths()
    model.__class__ = pruned_class(_stock_class(type(model)))
    config.architectures = [model.__class__.__name__]


def _stock_class(kind: Any) -> Any:
    """Return the transformers class that `kind` is or is derived from."""
    return next(one for one in kind.__mro__ if one.__module__.startswith("transformers."))


def _stock_config(config: PreTrainedConfig, plan: Plan) -> PreTrainedConfig | None:
    """Return the family's own config if it can say the plan's equal widths; None where its class cannot hold them."""
    widths = plan.pruned_architecture().layers[0]
    if widths.num_heads == 0 or widths.num_channels == 0 or getattr(config, "output_biases", False):
        return None
    sizes = family_of(config).stock_sizes(widths, plan.architecture)
    try:
        return None if sizes is None else type(config).from_dict(_without_own_widths(config) | sizes)
    except StrictDataclassError:  # Llama demands that the heads divide the hidden size
        return None


def _without_own_widths(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the config's entries without those that give every layer widths of its own."""
    document: dict[str, Any] = config.to_dict()
    if "layer_widths" in document:
        for name in ("layer_widths", "module_paths", "auto_map", "architectures"):
            document.pop(name, None)
    return document

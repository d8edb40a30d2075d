"""Decoder-only models whose layers have their own widths; needs torch and transformers, nothing else.

This file is also copied beside every checkpoint that stock classes cannot hold, so that

    AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)

works where DiLAP is not installed, with transformers 4.57 or later. `config.layer_widths` has one [num_heads,
num_kv_heads, num_channels] per layer, where the channels are those of all experts together; zeros remove the sublayer.
`config.output_biases` gives every output projection a bias, even where the family has none: it holds the mean output of
removed units. `config.module_paths` says where a family keeps its parts, if not where Llama does. Everything else is
the stock model: `PrunedLlamaForCausalLM` is `LlamaForCausalLM` with narrower layers, and so for every stock class.
"""

import functools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PretrainedConfig as PreTrainedConfig  # its name in transformers 4; 5 has both
from transformers import PreTrainedModel
from transformers.utils.versions import require_version

# Older versions have other attention modules: three results, a count of heads of its own. 4.57 and 5 compute the same.
require_version("transformers>=4.57", "This checkpoint's layers have widths of their own: pip install -U transformers")

_PREFIX = "Pruned"  # stands before the stock class's name
# Stands for the kind of attention in a checkpoint's config. Stock classes know no such kind and say so, in these words;
# otherwise they would only find that tensors have other sizes than theirs.
NEEDS_CODE = "pass trust_remote_code=True, because the layers of this model have widths of their own"


@dataclass(frozen=True, kw_only=True)
class Paths:
    """Where a model keeps its parts: `layers` is a dotted path in the model, all others are paths in a layer.

    `ffn` is the path of the feed-forward module, None where its matrices lie in the layer itself. Norms stand before a
    sublayer, behind it (between its output and the residual stream), or both; None where there is none. `query`, `key`
    and `value` with the same path are one matrix that holds them one after another; so are entries of `ffn_in`.
    `experts` and `router` are the paths of the experts and of what sends tokens to them, None where every token uses
    all channels.
    """

    layers: str = "model.layers"
    attention: str = "self_attn"
    query: str = "self_attn.q_proj"
    key: str = "self_attn.k_proj"
    value: str = "self_attn.v_proj"
    attention_out: str = "self_attn.o_proj"
    attention_norm: str | None = "input_layernorm"
    attention_norm_behind: str | None = None
    ffn: str | None = "mlp"
    ffn_in: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    ffn_out: str = "mlp.down_proj"
    ffn_norm: str | None = "post_attention_layernorm"
    ffn_norm_behind: str | None = None
    experts: str | None = None
    router: str | None = None


def paths_of(config: PreTrainedConfig) -> Paths:
    """Return where the model of `config` keeps its parts."""
    given: dict[str, Any] = dict(getattr(config, "module_paths", None) or {})
    if "ffn_in" in given:
        given["ffn_in"] = tuple(given["ffn_in"])  # a list in JSON
    return Paths(**given)


class NoAttention(nn.Module):
    """Takes the place of a removed attention sublayer, and adds nothing to the residual stream.

    It puts one number a token into its layer's entry of a KV cache. A cache takes its length from the first entry, or
    the first of a kind of layers, and the kind of an entry from the layer of that index.
    """

    is_sliding = False  # layers of Gemma 3 ask their attention module, in transformers 4

    def __init__(self) -> None:
        super().__init__()
        self.layer_idx: int | None = None  # as other attention modules call it

    def forward(
        self, hidden_states: torch.Tensor, past_key_values: Any = None, **_: object
    ) -> tuple[torch.Tensor, None]:
        if past_key_values is not None and self.layer_idx is not None:
            nothing = torch.zeros_like(hidden_states[:, None, :, :1])
            past_key_values.update(nothing, nothing, self.layer_idx)
        return torch.zeros_like(hidden_states), None


class NoFeedForward(nn.Module):
    """Takes the place of a removed feed-forward network, and adds nothing to the residual stream."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(hidden_states)


def narrow_layers_(model: PreTrainedModel, layer_widths: Sequence[Sequence[int]], paths: Paths) -> None:
    """Give every decoder layer its own widths; resized matrices are new ones that do not have their values yet."""
    layers = model.get_submodule(paths.layers)
    if len(layer_widths) != len(layers):
        raise ValueError(f"layer_widths has {len(layer_widths)} entries, the model {len(layers)} layers")
    for layer, (num_heads, num_kv_heads, num_channels) in zip(layers, layer_widths, strict=True):
        _narrow_attention_(layer, paths, num_heads, num_kv_heads)
        _narrow_ffn_(layer, paths, num_channels)
    number_layers_(model, paths)


def number_layers_(model: PreTrainedModel, paths: Paths) -> None:
    """Tell every attention module the index of its layer, which is that of its entry in a KV cache."""
    for index, layer in enumerate(model.get_submodule(paths.layers)):
        layer.get_submodule(paths.attention).layer_idx = index


def add_output_biases_(model: PreTrainedModel, paths: Paths) -> None:
    """Give every output projection without a bias a bias of zeros."""
    for layer in model.get_submodule(paths.layers):
        for path in (paths.attention_out, paths.ffn_out):
            out = linear_at(layer, path)
            if out is not None and out.bias is None:
                out.bias = nn.Parameter(torch.zeros_like(out.weight[:, 0]), requires_grad=out.weight.requires_grad)
    model.config.output_biases = True


def linear_at(layer: nn.Module, path: str) -> nn.Linear | None:
    """Return the matrix at `path`, None where its sublayer was removed."""
    try:
        module = layer.get_submodule(path)
    except AttributeError:
        return None
    return module if isinstance(module, nn.Linear) else None


def set_heads_(attention: Any, num_heads: int, num_kv_heads: int) -> None:
    """Tell an attention module how many heads its matrices have."""
    attention.num_key_value_groups = num_heads // num_kv_heads
    for name, count in (("num_heads", num_heads), ("num_key_value_heads", num_kv_heads)):
        if hasattr(attention, name):
            setattr(attention, name, count)
    attention.config = _LayerConfig(attention.config, num_attention_heads=num_heads)


class _LayerConfig:
    """The config of a model with the number of heads of one layer, which Phi-3's attention divides its matrix by."""

    def __init__(self, config: Any, *, num_attention_heads: int) -> None:
        self.of_model: Any = config.of_model if isinstance(config, _LayerConfig) else config
        self.num_attention_heads = num_attention_heads

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # copying asks for these before there is a config
            raise AttributeError(name)
        return getattr(self.of_model, name)


def _narrow_attention_(layer: nn.Module, paths: Paths, num_heads: int, num_kv_heads: int) -> None:
    if num_heads == 0:
        layer.set_submodule(paths.attention, NoAttention())
        _drop_norms_(layer, paths.attention_norm, paths.attention_norm_behind)
        return
    attention: Any = layer.get_submodule(paths.attention)
    set_heads_(attention, num_heads, num_kv_heads)
    heads: Counter[str] = Counter()
    for path, count in ((paths.query, num_heads), (paths.key, num_kv_heads), (paths.value, num_kv_heads)):
        heads[path] += count
    for path, count in heads.items():
        _resize_(layer, path, out_features=count * attention.head_dim)
    _resize_(layer, paths.attention_out, in_features=num_heads * attention.head_dim)


def _narrow_ffn_(layer: nn.Module, paths: Paths, num_channels: int) -> None:
    if num_channels == 0:
        if paths.ffn is None:
            for path in paths.ffn_in:
                layer.set_submodule(path, nn.Identity())
        layer.set_submodule(paths.ffn or paths.ffn_out, NoFeedForward())
        _drop_norms_(layer, paths.ffn_norm, paths.ffn_norm_behind)
        return
    if paths.experts is not None:
        _narrow_experts_(layer, paths, num_channels)
        return
    for path, count in Counter(paths.ffn_in).items():
        _resize_(layer, path, out_features=count * num_channels)
    _resize_(layer, paths.ffn_out, in_features=num_channels)


def _narrow_experts_(layer: nn.Module, paths: Paths, num_channels: int) -> None:
    experts: Any = layer.get_submodule(paths.experts or "")
    if isinstance(experts, nn.ModuleList):  # transformers 4: a module for each expert, and a router that is a matrix
        first: Any = experts[0]
        num_experts = num_channels // first.down_proj.in_features
        layer.set_submodule(paths.experts or "", experts[:num_experts])
        _resize_(layer, paths.router or "", out_features=num_experts)
        network: Any = layer.get_submodule(paths.ffn or "")
        network.num_experts = num_experts
        return
    num_experts = num_channels // experts.down_proj.shape[2]
    for path in (paths.experts, paths.router):
        module: Any = layer.get_submodule(path or "")
        for name, own in list(module.named_parameters(recurse=False)):
            if len(own) != num_experts:  # the experts are the first axis of every tensor
                empty = own.new_empty(num_experts, *own.shape[1:])
                setattr(module, name, nn.Parameter(empty, requires_grad=own.requires_grad))
        module.num_experts = num_experts


def _drop_norms_(layer: nn.Module, *paths: str | None) -> None:
    """Remove the norms of a removed sublayer, unless they normalise the residual stream itself (OPT-350m)."""
    if getattr(layer, "do_layer_norm_before", True):
        for path in filter(None, paths):
            layer.set_submodule(path, nn.Identity())


def _resize_(layer: nn.Module, path: str, *, in_features: int | None = None, out_features: int | None = None) -> None:
    old = layer.get_submodule(path)
    assert isinstance(old, nn.Linear)
    shape = (in_features or old.in_features, out_features or old.out_features)
    if shape != (old.in_features, old.out_features):
        new = nn.Linear(*shape, bias=old.bias is not None, device=old.weight.device, dtype=old.weight.dtype)
        layer.set_submodule(path, new)


class _OwnWidths(PreTrainedModel):  # type: ignore[misc]
    """Builds the stock model, then narrows its layers as the config says."""

    def __init__(self, config: PreTrainedConfig) -> None:
        if config._attn_implementation == NEEDS_CODE:
            config._attn_implementation = None
        super().__init__(config)
        if getattr(config, "layer_widths", None):
            narrow_layers_(self, config.layer_widths, paths_of(config))
        if getattr(config, "output_biases", False):
            add_output_biases_(self, paths_of(config))


@functools.cache
@functools.cache  # another process is sent a model by the name of its class
def pruned_class(stock: Any) -> Any:
    """Return the class that builds the models of the class `stock` with own widths in every layer."""
    made: Any = type(f"{_PREFIX}{stock.__name__}", (_OwnWidths, stock), {"__module__": __name__})
    made.register_for_auto_class("AutoModelForCausalLM")
    return made


def __getattr__(name: str) -> Any:
    """Make the pruned class that a checkpoint's config asks for by its name."""
    stock = getattr(transformers, name.removeprefix(_PREFIX), None) if name.startswith(_PREFIX) else None
    if stock is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return pruned_class(stock)

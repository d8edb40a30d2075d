"""A family of decoder models: where its parts are, which units they have, and how they join the residual stream."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from math import prod
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from dilap.core.errors import Unsupported
from dilap.core.groups import Block, Group, Kept, Member
from dilap.core.numerics import LayerNumerics, Numerics, Rotary
from dilap.core.shape import Architecture, LayerWidths
from dilap.models.modeling_dilap import NoAttention, NoFeedForward, Paths, linear_at, set_heads_

GATE, UP = "gate_proj", "up_proj"  # names of the halves of experts' fused tensor, as exporters get them
_ROTARY_KINDS = ("default", "linear", "llama3", "yarn")  # whose frequencies are the same for every length of text
_FEWEST_TOKENS = 8  # an exported program is traced with five


@dataclass(frozen=True, kw_only=True)
class Family(Paths):
    """A family of models, by default built like Llama; a family that differs only in its name only has to name it.

    `name` is the `model_type` of its configs. Paths beyond those of a layer's matrices: `embeddings`, `final_norm` and
    `rotary` in the model, `query_norm` and `key_norm` in a layer. `position_offset` is how many rows of a learned table
    of positions, at `positions` in the model, come before that of position 0. `activation` is the entry of the config
    that names the activation. `mixes_attention` says that layers may attend to different numbers of tokens, and that
    exporters are told how many each one sees; `slides` that all layers see a window where the config does not say
    which do. `gguf_keys` are those keys of a GGUF file, without its architecture's name, that `read_gguf_` reads, and
    `gguf_tensors` the tensors.
    """

    name: str
    embeddings: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    rotary: str = "model.rotary_emb"
    query_norm: str = "self_attn.q_norm"
    key_norm: str = "self_attn.k_norm"
    positions: str = ""
    position_offset: int = 0
    activation: str = "hidden_act"
    mixes_attention: bool = False
    slides: bool = False
    gguf_keys: tuple[str, ...] = ()
    gguf_tensors: tuple[str, ...] = ()

    def module_paths(self) -> dict[str, Any]:
        """Return the paths that differ from Llama's, as a checkpoint's config keeps them."""
        own = {field.name: getattr(self, field.name) for field in fields(Paths)}
        return {name: path for name, path in own.items() if path != getattr(Paths(), name)}

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of sublayers that a layer has, in the order in which they are computed."""
        return ("attention", "ffn")

    @property
    def matrices(self) -> tuple[str, ...]:
        """Paths of all matrices of a layer."""
        return tuple(path for kind in self.kinds for path in (*self.inputs_of(kind), self.output_of(kind)))

    def ends_of(self, kind: str) -> tuple[str, str]:
        """Paths of the modules whose input and output are those of a sublayer, its norm and residual left out."""
        if kind == "attention":
            return self.attention, self.attention
        return self.ffn or self.ffn_in[0], self.ffn or self.ffn_out

    def computed(self, layer: nn.Module, kind: str, *arguments: Any, **keywords: Any) -> Any:
        """Run a sublayer of `layer`, without its norm and residual, on what the first of `ends_of` is given."""
        first, last = self.ends_of(kind)
        if first == last:
            return layer.get_submodule(first)(*arguments, **keywords)
        raise NotImplementedError(f"the family {self.name} does not say how its {kind} is computed")

    def inputs_of(self, kind: str) -> tuple[str, ...]:
        """Return the paths of the matrices of an `attention` or `ffn` sublayer that read the residual stream."""
        return tuple(dict.fromkeys(self._parts_of(kind)))

    def _parts_of(self, kind: str) -> tuple[str, ...]:
        """Return the paths of query, key and value, or of `ffn_in`; fused ones have the same."""
        return (self.query, self.key, self.value) if kind == "attention" else self.ffn_in

    def output_of(self, kind: str) -> str:
        """Return the path of the matrix of a sublayer that writes into the residual stream."""
        return self.attention_out if kind == "attention" else self.ffn_out

    def absent(self, kind: str) -> dict[str, nn.Module]:
        """Return the modules, by path, to put into a layer so that its sublayer of that kind adds nothing."""
        if kind == "attention":
            return {self.attention: NoAttention()}
        if self.ffn is None:
            return {path: nn.Identity() for path in self.ffn_in} | {self.ffn_out: NoFeedForward()}
        return {self.ffn: NoFeedForward()}

    def residual_scale(self, config: PreTrainedConfig) -> float:  # noqa: ARG002
        """Return the factor of a sublayer's output where it is added to the residual stream.

        Raises Unsupported where the two are joined by more than an addition, such as a norm behind the sublayer.
        """
        return 1.0

    def logits_scale(self, config: PreTrainedConfig) -> float:  # noqa: ARG002
        """Return the factor of the product of the final hidden states and the head that makes it the logits."""
        return 1.0

    def read_gguf_(self, config: PreTrainedConfig, entries: Mapping[str, Any]) -> None:
        """Give a config what transformers passes over among the entries of a GGUF file, or takes for another value.

        `entries` are its keys, without the architecture's name, and the values of its tensors in `gguf_tensors`.
        """

    def logits_softcap(self, config: PreTrainedConfig) -> float | None:  # noqa: ARG002
        """Return the soft cap c of the logits, with which each x of them becomes c tanh(x / c); None without one."""
        return None

    def window(self, config: PreTrainedConfig) -> int | None:
        """Return the sliding window of all layers, which exported attention does not have; None without one."""
        kinds = getattr(config, "layer_types", None) or ()
        slides = "sliding_attention" in kinds or (not kinds and self.slides)
        return getattr(config, "sliding_window", None) if slides and not self.mixes_attention else None

    def short_context(self, config: PreTrainedConfig) -> int | None:  # noqa: ARG002
        """Return up to how many tokens a text has the exported rotary embedding; None where all texts have it."""
        return None

    def max_tokens(self, config: PreTrainedConfig) -> int:
        """Return how many tokens an artifact may hold.

        The window and the longest text with the exported rotary embedding limit it as the number of positions does.
        Raises Unsupported for a limit that is too small to export and check a model with.
        """
        positions: int = config.max_position_embeddings
        holds = min(positions, self.window(config) or positions, self.short_context(config) or positions)
        if holds < _FEWEST_TOKENS:
            raise Unsupported(
                f"the model sees {holds} tokens at once (max_position_embeddings, sliding_window and "
                f"original_max_position_embeddings of its config); fewer than {_FEWEST_TOKENS} cannot be exported and "
                "checked"
            )
        return holds

    def exported(self, model: PreTrainedModel) -> Mapping[str, torch.Tensor]:
        """Return the tensors to export, by their names in `model`.

        A model without factors beside its tensors computes with them what `model` computes. By default they are its
        own, not copied.
        """
        tensors: dict[str, torch.Tensor] = model.state_dict()
        return tensors

    @property
    def exported_paths(self) -> "Family":
        """The family whose paths are those of the `exported` tensors, in which no matrices are fused."""
        return self

    def norm_behind(self, kind: str) -> str | None:
        """Return the path of the norm between a sublayer's output and the residual stream, None without one."""
        return self.attention_norm_behind if kind == "attention" else self.ffn_norm_behind

    def stock_sizes(self, widths: LayerWidths, architecture: Architecture) -> dict[str, int] | None:
        """Return config entries of a stock model with these widths in all layers; None where its class has none."""
        return {
            "num_attention_heads": widths.num_heads,
            "num_key_value_heads": widths.num_kv_heads,
            "intermediate_size": widths.num_channels,
            "head_dim": architecture.head_dim,
        }

    def architecture(self, model: PreTrainedModel) -> Architecture:
        """Return the shape of a loaded model, its widths read from the tensors themselves. Raises Unsupported."""
        config, head_dim = model.config, head_dim_of(model.config)
        layers = list(model.get_submodule(self.layers))
        paths = (self.query, self.attention_out, self.ffn_in[0], self.ffn_out)
        has_bias = {path: _has_bias(layers, path) for path in paths}
        if config.hidden_size != model.get_input_embeddings().weight.shape[1]:
            raise Unsupported("embeddings of another width than the hidden size (OPT-350m) cannot be pruned yet")
        return Architecture(
            family=self.name,
            hidden_size=config.hidden_size,
            head_dim=head_dim,
            vocab_size=model.get_input_embeddings().weight.shape[0],
            tied_embeddings=has_tied_head(model),
            ffn_matrices=len(self.ffn_in) + 1,
            norm_vectors=_num_vectors(model, self.final_norm),
            sublayer_norms=len([path for path in (self.ffn_norm, self.ffn_norm_behind) if path]),
            qkv_bias=has_bias[self.query],
            out_bias=has_bias[self.attention_out],
            ffn_bias=has_bias[self.ffn_in[0]],
            ffn_out_bias=has_bias[self.ffn_out],
            qk_norm=any(name.endswith(f"{self.query_norm}.weight") for name, _ in model.named_parameters()),
            num_positions=len(model.get_parameter(f"{self.positions}.weight")) if self.positions else 0,
            layers=tuple(self._widths(layer, head_dim) for layer in layers),
        )

    def numerics(self, model: PreTrainedModel) -> Numerics:
        """Return what a loaded model computes beside its shapes. Raises Unsupported for what no exporter computes."""
        config = model.config
        return Numerics(
            context_length=self.max_tokens(config),
            norm_eps=float(config.rms_norm_eps),  # an integer in some configs
            activation=getattr(config, self.activation),
            attention_scale=head_dim_of(config) ** -0.5,
            layers=self.layer_numerics(model),
        )

    def layer_numerics(self, model: PreTrainedModel) -> tuple[LayerNumerics, ...]:
        """Return what the attention of every layer computes. Raises Unsupported for what no exporter computes."""
        return (LayerNumerics(rotary=rotary_of(model, self.rotary)),) * len(list(model.get_submodule(self.layers)))

    def stand_in_numerics(self, architecture: Architecture) -> Numerics:
        """Return usual values of the family, for a model with random weights that is only timed."""
        layers = (LayerNumerics(rotary=plain_rotary(architecture.head_dim)),) * len(architecture.layers)
        return Numerics(
            context_length=4096,
            norm_eps=1e-5,
            activation="silu",
            attention_scale=architecture.head_dim**-0.5,
            layers=layers,
        )

    def _widths(self, layer: nn.Module, head_dim: int) -> LayerWidths:
        heads, kv_heads, channels = 0, 0, 0
        if (mixed := linear_at(layer, self.attention_out)) is not None:
            inputs = (linear_at(layer, path) for path in self.inputs_of("attention"))
            rows = sum(matrix.out_features for matrix in inputs if matrix is not None)
            heads = mixed.in_features // head_dim
            kv_heads = (rows // head_dim - heads) // 2  # keys and values are what queries leave
        if (out := linear_at(layer, self.ffn_out)) is not None:
            channels = out.in_features
        return LayerWidths(num_heads=heads, num_kv_heads=kv_heads, num_channels=channels)

    def blocks(self, model: PreTrainedModel) -> tuple[Block, ...]:
        """Return the sublayers of a loaded model, with all tensors in which their units lie."""
        architecture, layers = self.architecture(model), model.get_submodule(self.layers)
        assert isinstance(layers, nn.ModuleList)
        return tuple(self._with_members(block, layers[block.layer], architecture) for block in architecture.blocks)

    def _with_members(self, block: Block, layer: nn.Module, architecture: Architecture) -> Block:
        prefix = f"{self.layers}.{block.layer}"
        whole, parts = _grids(block, architecture.head_dim, len(self._parts_of(block.kind)))
        groups: list[Group] = []
        for dimension, group in enumerate(block.groups):
            members: list[Member] = []
            ends: Counter[str] = Counter()  # of the parts so far, by the path of their matrix
            for path, grid in zip(self._parts_of(block.kind), parts, strict=True):
                if dimension == 0 or grid == whole:  # all query heads of a KV head read the same keys and values
                    own = _members(layer, prefix, path, grid, dimension, is_output=False)
                    members += (replace(one, offset=ends[path]) for one in own)
                ends[path] += prod(grid)
            members += _members(layer, prefix, self.output_of(block.kind), whole, dimension, is_output=True)
            groups.append(replace(group, members=tuple(members)))
        return Block(name=block.name, layer=block.layer, kind=block.kind, groups=tuple(groups))

    def tell_widths_(self, layer: nn.Module, block: Block, kept: Kept) -> None:
        """Make the modules of a cut layer compute with the widths that its tensors have now."""
        if block.kind == "attention":
            num_kv_heads, ratio = (len(kept[group.name]) for group in block.groups)
            set_heads_(layer.get_submodule(self.attention), num_kv_heads * ratio, num_kv_heads)


def has_tied_head(model: PreTrainedModel) -> bool:
    """Return whether the head is the embedding: what its tensors say, and not what its config does."""
    return bool(model.get_output_embeddings().weight is model.get_input_embeddings().weight)


def head_dim_of(config: PreTrainedConfig) -> int:
    """Return the number of channels of one head; heads * head_dim need not equal the hidden size."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _grids(block: Block, head_dim: int, num_parts: int) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
    """Return the grid of a block's output projection, and those of its `num_parts` matrices before it."""
    sizes = tuple(group.num_units for group in block.groups)
    if block.kind != "attention":
        return sizes, [sizes] * num_parts
    query, key = (*sizes, head_dim), (sizes[0], head_dim)
    return query, [query, key, key]


def _members(
    layer: nn.Module, prefix: str, path: str, grid: tuple[int, ...], dimension: int, *, is_output: bool
) -> Iterator[Member]:
    """Yield the axes on which units lie: the inputs of an output matrix, or the outputs and the bias of another one."""
    matrix = linear_at(layer, path)
    assert matrix is not None
    axis = 1 if is_output else 0
    yield Member(tensor=f"{prefix}.{path}.weight", axis=axis, grid=grid, dimension=dimension)
    if not is_output and matrix.bias is not None:
        yield Member(tensor=f"{prefix}.{path}.bias", axis=0, grid=grid, dimension=dimension)


def _has_bias(layers: list[nn.Module], path: str) -> bool:
    """Return whether the matrix at `path` has a bias, in the first layer where it was not removed."""
    found = (linear_at(layer, path) for layer in layers)
    first = next((module for module in found if module is not None), None)
    return first is not None and first.bias is not None


def _num_vectors(model: PreTrainedModel, path: str) -> int:
    """Number of vectors of the final norm at `path`; 0 for a model without one (OPT-350m)."""
    stack, _, name = path.rpartition(".")
    norm = getattr(model.get_submodule(stack), name)
    return 0 if norm is None else len(list(norm.parameters()))


@dataclass(frozen=True, kw_only=True)
class Rewritten(Mapping[str, torch.Tensor]):
    """The `tensors` by name, each as `rewrite` makes it from its name and itself when it is read."""

    tensors: Mapping[str, torch.Tensor]
    rewrite: Callable[[str, torch.Tensor], torch.Tensor]

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.rewrite(name, self.tensors[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def plain_rotary(head_dim: int, *, base: float = 10_000.0) -> Rotary:
    """Return the rotary embedding of heads of that size without scaling."""
    return Rotary(frequencies=tuple(base ** (-i / head_dim) for i in range(0, head_dim, 2)), base=base)


def rotary_of(model: PreTrainedModel, path: str, *, attention: str | None = None) -> Rotary:
    """Return the rotary embedding at `path`, that of one kind of `attention` where the model has several.

    Raises Unsupported for one that depends on the length of the text.
    """
    config, rope = model.config, model.config.rope_parameters
    # Made afresh, because the frequencies of a model in half precision are rounded.
    made: Any = type(model.get_submodule(path))(config)
    prefix = ""
    if attention is not None:
        rope, prefix = rope[attention], f"{attention}_"
    frequencies = tuple(getattr(made, f"{prefix}inv_freq").tolist())
    kind = rope.get("rope_type", "default")
    is_constant = kind in _ROTARY_KINDS or (kind == "longrope" and rope["short_factor"] == rope["long_factor"])
    if not is_constant or 2 * len(frequencies) != head_dim_of(config):
        raise Unsupported(
            f"rotary embedding {rope} cannot be exported yet; known, on whole heads: {', '.join(_ROTARY_KINDS)}"
        )
    magnitude = float(getattr(made, f"{prefix}attention_scaling"))
    return Rotary(frequencies=frequencies, magnitude=magnitude, kind=kind, base=float(rope["rope_theta"]))

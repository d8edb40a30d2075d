"""A family of decoders: where its parts are, which units they have, and how they join the residual stream."""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from dilap.core.errors import Unsupported
from dilap.core.groups import Block, Group, Kept, Member
from dilap.core.shape import Architecture, LayerWidths
from dilap.models.modeling_dilap import NoAttention, NoFeedForward, Paths, linear_at, set_heads_


@dataclass(frozen=True, kw_only=True)
class Family(Paths):
    """Llama and its like: a family that differs in nothing else needs a file with its name.

    `name` is the `model_type` of its configs.
    """

    name: str

    def module_paths(self) -> dict[str, Any]:
        """The paths that differ from Llama's, as a checkpoint's config keeps them."""
        own = {field.name: getattr(self, field.name) for field in fields(Paths)}
        return {name: path for name, path in own.items() if path != getattr(Paths(), name)}

    def inputs_of(self, kind: str) -> tuple[str, ...]:
        """The matrices of an `attention` or `ffn` sublayer that read the residual stream."""
        return (self.query, self.key, self.value) if kind == "attention" else self.ffn_in

    def output_of(self, kind: str) -> str:
        """The matrix of a sublayer that writes into the residual stream."""
        return self.attention_out if kind == "attention" else self.ffn_out

    def absent(self, kind: str) -> dict[str, nn.Module]:
        """What stands in a layer, by path, where a sublayer of that kind adds nothing to the stream."""
        if kind == "attention":
            return {self.attention: NoAttention()}
        if self.ffn is None:
            return {path: nn.Identity() for path in self.ffn_in} | {self.ffn_out: NoFeedForward()}
        return {self.ffn: NoFeedForward()}

    def residual_scale(self, config: PreTrainedConfig) -> float:  # noqa: ARG002
        """What a sublayer's output is multiplied by where it is added to the residual stream.

        Raises Unsupported where something else than an addition joins the two, a norm behind the sublayer for one.
        """
        return 1.0

    def stock_sizes(self, widths: LayerWidths, architecture: Architecture) -> dict[str, int] | None:
        """The config of a stock model whose layers all have these widths; None where its class cannot hold them."""
        return {
            "num_attention_heads": widths.num_heads,
            "num_key_value_heads": widths.num_kv_heads,
            "intermediate_size": widths.num_channels,
            "head_dim": architecture.head_dim,
        }

    def architecture(self, model: PreTrainedModel) -> Architecture:
        """The shape of a loaded model, its widths read from the tensors themselves. Raises Unsupported."""
        config, head_dim = model.config, head_dim_of(model.config)
        layers = list(model.get_submodule(self.layers))
        paths = (self.query, self.attention_out, self.ffn_in[0], self.ffn_out)
        has_bias = {path: _has_bias(layers, path) for path in paths}
        stack = model.get_submodule(self.layers.rpartition(".")[0])
        positions = getattr(stack, "embed_positions", None)
        if config.hidden_size != model.get_input_embeddings().weight.shape[1]:
            raise Unsupported("embeddings of another width than the hidden size (OPT-350m) cannot be pruned yet")
        return Architecture(
            family=self.name,
            hidden_size=config.hidden_size,
            head_dim=head_dim,
            vocab_size=model.get_input_embeddings().weight.shape[0],
            tied_embeddings=bool(config.tie_word_embeddings),
            ffn_matrices=len(self.ffn_in) + 1,
            norm_vectors=len(list(_final_norm(stack).parameters())),
            qkv_bias=has_bias[self.query],
            out_bias=has_bias[self.attention_out],
            ffn_bias=has_bias[self.ffn_in[0]],
            ffn_out_bias=has_bias[self.ffn_out],
            qk_norm=any(name.endswith("q_norm.weight") for name, _ in model.named_parameters()),
            num_positions=0 if positions is None else positions.weight.shape[0],
            layers=tuple(self._widths(layer, head_dim) for layer in layers),
        )

    def _widths(self, layer: nn.Module, head_dim: int) -> LayerWidths:
        heads, kv_heads, channels = 0, 0, 0
        query, key = linear_at(layer, self.query), linear_at(layer, self.key)
        if query is not None and key is not None:
            heads, kv_heads = query.out_features // head_dim, key.out_features // head_dim
        if (out := linear_at(layer, self.ffn_out)) is not None:
            channels = out.in_features
        return LayerWidths(num_heads=heads, num_kv_heads=kv_heads, num_channels=channels)

    def blocks(self, model: PreTrainedModel) -> tuple[Block, ...]:
        """The sublayers of a loaded model, with all tensors in which their units lie."""
        architecture, layers = self.architecture(model), model.get_submodule(self.layers)
        assert isinstance(layers, nn.ModuleList)
        return tuple(self._with_members(block, layers[block.layer], architecture) for block in architecture.blocks)

    def _with_members(self, block: Block, layer: nn.Module, architecture: Architecture) -> Block:
        prefix, head_dim = f"{self.layers}.{block.layer}", architecture.head_dim
        sizes = [group.num_units for group in block.groups]
        groups = []
        for dimension, group in enumerate(block.groups):
            members: list[Member] = []
            for path in (*self.inputs_of(block.kind), self.output_of(block.kind)):
                grid = tuple(sizes)  # channels, or (KV heads, query heads a KV head)
                if block.kind == "attention":
                    grid = (sizes[0], head_dim) if path in (self.key, self.value) else (*sizes, head_dim)
                    if dimension and path in (self.key, self.value):
                        continue  # all query heads of a KV head read the same ones
                members += _members(layer, prefix, path, grid, dimension, is_output=path == self.output_of(block.kind))
            groups.append(Group(name=group.name, num_units=group.num_units, members=tuple(members)))
        return Block(name=block.name, layer=block.layer, kind=block.kind, groups=tuple(groups))

    def tell_widths_(self, layer: nn.Module, block: Block, kept: Kept) -> None:
        """Make the modules of a cut layer compute with the widths that its tensors have now."""
        if block.kind == "attention":
            num_kv_heads, ratio = (len(kept[group.name]) for group in block.groups)
            set_heads_(layer.get_submodule(self.attention), num_kv_heads * ratio, num_kv_heads)


def head_dim_of(config: PreTrainedConfig) -> int:
    """Channels of one head: heads * head_dim need not equal the hidden size."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _members(
    layer: nn.Module, prefix: str, path: str, grid: tuple[int, ...], dimension: int, *, is_output: bool
) -> Iterator[Member]:
    """The inputs of an output matrix; the outputs of any other one, and its bias."""
    matrix = linear_at(layer, path)
    assert matrix is not None
    axis = 1 if is_output else 0
    yield Member(tensor=f"{prefix}.{path}.weight", axis=axis, grid=grid, dimension=dimension)
    if not is_output and matrix.bias is not None:
        yield Member(tensor=f"{prefix}.{path}.bias", axis=0, grid=grid, dimension=dimension)


def _has_bias(layers: list[nn.Module], path: str) -> bool:
    """Of the first layer's matrix at `path` that was not removed."""
    found = (linear_at(layer, path) for layer in layers)
    first = next((module for module in found if module is not None), None)
    return first is not None and first.bias is not None


def _final_norm(stack: nn.Module) -> nn.Module:
    norm = getattr(stack, "norm", None) or getattr(stack, "final_layer_norm", None)
    return norm if isinstance(norm, nn.Module) else nn.Identity()

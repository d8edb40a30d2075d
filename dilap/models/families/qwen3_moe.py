"""Qwen3-MoE: Qwen3 whose feed-forward networks are experts, a few of which a router chooses for every token.

An expert is a unit: its slices of the 3-D tensors and its row of the router go together. Without it the router chooses
among the others, and its probabilities are a softmax over them, as if the removed expert's logit were minus infinity.
A token is sent to as many experts as before, because stock classes and runtimes have one such number for all layers.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from dilap.core.errors import InvalidInput, Unsupported
from dilap.core.groups import Block, Member
from dilap.core.shape import Architecture, Experts, LayerWidths
from dilap.models.families.family import GATE, UP, Family
from dilap.models.modeling_dilap import NoFeedForward

_EXPERT_WIDTH = "expert_feed_forward_length"
_TENSORS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight")  # experts are their first axis


@dataclass(frozen=True, kw_only=True)
class _Qwen3Moe(Family):
    gguf_keys: tuple[str, ...] = ("expert_count", "expert_used_count", _EXPERT_WIDTH)

    def read_gguf_(self, config: PreTrainedConfig, entries: Mapping[str, Any]) -> None:
        if _EXPERT_WIDTH not in entries:
            raise InvalidInput(f"the file has experts, and no key {_EXPERT_WIDTH} that says how wide they are")
        config.moe_intermediate_size = entries[_EXPERT_WIDTH]

    def architecture(self, model: PreTrainedModel) -> Architecture:
        config = model.config
        for index, layer in enumerate(model.get_submodule(self.layers).children()):
            network = layer.get_submodule(self.ffn or "")
            if not (hasattr(network, "experts") or isinstance(network, NoFeedForward)):
                raise Unsupported(
                    f"layer {index} has no experts (mlp_only_layers, decoder_sparse_step): models that mix layers with"
                    " and without experts cannot be pruned yet"
                )
        experts = Experts(
            num_channels=config.moe_intermediate_size,
            num_active=config.num_experts_per_tok,
            normed=config.norm_topk_prob,
        )
        return replace(super().architecture(model), experts=experts)

    def exported(self, model: PreTrainedModel) -> Mapping[str, torch.Tensor]:
        """Return the model's own tensors, and the halves of fused ones by names of their own."""
        own = super().exported(model)
        fused = {name: one.chunk(2, dim=1) for name, one in own.items() if name.endswith(".gate_up_proj")}
        halves = {
            f"{name.rpartition('.')[0]}.{half}": one
            for name, pair in fused.items()
            for half, one in zip((GATE, UP), pair, strict=True)
        }
        return {**own, **halves}

    def stock_sizes(self, widths: LayerWidths, architecture: Architecture) -> dict[str, int] | None:
        sizes = super().stock_sizes(widths, architecture)
        assert sizes is not None
        assert architecture.experts is not None
        del sizes["intermediate_size"]  # of layers without experts
        # the name that entries of a config have; `num_experts` is another one for the attribute
        return sizes | {"num_local_experts": widths.num_channels // architecture.experts.num_channels}

    def _widths(self, layer: nn.Module, head_dim: int) -> LayerWidths:
        network: Any = layer.get_submodule(self.ffn or "")
        if isinstance(network, NoFeedForward):
            return super()._widths(layer, head_dim)
        num_experts, _, num_channels = network.experts.down_proj.shape
        return replace(super()._widths(layer, head_dim), num_channels=num_experts * num_channels)

    def _with_members(self, block: Block, layer: nn.Module, architecture: Architecture) -> Block:
        if not block.has_experts:
            return super()._with_members(block, layer, architecture)
        prefix, grid = f"{self.layers}.{block.layer}", (block.main.num_units,)
        members = tuple(Member(tensor=f"{prefix}.{name}", axis=0, grid=grid) for name in _TENSORS)
        return replace(block, groups=(replace(block.main, members=members),))


FAMILY = _Qwen3Moe(name="qwen3_moe", experts="mlp.experts", router="mlp.gate")

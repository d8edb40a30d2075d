"""OPT: learned positions, LayerNorm with biases, and a feed-forward network that lies in the layer itself."""

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from dilap.core.errors import Unsupported
from dilap.core.numerics import LayerNumerics, Numerics
from dilap.core.shape import Architecture, LayerWidths
from dilap.models.families.family import Family, head_dim_of

_NORM_EPS = 1e-5  # of torch's LayerNorm, which the stock class takes as it is


@dataclass(frozen=True, kw_only=True)
class _Opt(Family):
    def residual_scale(self, config: PreTrainedConfig) -> float:
        if not config.do_layer_norm_before:
            raise Unsupported("the norms of OPT-350m stand behind its sublayers")
        return 1.0

    def computed(self, layer: nn.Module, kind: str, *arguments: Any, **keywords: Any) -> Any:
        """The feed-forward network is no module of its own."""
        if kind != "ffn":
            return super().computed(layer, kind, *arguments, **keywords)
        activation: Any = layer.activation_fn
        hidden = activation(layer.get_submodule(self.ffn_in[0])(*arguments))
        return layer.get_submodule(self.ffn_out)(hidden)

    def stock_sizes(self, widths: LayerWidths, architecture: Architecture) -> dict[str, int] | None:
        """Return None for fewer heads, because the stock class derives head_dim from hidden_size // heads."""
        if widths.num_heads * architecture.head_dim != architecture.hidden_size:
            return None
        return {"num_attention_heads": widths.num_heads, "ffn_dim": widths.num_channels}

    def numerics(self, model: PreTrainedModel) -> Numerics:
        config = model.config
        if not config.do_layer_norm_before or config._remove_final_layer_norm:
            raise Unsupported("OPT with norms behind its sublayers (OPT-350m) cannot be exported yet")
        if not config.layer_norm_elementwise_affine:
            raise Unsupported("OPT with norms that have no weights cannot be exported yet")
        return Numerics(
            context_length=self.max_tokens(config),
            norm_eps=_NORM_EPS,
            activation=getattr(config, self.activation),
            attention_scale=head_dim_of(config) ** -0.5,
            layers=(LayerNumerics(rotary=None),) * config.num_hidden_layers,
        )

    def stand_in_numerics(self, architecture: Architecture) -> Numerics:
        context = architecture.num_positions - self.position_offset
        layers = (LayerNumerics(rotary=None),) * len(architecture.layers)
        return Numerics(
            context_length=context,
            norm_eps=_NORM_EPS,
            activation="relu",
            attention_scale=architecture.head_dim**-0.5,
            layers=layers,
        )


FAMILY = _Opt(
    name="opt",
    activation="activation_function",
    layers="model.decoder.layers",
    embeddings="model.decoder.embed_tokens",
    final_norm="model.decoder.final_layer_norm",
    positions="model.decoder.embed_positions",
    position_offset=2,  # its table starts with two rows that no token uses
    attention_out="self_attn.out_proj",
    attention_norm="self_attn_layer_norm",
    ffn=None,
    ffn_in=("fc1",),
    ffn_out="fc2",
    ffn_norm="final_layer_norm",
)

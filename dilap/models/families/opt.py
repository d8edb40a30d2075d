"""OPT: learned positions, LayerNorm with biases, and a feed-forward network that lies in the layer itself."""

from dataclasses import dataclass

from transformers import PreTrainedConfig

from dilap.core.errors import Unsupported
from dilap.core.shape import Architecture, LayerWidths
from dilap.models.families.family import Family


@dataclass(frozen=True, kw_only=True)
class _Opt(Family):
    def residual_scale(self, config: PreTrainedConfig) -> float:
        if not config.do_layer_norm_before:
            raise Unsupported("the norms of OPT-350m stand behind its sublayers, which cannot be refitted")
        return 1.0

    def stock_sizes(self, widths: LayerWidths, architecture: Architecture) -> dict[str, int] | None:
        """The stock class derives head_dim from hidden_size // heads, so it cannot lose heads."""
        if widths.num_heads * architecture.head_dim != architecture.hidden_size:
            return None
        return {"num_attention_heads": widths.num_heads, "ffn_dim": widths.num_channels}


FAMILY = _Opt(
    name="opt",
    layers="model.decoder.layers",
    attention_out="self_attn.out_proj",
    attention_norm="self_attn_layer_norm",
    ffn=None,
    ffn_in=("fc1",),
    ffn_out="fc2",
    ffn_norm="final_layer_norm",
)

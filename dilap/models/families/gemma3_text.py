"""Gemma 3 without its vision tower: Gemma 2 with norms of queries and keys instead of soft caps.

Five layers of six see only a window, and turn their heads by another rotary embedding than the sixth.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from dilap.core.errors import InvalidInput
from dilap.core.numerics import LayerNumerics, Numerics, Rotary
from dilap.core.shape import Architecture
from dilap.models.families.family import plain_rotary, rotary_of
from dilap.models.families.gemma2 import Gemma

_SLIDING_BASE = 10_000.0  # of the rotary embedding of layers that slide


@dataclass(frozen=True, kw_only=True)
class _Gemma3(Gemma):
    gguf_keys: tuple[str, ...] = (*Gemma.gguf_keys, "rope.scaling.type", "rope.scaling.factor")

    def read_gguf_(self, config: PreTrainedConfig, keys: Mapping[str, Any]) -> None:
        super().read_gguf_(config, keys)
        if not keys.get("attention.sliding_window"):
            config.layer_types = ["full_attention"] * config.num_hidden_layers
        full, factor = config.rope_parameters["full_attention"], keys.get("rope.scaling.factor") or 1.0
        if (kind := keys.get("rope.scaling.type", "linear")) not in ("linear", "none"):
            raise InvalidInput(f"the file scales its rotary embedding in the way {kind!r}, and Gemma 3 linearly")
        if factor != 1.0 and kind == "linear":
            full |= {"rope_type": "linear", "factor": factor}
        sliding = {"rope_type": "default", "rope_theta": keys.get("rope.freq_base_swa", _SLIDING_BASE)}
        config.rope_parameters = {"full_attention": full, "sliding_attention": sliding}

    def _rotary(self, model: PreTrainedModel, kind: str) -> Rotary:
        return rotary_of(model, self.rotary, attention=kind)

    def stand_in_numerics(self, architecture: Architecture) -> Numerics:
        head_dim, window = architecture.head_dim, 512 if architecture.hidden_size < 2048 else 1024  # 512 below 4B
        sliding = LayerNumerics(rotary=plain_rotary(head_dim, base=_SLIDING_BASE), window=window)
        full = LayerNumerics(rotary=plain_rotary(head_dim, base=1e6))
        layers = tuple(sliding if one else full for one in self.slides(len(architecture.layers)))
        return replace(super().stand_in_numerics(architecture), layers=layers)


FAMILY = _Gemma3(name="gemma3_text", period=6, largest_layers=62)

"""Gemma 3 without its vision tower: Gemma 2 with norms of queries and keys instead of soft caps.

Five layers of six see only a window, and turn their heads by another rotary embedding than the sixth.
"""

from dataclasses import dataclass, replace

from transformers import PreTrainedModel

from dilap.core.numerics import LayerNumerics, Numerics, Rotary
from dilap.core.shape import Architecture
from dilap.models.families.family import plain_rotary, rotary_of
from dilap.models.families.gemma2 import Gemma


@dataclass(frozen=True, kw_only=True)
class _Gemma3(Gemma):
    def _rotary(self, model: PreTrainedModel, kind: str) -> Rotary:
        return rotary_of(model, self.rotary, attention=kind)

    def stand_in_numerics(self, architecture: Architecture) -> Numerics:
        head_dim, window = architecture.head_dim, 512 if architecture.hidden_size < 2048 else 1024  # 512 below 4B
        sliding = LayerNumerics(rotary=plain_rotary(head_dim), window=window)
        full = LayerNumerics(rotary=plain_rotary(head_dim, base=1e6))
        layers = tuple(full if index % 6 == 5 else sliding for index in range(len(architecture.layers)))
        return replace(super().stand_in_numerics(architecture), layers=layers)


FAMILY = _Gemma3(name="gemma3_text")

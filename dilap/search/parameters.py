"""Costs for a pruning ratio: an imagined device on which every weight of the decoder layers takes a second."""

from collections.abc import Sequence
from dataclasses import dataclass

from dilap.core.shape import Architecture, LayerWidths
from dilap.profilers.tables.probes import AttentionLevel


@dataclass(frozen=True, kw_only=True)
class ParameterCosts:
    """What a latency model offers, with numbers of weights in place of seconds."""

    architecture: Architecture
    fixed_seconds: float = 0.0
    caveats: tuple[str, ...] = ()  # counts have none

    def attention_seconds(self, num_heads: int, num_kv_heads: int) -> float:
        widths = LayerWidths(num_heads=num_heads, num_kv_heads=num_kv_heads, num_channels=0)
        return float(self.architecture.attention_parameters(widths))

    def ffn_seconds(self, num_channels: int) -> float:
        widths = LayerWidths(num_heads=0, num_kv_heads=0, num_channels=num_channels)
        return float(self.architecture.ffn_parameters(widths))

    def predict(self, widths: Sequence[LayerWidths]) -> float:
        return sum(
            self.attention_seconds(layer.num_heads, layer.num_kv_heads) + self.ffn_seconds(layer.num_channels)
            for layer in widths
        )

    def measurable_attention_levels(self, levels: Sequence[AttentionLevel]) -> list[AttentionLevel]:
        """All of them, largest first."""
        return sorted(levels, key=lambda level: (-self.attention_seconds(*level), level))

    def measurable_ffn_levels(self, levels: Sequence[int]) -> list[int]:
        return sorted(levels, reverse=True)

"""What a search may choose from: for every sublayer, widths and the seconds that each costs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from dilap.types import Architecture, GroupKind, LayerWidths, Plan, group_name

SublayerKind = Literal["attention", "ffn"]


@dataclass(frozen=True, kw_only=True)
class Level:
    """One width of a sublayer: units kept per group, and its latency. No units: the sublayer is removed."""

    num_kv_groups: int = 0
    num_query_slots: int = 0
    num_channels: int = 0
    seconds: float

    @property
    def is_removed(self) -> bool:
        return self.num_kv_groups == 0 and self.num_channels == 0


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A sublayer with its levels, the full width first and then by falling latency."""

    layer: int
    kind: SublayerKind
    levels: tuple[Level, ...]

    def __post_init__(self) -> None:
        seconds = [level.seconds for level in self.levels]
        if not seconds or max(seconds) > seconds[0] or min(seconds) < 0:
            raise ValueError(f"{self.name}: the first level is the full width and no level is slower")

    @property
    def name(self) -> str:
        return f"layers.{self.layer}.{self.kind}"


@dataclass(frozen=True, kw_only=True)
class Space:
    """All choices of a model. `fixed_seconds` is what no plan removes: embedding, head, launch."""

    architecture: Architecture
    choices: tuple[Choice, ...]
    fixed_seconds: float

    def seconds(self, config: Sequence[int]) -> float:
        """Predicted latency of one level index per choice."""
        return self.fixed_seconds + sum(
            choice.levels[index].seconds for choice, index in zip(self.choices, config, strict=True)
        )

    @property
    def dense(self) -> tuple[int, ...]:
        return (0,) * len(self.choices)

    @property
    def fastest(self) -> tuple[int, ...]:
        """The fastest config, whatever it costs in quality."""
        return tuple(min(range(len(c.levels)), key=lambda k: c.levels[k].seconds) for c in self.choices)

    def widths(self, config: Sequence[int]) -> tuple[LayerWidths, ...]:
        """The widths of every dense layer under `config`."""
        heads = [(0, 0)] * len(self.architecture.layers)
        channels = [0] * len(self.architecture.layers)
        for choice, index in zip(self.choices, config, strict=True):
            level = choice.levels[index]
            if choice.kind == "attention":
                heads[choice.layer] = (level.num_kv_groups * level.num_query_slots, level.num_kv_groups)
            else:
                channels[choice.layer] = level.num_channels
        return tuple(
            LayerWidths(num_heads=h, num_kv_heads=kv, num_channels=c)
            for (h, kv), c in zip(heads, channels, strict=True)
        )


Units = dict[GroupKind, tuple[int, ...]]


def plan_of(space: Space, units: Sequence[Units], *, base: str) -> Plan:
    """The plan that keeps `units` in every choice of `space`."""
    kept: dict[str, tuple[int, ...]] = {}
    for choice, chosen in zip(space.choices, units, strict=True):
        for kind, indices in chosen.items():
            kept[group_name(choice.layer, kind)] = indices
    return Plan(base=base, architecture=space.architecture, kept=kept)

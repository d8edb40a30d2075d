"""What a search may choose from: for every sublayer, widths and the seconds that each costs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from dilap.core.errors import Unsupported
from dilap.core.plan import Group, GroupKind, Plan, group_name
from dilap.core.shape import Architecture, LayerWidths

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


@dataclass(frozen=True, kw_only=True)
class WidthRules:
    """The plans that a runtime and a layout load, whether every width pays or not.

    Whole layers may always be removed. `output_biases`: output projections may get a bias that the family lacks.
    """

    ffn_multiple: int = 1
    head_pruning: bool = True
    attention_removal: bool = True
    ffn_removal: bool = True
    equal_widths: bool = False
    output_biases: bool = True

    def rounded(self, group: Group, wanted: int) -> int:
        """The loadable number of units nearest to `wanted`, at least one."""
        if group.kind == "channels":
            wanted = max(1, round(wanted / self.ffn_multiple)) * self.ffn_multiple
        elif not self.head_pruning:
            wanted = group.num_units
        return min(max(1, wanted), group.num_units)

    def require(self, plan: Plan) -> None:
        """Raises Unsupported, naming the first layer that would not load."""
        kept = [widths for widths in plan.all_widths() if not widths.is_empty]
        if self.equal_widths and len(set(kept)) > 1:
            raise Unsupported("this method gives layers their own widths, the runtime or layout needs equal ones")
        for index, (dense, widths) in enumerate(zip(plan.architecture.layers, plan.all_widths(), strict=True)):
            if reason := self._refusal(dense, widths):
                raise Unsupported(f"layer {index}: this runtime or layout loads no {reason}; choose another method")

    def _refusal(self, dense: LayerWidths, widths: LayerWidths) -> str | None:
        if widths.is_empty or widths == dense:
            return None
        if widths.num_heads == 0 and not self.attention_removal:
            return "layer without attention"
        if widths.num_channels == 0 and not self.ffn_removal:
            return "layer without a feed-forward network"
        if 0 < widths.num_heads < dense.num_heads and not self.head_pruning:
            return "layer with fewer heads"
        if widths.num_channels not in (0, dense.num_channels) and widths.num_channels % self.ffn_multiple:
            return f"{widths.num_channels} channels but multiples of {self.ffn_multiple}"
        return None


Units = dict[GroupKind, tuple[int, ...]]


def plan_of(space: Space, units: Sequence[Units], *, base: str) -> Plan:
    """The plan that keeps `units` in every choice of `space`."""
    kept: dict[str, tuple[int, ...]] = {}
    for choice, chosen in zip(space.choices, units, strict=True):
        for kind, indices in chosen.items():
            kept[group_name(choice.layer, kind)] = indices
    return Plan(base=base, architecture=space.architecture, kept=kept)

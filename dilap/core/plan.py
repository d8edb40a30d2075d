"""What can be removed from a network, and which of it a plan keeps."""

from dataclasses import asdict, dataclass, replace
from typing import Literal

from dilap.core.codec import digest
from dilap.core.shape import Architecture, LayerWidths

GroupKind = Literal["kv_groups", "query_slots", "channels"]


@dataclass(frozen=True, kw_only=True)
class Group:
    """Units that can be removed one by one from one layer; `name` is like `layers.3.channels`."""

    layer: int
    kind: GroupKind
    num_units: int

    @property
    def name(self) -> str:
        return group_name(self.layer, self.kind)


def group_name(layer: int, kind: GroupKind) -> str:
    return f"layers.{layer}.{kind}"


def groups_of(architecture: Architecture) -> tuple[Group, ...]:
    """The prunable groups, layer by layer.

    KV groups are a KV head with its query heads; query slots the same query head of every KV group; single
    query heads are no unit, because every runtime maps query head h to KV head h // ratio.
    """
    groups: list[Group] = []
    for index, layer in enumerate(architecture.layers):
        if layer.num_heads:
            ratio = layer.num_heads // layer.num_kv_heads
            groups.append(Group(layer=index, kind="kv_groups", num_units=layer.num_kv_heads))
            groups.append(Group(layer=index, kind="query_slots", num_units=ratio))
        if layer.num_channels:
            groups.append(Group(layer=index, kind="channels", num_units=layer.num_channels))
    return tuple(groups)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Which units every group of a dense model keeps, as ascending indices; `base` is that model's digest.

    An attention sublayer is removed by keeping no KV group, a feed-forward one by keeping no channel; a layer
    that keeps neither is deleted.
    """

    base: str
    architecture: Architecture
    kept: dict[str, tuple[int, ...]]

    def __post_init__(self) -> None:
        groups = {group.name: group for group in groups_of(self.architecture)}
        if set(groups) != set(self.kept):
            odd = sorted(set(groups) ^ set(self.kept))[0]
            raise ValueError(f"the plan and its architecture disagree about group {odd}")
        for name, units in self.kept.items():
            if list(units) != sorted(set(units)) or (units and not 0 <= units[0] <= units[-1] < groups[name].num_units):
                raise ValueError(f"{name}: kept units are not ascending indices below {groups[name].num_units}")
            if not units and groups[name].kind == "query_slots":
                raise ValueError(f"{name}: an attention sublayer is removed through its kv_groups, not its slots")
        if not any(layer.num_heads for layer in self.all_widths()):
            raise ValueError("no layer keeps attention: the tokens could not see one another")

    @property
    def digest(self) -> str:
        return digest(asdict(self))

    def units(self, layer: int, kind: GroupKind) -> tuple[int, ...]:
        """The kept units of one group; none where the dense layer has no such group."""
        return self.kept.get(group_name(layer, kind), ())

    def all_widths(self) -> tuple[LayerWidths, ...]:
        """The widths of every dense layer, the deleted ones included."""
        widths = []
        for index in range(len(self.architecture.layers)):
            num_kv_heads = len(self.units(index, "kv_groups"))
            widths.append(
                LayerWidths(
                    num_heads=num_kv_heads * len(self.units(index, "query_slots")),
                    num_kv_heads=num_kv_heads,
                    num_channels=len(self.units(index, "channels")),
                )
            )
        return tuple(widths)

    def pruned_architecture(self) -> Architecture:
        """The architecture after shrinking, without the deleted layers."""
        return replace(self.architecture, layers=tuple(w for w in self.all_widths() if not w.is_empty))


def full_plan(architecture: Architecture, *, base: str) -> Plan:
    """The plan that keeps everything."""
    kept = {group.name: tuple(range(group.num_units)) for group in groups_of(architecture)}
    return Plan(base=base, architecture=architecture, kept=kept)

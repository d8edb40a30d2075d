"""Which units of a network a plan keeps, and in which precision."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import ClassVar, Generic

from dilap.core.codec import digest
from dilap.core.graph import Shape
from dilap.core.groups import Group
from dilap.core.shape import Architecture, LayerWidths

_NEWER = {"experts": None, "sublayer_norms": 1}  # fields of architectures that the first plans did not have


@dataclass(frozen=True, kw_only=True)
class Plan(Generic[Shape]):
    """The units that every group of a dense model keeps, as ascending indices; `base` is that model's digest.

    A block is removed by keeping no unit of its first group; a layer that loses all its blocks is deleted.
    `precisions` has, by name, the precision of the parts that are not written in the artifact's precision: blocks of
    the dense model, the `head` and the `embedding`.
    """

    VERSION: ClassVar[int] = 2  # 1 had no precisions: every block was in the artifact's

    base: str
    architecture: Shape
    kept: dict[str, tuple[int, ...]]
    precisions: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        blocks = self.architecture.blocks
        groups = {group.name: group for block in blocks for group in block.groups}
        if odd := sorted(set(groups) ^ set(self.kept)):
            raise ValueError(f"the plan and its architecture disagree about group {odd[0]}")
        for name, units in self.kept.items():
            _require_units(groups[name], units)
        if odd := sorted(set(self.precisions) - set(self.architecture.parts)):
            raise ValueError(f"the plan gives a precision to {odd[0]}, which its architecture does not have")
        self.architecture.require_network(self.counts)

    @property
    def digest(self) -> str:
        """SHA-256 of the plan's content; what is newer than plans leaves it as it was, where it is at its default."""
        document = asdict(self)
        if not self.precisions:
            del document["precisions"]
        for name, default in _NEWER.items():
            if document["architecture"].get(name, ...) == default:
                del document["architecture"][name]
        return digest(document)

    @property
    def counts(self) -> dict[str, int]:
        """How many units are left in every group."""
        return {name: len(units) for name, units in self.kept.items()}

    def all_widths(self: "Plan[Architecture]") -> tuple[LayerWidths, ...]:
        """Return the widths of every layer of a dense decoder, deleted layers included."""
        return self.architecture.widths_at(self.counts)

    def pruned_architecture(self) -> Shape:
        """Return the shape of the pruned model, without the layers that are gone."""
        return self.architecture.pruned(self.counts)

    def pruned_precisions(self) -> dict[str, str]:
        """Return the precisions of the parts that the pruned model has, under the names that they have there."""
        names = self.architecture.parts_left(self.counts)
        return {names[part]: precision for part, precision in self.precisions.items() if part in names}


def _require_units(group: Group, units: Sequence[int]) -> None:
    """Raise ValueError unless `units` are ascending indices of units of the group, none or at least its `least`."""
    if list(units) != sorted(set(units)) or (units and not 0 <= units[0] <= units[-1] < group.num_units):
        raise ValueError(f"{group.name}: kept units are not ascending indices below {group.num_units}")
    if 0 < len(units) < group.least:
        need = f"at least {group.least} stay" if group.least < group.num_units else "they stay or go together"
        raise ValueError(f"{group.name}: {len(units)} of {group.num_units} units kept, but {need}")


def full_plan(architecture: Shape, *, base: str) -> Plan[Shape]:
    """Return the plan that keeps everything."""
    groups = (group for block in architecture.blocks for group in block.groups)
    return Plan(base=base, architecture=architecture, kept={one.name: tuple(range(one.num_units)) for one in groups})

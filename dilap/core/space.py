"""What a search may choose from: for every block, levels and what each of them costs."""

from collections.abc import Sequence
from dataclasses import dataclass

from dilap.core.costs import Counts
from dilap.core.groups import Block, Kept
from dilap.core.plan import Plan
from dilap.core.shape import Architecture, LayerWidths


@dataclass(frozen=True, kw_only=True)
class Level:
    """One width of a block: the units left of each of its groups, in the block's order; no unit of the first group: the
    block is removed. `cost` is in the unit of the costs that were asked: seconds, or weights. `precision` is that of
    the block's matrices; empty, that of the artifact."""

    counts: Counts
    cost: float
    precision: str = ""

    @property
    def is_removed(self) -> bool:
        return self.counts[0] == 0


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A block with its levels, the full width first and then by falling cost."""

    block: Block
    levels: tuple[Level, ...]

    def __post_init__(self) -> None:
        costs = [level.cost for level in self.levels]
        if not costs or max(costs) > costs[0] or min(costs) < 0:
            raise ValueError(f"{self.name}: the first level is the full width and no level costs more")

    @property
    def name(self) -> str:
        return self.block.name


@dataclass(frozen=True, kw_only=True)
class Space:
    """All choices of a model. `fixed_cost` is what no plan removes: embedding, head, launch."""

    architecture: Architecture
    choices: tuple[Choice, ...]
    fixed_cost: float

    def cost(self, config: Sequence[int]) -> float:
        """Of one level index per choice."""
        return self.fixed_cost + sum(
            choice.levels[index].cost for choice, index in zip(self.choices, config, strict=True)
        )

    @property
    def dense(self) -> tuple[int, ...]:
        return (0,) * len(self.choices)

    @property
    def fastest(self) -> tuple[int, ...]:
        """The cheapest level of every choice, whatever it costs in quality."""
        return tuple(min(range(len(c.levels)), key=lambda k: c.levels[k].cost) for c in self.choices)

    def widths(self, config: Sequence[int]) -> tuple[LayerWidths, ...]:
        """The widths of every dense layer under `config`."""
        counts: dict[str, int] = {}
        for choice, index in zip(self.choices, config, strict=True):
            names = (group.name for group in choice.block.groups)
            counts |= zip(names, choice.levels[index].counts, strict=True)
        return self.architecture.widths_at(counts)


def plan_of(space: Space, units: Sequence[Kept], *, base: str) -> Plan:
    """The plan that keeps `units`, by group, in every choice of `space`."""
    kept: dict[str, tuple[int, ...]] = {}
    for chosen in units:
        kept |= {name: tuple(indices) for name, indices in chosen.items()}
    return Plan(base=base, architecture=space.architecture, kept=kept)

"""What a search may choose from: for every block its levels, widths with precisions, and what each of them costs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic

from dilap.core.costs import Counts
from dilap.core.errors import Unsupported
from dilap.core.graph import Shape
from dilap.core.groups import Block, Kept
from dilap.core.plan import Plan
from dilap.core.shape import PRECISION_BITS, UNMIXED


@dataclass(frozen=True, kw_only=True)
class Level:
    """One width of a block, which is how many units are left in each of its groups, in the block's order; a precision.

    Where none is left in the first group, the block is removed. The head has no groups and is never removed. `cost` is
    in the unit of the cost model: seconds, or weights. `precision` is that of the block's matrices; an empty one means
    the artifact's.
    """

    counts: Counts
    cost: float
    precision: str = ""

    @property
    def is_removed(self) -> bool:
        return self.counts[:1] == (0,)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A block with its levels: first the full width, in the reference precision, and then the others by falling cost.

    Where precisions are chosen, the last choice of a space is that of the head.
    """

    block: Block
    levels: tuple[Level, ...]

    def __post_init__(self) -> None:
        costs = [level.cost for level in self.levels]
        if not costs or max(costs) > costs[0] or min(costs) < 0:
            raise ValueError(f"{self.name}: the first level is the full width and no level costs more")

    @property
    def name(self) -> str:
        return self.block.name

    @property
    def precisions(self) -> list[str]:
        """The precision of every level."""
        return [level.precision for level in self.levels]


@dataclass(frozen=True, kw_only=True)
class Coupling:
    """What two choices cost together beyond the costs of their levels.

    `costs[i][j]` is for level i of the choice with the index `first` and level j of the one with the index `second`; it
    is not negative and does not rise when either width falls.
    """

    first: int
    second: int
    costs: tuple[tuple[float, ...], ...]


@dataclass(frozen=True, kw_only=True)
class Space(Generic[Shape]):
    """All choices of a model. `fixed_cost` is the cost of what no plan changes: embedding, launch, and often the head.

    A config of the space is one level index for every choice. Without `untied_precisions` the runtime reads the head
    from the embedding, so that both have the same precision.
    """

    architecture: Shape
    choices: tuple[Choice, ...]
    fixed_cost: float
    couplings: tuple[Coupling, ...] = ()
    untied_precisions: bool = True

    def cost(self, config: Sequence[int]) -> float:
        """Return the cost of the whole model at `config`."""
        own = sum(choice.levels[index].cost for choice, index in zip(self.choices, config, strict=True))
        return self.fixed_cost + own + sum(one.costs[config[one.first]][config[one.second]] for one in self.couplings)

    def level_costs(self) -> list[list[float]]:
        """Return the costs of the levels of every choice, whose sum is all that a config costs beyond `fixed_cost`.

        Raises Unsupported where pairs of choices have costs of their own, so that no sum of levels gives the cost.
        """
        if self.couplings:
            raise Unsupported("this method needs costs that add up over blocks, those of this network do not")
        return [[level.cost for level in choice.levels] for choice in self.choices]

    @property
    def floor(self) -> float:
        """The cost that is left when every block is removed and the head is in its cheapest precision."""
        heads = (choice for choice in self.choices if not choice.block.groups)
        return self.fixed_cost + sum(min(level.cost for level in head.levels) for head in heads)

    @property
    def dense(self) -> tuple[int, ...]:
        """The config that keeps every block at its full width."""
        return (0,) * len(self.choices)

    @property
    def fastest(self) -> tuple[int, ...]:
        """The config with the cheapest level of every choice, whatever that does to the quality.

        Costs of pairs count as they are beside full neighbours.
        """
        costs = [[level.cost for level in choice.levels] for choice in self.choices]
        for one in self.couplings:
            for k, row in enumerate(one.costs):
                costs[one.first][k] += row[0]
            for k, cost in enumerate(one.costs[0]):
                costs[one.second][k] += cost
        return tuple(min(range(len(own)), key=own.__getitem__) for own in costs)

    def widths(self, config: Sequence[int]) -> Any:
        """Return the widths at `config` as the shape of the dense model tells them, for `Costs.predict`."""
        counts: dict[str, int] = {}
        for choice, index in zip(self.choices, config, strict=True):
            names = (group.name for group in choice.block.groups)
            counts |= zip(names, choice.levels[index].counts, strict=True)
        return self.architecture.widths_at(counts)

    def embedding_precision(self, head: str) -> str:
        """Return the precision of the embedding where the head has the precision `head`.

        It costs no time, so it has 8 bits where the head has fewer, if they are offered and the runtime allows that.
        """
        eight = [one for one in self.choices[-1].precisions if 8 <= PRECISION_BITS[one] < 16]
        return eight[0] if eight and PRECISION_BITS[head] < 8 and self.untied_precisions else head

    def precisions(self, config: Sequence[int]) -> dict[str, str]:
        """Return the precisions, by name, of the parts that are not in the artifact's own at `config`."""
        levels = {choice.name: choice.levels[index] for choice, index in zip(self.choices, config, strict=True)}
        return {name: level.precision for name, level in levels.items() if level.precision}


def plan_of(
    space: Space[Shape], units: Sequence[Kept], *, base: str, precisions: Mapping[str, str] = UNMIXED
) -> Plan[Shape]:
    """Return the plan that keeps `units`: for every choice of `space`, the units that stay by group.

    `precisions` has those of the parts that are not in the artifact's own.
    """
    kept: dict[str, tuple[int, ...]] = {}
    for chosen in units:
        kept |= {name: tuple(indices) for name, indices in chosen.items()}
    return Plan(base=base, architecture=space.architecture, kept=kept, precisions=dict(precisions))

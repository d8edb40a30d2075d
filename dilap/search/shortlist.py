"""Leave out of an allocation what another precision makes pointless: its effort grows with the square of the levels."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dilap.core.space import Choice, Space
from dilap.search.allocation import Config, Quadratic


@dataclass(frozen=True, kw_only=True)
class Shortlist:
    """A quadratic model and a space with only some of the levels; `kept` are their indices, for every choice."""

    quadratic: Quadratic
    space: Space[Any]
    kept: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, quadratic: Quadratic, space: Space[Any], *, always: Config) -> "Shortlist":
        """Return the shortlist without levels in whose place another precision costs no more and loses no more.

        What they lose is counted by themselves. The levels of `always` are on it in any case.
        """
        losses = (quadratic.b + 0.5 * quadratic.Q.diagonal()).split(list(quadratic.sizes))
        kept = (
            list(_undominated(choice, loss.tolist(), always=level))
            for choice, loss, level in zip(space.choices, losses, always, strict=True)
        )
        return cls.at(quadratic, space, list(kept))

    @classmethod
    def at(cls, quadratic: Quadratic, space: Space[Any], kept: Sequence[Sequence[int]]) -> "Shortlist":
        """Return the shortlist of the levels `kept`, ascending indices for every choice."""
        indices = tuple(map(tuple, kept))
        if tuple(map(len, kept)) == quadratic.sizes:
            return cls(quadratic=quadratic, space=space, kept=indices)
        choices = (
            replace(choice, levels=tuple(choice.levels[k] for k in own))
            for choice, own in zip(space.choices, kept, strict=True)
        )
        couplings = (
            replace(one, costs=tuple(tuple(one.costs[i][j] for j in kept[one.second]) for i in kept[one.first]))
            for one in space.couplings
        )
        short = replace(space, choices=tuple(choices), couplings=tuple(couplings))
        return cls(quadratic=quadratic.at(kept), space=short, kept=indices)

    def full(self, config: Config) -> Config:
        """Return the config of the whole space, given that of the shortlist."""
        return tuple(own[level] for own, level in zip(self.kept, config, strict=True))

    def short(self, config: Config) -> Config:
        """Return the config of the shortlist, given that of the whole space, whose levels are all kept."""
        return tuple(own.index(level) for own, level in zip(self.kept, config, strict=True))


def _undominated(choice: Choice, losses: Sequence[float], *, always: int) -> Iterator[int]:
    """Yield the levels of a choice but those in whose place another precision costs no more and loses no more."""
    for k, level in enumerate(choice.levels):
        others = (
            (other.cost, losses[j])
            for j, other in enumerate(choice.levels)
            if other.precision != level.precision and (other.cost, losses[j], j) < (level.cost, losses[k], k)
        )
        if k == always or not any(cost <= level.cost and loss <= losses[k] for cost, loss in others):
            yield k

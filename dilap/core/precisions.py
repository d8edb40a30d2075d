"""The precision of every part of a model, where it is not the same one for all.

mix = Mix(precision="q4_0", precisions={"layers.3.ffn": "q8_0", "head": "q8_0"})
mix.of("layers.3.ffn")  # "q8_0"
mix.of("layers.3.attention")  # "q4_0"
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from dilap.core.errors import InvalidInput
from dilap.core.shape import Architecture

_KINDS = ("attention", "ffn")


@dataclass(frozen=True, kw_only=True)
class Mix:
    """A precision, and those of the parts that have one of their own, by the names of `Architecture.parts`.

    A part that is named has exactly the precision that it is given. Head and embedding, where they are not named, are
    written as they are in every artifact of `precision`; some runtimes keep them in more bits than the rest.
    """

    precision: str
    precisions: Mapping[str, str] = field(default_factory=dict)

    def of(self, part: str) -> str:
        return self.precisions.get(part, self.precision)

    @property
    def used(self) -> tuple[str, ...]:
        """All precisions that occur, that of the whole first."""
        return tuple(dict.fromkeys((self.precision, *self.precisions.values())))

    def __str__(self) -> str:
        _, *others = self.used
        return f"{self.precision} with parts in {', '.join(others)}" if others else self.precision

    def require_parts(self, architecture: Architecture) -> None:
        """Raise InvalidInput for a part that models of this architecture do not have."""
        if odd := sorted(set(self.precisions) - set(architecture.parts)):
            raise InvalidInput(
                f"the model has no part {odd[0]!r}: a precision is given to head, embedding, layers.N.attention or "
                f"layers.N.ffn, where the {len(architecture.layers)} layers count from 0"
            )


def for_every_layer(given: Mapping[str, str], architecture: Architecture) -> dict[str, str]:
    """Return the precisions of parts, where `attention` and `ffn` in `given` stand for those of all layers.

    What is given to one layer weighs more.
    """
    blocks = {block.name: given[block.kind] for block in architecture.blocks if block.kind in given}
    return blocks | {name: precision for name, precision in given.items() if name not in _KINDS}

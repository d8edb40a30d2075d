"""What a pruned model learns from: text, and what the dense model says about it."""

from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel

from dilap.models.compute import shuffled_rows
from dilap.models.recovery.stream import PackedStream
from dilap.models.reference import Head, Teacher

Rows = torch.Tensor | slice


class Lessons(Protocol):
    """Text in batches without end, with the dense model's answers; where it stands can be kept."""

    @property
    def length(self) -> int:
        """Tokens in a sequence."""

    def batch(self) -> torch.Tensor:
        """Return the next batch, whatever stands for its sequences; it can be split along its first dimension."""

    def lesson(self, few: torch.Tensor) -> tuple[Teacher, Rows]:
        """Return the dense model's answers for a part of a batch: a teacher, and which of its rows they are."""

    def state_dict(self) -> dict[str, Any]:
        """Return where the text stands, in values that JSON holds."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another run stood."""


class KeptLessons:
    """A text whose answers are kept; its sequences come in another order every time round."""

    def __init__(self, teacher: Teacher, *, batch_tokens: int, seed: int) -> None:
        self._teacher, self._taken = teacher, 0
        self._arguments: dict[str, Any] = {"batch_tokens": batch_tokens, "seed": seed}
        self._rows = shuffled_rows(teacher.tokens, batch_tokens=batch_tokens, seed=seed)

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(KeptLessons, **self._arguments), (self._teacher,)  # another process reads it from the start

    @property
    def length(self) -> int:
        return self._teacher.tokens.shape[1]

    def batch(self) -> torch.Tensor:
        """Return the rows of the text that come next."""
        self._taken += 1
        return next(self._rows)

    def lesson(self, few: torch.Tensor) -> tuple[Teacher, Rows]:
        return self._teacher, few

    def state_dict(self) -> dict[str, Any]:
        return {"taken": self._taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        while self._taken < state["taken"]:
            self.batch()


@dataclass(frozen=True, kw_only=True)
class StreamedLessons:
    """A stream of text, `num_sequences` at a time, about which the `dense` model is asked as it comes.

    `heads` are the head of the pruned model and the dense model's, where rounding makes them differ. `keep_states` asks
    for the dense model's final hidden states as well.
    """

    dense: PreTrainedModel
    stream: PackedStream
    num_sequences: int
    heads: tuple[Head, Head] | None = None
    keep_states: bool = False

    @property
    def length(self) -> int:
        return self.stream.length

    def batch(self) -> torch.Tensor:
        """Return the sequences that come next (sequences x length)."""
        return self.stream.take(self.num_sequences)

    def lesson(self, few: torch.Tensor) -> tuple[Teacher, Rows]:
        teacher = Teacher.of(self.dense, few, keep_states=self.keep_states or self.heads is not None)
        if self.heads is not None:
            own, dense = self.heads
            teacher = teacher.facing(own, dense_head=dense)
        return teacher, slice(None)

    def state_dict(self) -> dict[str, Any]:
        return self.stream.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.stream.load_state_dict(state)

"""Text that is streamed from files and hub data sets, and packed into sequences of tokens; it never ends.

Where a stream stands can be kept, so that another process goes on with the very next sequence.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from dilap.core.errors import DilapError, InvalidInput, Unavailable, reason_of
from dilap.models import text_files
from dilap.models.text import beginning
from dilap.models.vocabulary import TemporaryFolder

_LOOKED_AT = 100  # records of a source, to see whether it has text
MIXED = 512  # sequences that are held at once, to mix their order


class Documents:
    """The documents of files and hub data sets, one source after another, round and round.

    A plain text file has a document in every paragraph. A hub data set is `user/name`, or `user/name:configuration`.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names, self._links = tuple(names), TemporaryFolder()
        self._at, self._round, self._has_text = 0, 0, False
        self._begin(0, None)

    def require_text(self) -> None:
        """Raise InvalidInput, or Unavailable for a hub data set, for a source whose first records have no text."""
        for index, name in enumerate(self._names):
            with _reading(name):
                first = list(islice(self._opened(index), _LOOKED_AT))
            if not any(self._text_of(record, name).strip() for record in first):
                raise InvalidInput(f"{name}: it holds no text; {text_files.KNOWN}")

    def __next__(self) -> str:
        """Return the next document that is not empty. Raises InvalidInput where no source has one."""
        while True:
            record = self._next_record()
            if record is None:
                self._turn()
            elif (text := self._text_of(record, self._names[self._at])).strip():
                self._has_text = True
                return text

    def _next_record(self) -> Mapping[str, Any] | None:
        with _reading(self._names[self._at]):
            return next(self._records, None)

    def _turn(self) -> None:
        """Go on with the next source, behind the last one with the first again."""
        self._at += 1
        if self._at == len(self._names):
            if not self._has_text:
                raise InvalidInput(f"{', '.join(self._names)}: no text in it; {text_files.KNOWN}")
            self._at, self._round, self._has_text = 0, self._round + 1, False
        self._begin(self._at, None)

    def _begin(self, at: int, state: dict[str, Any] | None) -> None:
        """Read a source from where `state` says, or from its start."""
        self._source, self._begun = self._opened(at), state
        if state is not None:
            self._source.load_state_dict(state)
        self._records = iter(self._source)

    def _text_of(self, record: Mapping[str, Any], name: str) -> str:
        try:
            return text_files.text_of(record)
        except InvalidInput as error:
            raise InvalidInput(f"{name}: {error}") from error

    def _opened(self, index: int) -> Any:
        name = self._names[index]
        with _reading(name):
            return text_files.streamed(name, links=self._links.path / str(index))

    @property
    def is_plain(self) -> bool:
        """Whether the documents of the source at which it stands are paragraphs."""
        return text_files.is_plain(self._names[self._at])

    def state_dict(self) -> dict[str, Any]:
        """Return where the reading stands."""
        return {
            "at": self._at,
            "round": self._round,
            "has_text": self._has_text,
            "source": self._source.state_dict() or self._begun,  # it has none before its first record is read
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another reading stood."""
        self._at, self._round, self._has_text = state["at"], state["round"], state["has_text"]
        self._begin(self._at, state["source"])


class _reading:  # noqa: N801 - it is used as a function
    """A context in which errors of the libraries that read `name` become InvalidInput, or Unavailable for the hub."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if isinstance(error, Exception) and not isinstance(error, DilapError):
            kind = InvalidInput if Path(self._name).exists() else Unavailable
            raise kind(f"{self._name}: it cannot be read ({reason_of(error.__cause__ or error)})") from error


class PackedStream:
    """Documents as sequences of `length` tokens, packed one behind the other, in an order that `seed` gives.

    A document ends with the tokenizer's end of text, a paragraph of plain text with a blank line. As in all text here,
    every sequence begins with what the tokenizer puts before a text.
    """

    def __init__(self, names: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, length: int, seed: int) -> None:
        self.length, self._seed = length, seed
        self._documents, self._tokenizer = Documents(names), tokenizer
        self._before = beginning(self._ids("x", special=True), self._ids("x"))
        blank = self._ids("\n\n")
        self._ends = {True: blank, False: blank if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]}
        self._left: list[int] = []
        self._number = self._taken = 0
        self._mixed = torch.zeros(0, length, dtype=torch.int64)
        self._start = self._here()

    def _ids(self, text: str, *, special: bool = False) -> list[int]:
        found: list[int] = self._tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
        return found

    def take(self, count: int) -> torch.Tensor:
        """Return the next sequences (count x length)."""
        parts = list(self._parts(count))
        return torch.cat(parts)

    def _parts(self, count: int) -> Iterator[torch.Tensor]:
        while count:
            if self._taken == len(self._mixed):
                self._refill()
            part = self._mixed[self._taken : self._taken + count]
            self._taken += len(part)
            count -= len(part)
            yield part

    def _refill(self) -> None:
        """Read as many sequences as are mixed."""
        self._start = self._here()
        own = self.length - len(self._before)
        while len(self._left) < MIXED * own:
            text = next(self._documents)
            self._left += self._ids(text) + self._ends[self._documents.is_plain]
        rows = [[*self._before, *self._left[at : at + own]] for at in range(0, MIXED * own, own)]
        self._left = self._left[MIXED * own :]
        order = torch.randperm(MIXED, generator=torch.Generator().manual_seed(self._seed + self._number))
        self._mixed, self._taken, self._number = torch.tensor(rows)[order], 0, self._number + 1

    def _here(self) -> dict[str, Any]:
        return {"documents": self._documents.state_dict(), "left": list(self._left), "number": self._number}

    def state_dict(self) -> dict[str, Any]:
        """Return where the stream stands, in values that JSON holds."""
        return {**self._start, "taken": self._taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another stream of the same documents stood."""
        self._documents.load_state_dict(state["documents"])
        self._left, self._number = list(state["left"]), state["number"]
        self._refill()
        self._taken = state["taken"]

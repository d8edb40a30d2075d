"""How long work tells what it is at: the command line shows it on a terminal, a notebook or a program as it likes."""

from contextlib import AbstractContextManager
from typing import Any, Protocol


class Progress(Protocol):
    """Whoever wants to know how far the work is.

    `bar` gives a context manager that enters something like tqdm's bars: `update(n)`, `set_postfix_str(text)`,
    `set_postfix(name=value)`, and `n` and `total` to set.
    """

    def say(self, text: str) -> None:
        """One line about what was done or found."""

    def bar(self, title: str, *, total: int | None, unit: str) -> AbstractContextManager[Any]:
        """A count of `unit`s from 0 to `total`; None where nobody knows how many there will be."""


def say_lines(progress: Progress, text: str) -> None:
    """A text of several lines, each said on its own."""
    for line in text.split("\n"):
        progress.say(line)

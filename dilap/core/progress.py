"""The interface by which long work reports its progress; the command line, notebooks and programs implement it."""

from contextlib import AbstractContextManager
from typing import Any, Protocol


class Progress(Protocol):
    """A receiver of reports on how far the work is.

    `bar` returns a context manager that gives an object like tqdm's bars, with `update(n)`, `set_postfix_str(text)`,
    `set_postfix(name=value)`, and with `n` and `total`, which may be set.
    """

    def say(self, text: str) -> None:
        """Report one line about what was done or found."""

    def bar(self, title: str, *, total: int | None, unit: str) -> AbstractContextManager[Any]:
        """Begin a count of `unit`s from 0 to `total`, which is None where nobody knows how many there will be."""


def say_lines(progress: Progress, text: str) -> None:
    """Report a text of several lines, line by line."""
    for line in text.split("\n"):
        progress.say(line)

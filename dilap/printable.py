"""Text from elsewhere (devices, files, models), made fit for one line of a terminal, a log or a table.

As it comes, it can move the cursor, colour the screen, forge lines of ours, or fill a screen for minutes.
"""

from collections.abc import Mapping
from typing import Any

MAX_LINE = 2000  # characters


def printable(text: str, *, width: int = MAX_LINE) -> str:
    """In one line: what is no character is shown by its number (\\x1b), and what is too long is cut."""
    if len(text) > width:
        text = f"{text[:width]}... ({len(text) - width} more characters)"
    return text if text.isprintable() else "".join(map(_shown, text))


def printable_lines(text: str) -> str:
    """The same for every line of a text of ours."""
    return "\n".join(printable(line) for line in text.split("\n"))


def printable_values(value: Any) -> Any:
    """A JSON value whose texts are printable."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, Mapping):
        return {printable(str(key)): printable_values(item) for key, item in value.items()}
    return [printable_values(item) for item in value] if isinstance(value, list | tuple) else value


def _shown(character: str) -> str:
    if character.isprintable() or character == "\t":
        return character
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")

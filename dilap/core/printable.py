"""Text from elsewhere (devices, files, models), made fit for one line of a terminal, a log or a table.

As it comes, it can move the cursor, colour the screen, forge lines of ours, or fill a screen for minutes.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

MAX_LINE = 2000  # characters
_MARKS = re.compile(r"[\\`*|~]|!(?=\[)|\](?=[(\[:])")
_FORMULA = re.compile(r"\s*[=+\-@]")
_NUMBER = re.compile(r"[+-]?[0-9.]+(?:[eE][+-]?[0-9]+)?%?")


def printable(text: str, *, width: int = MAX_LINE) -> str:
    """In one line: what is no character is shown by its number (\\x1b), and what is too long is cut."""
    if len(text) > width:
        text = f"{text[:width]}... ({len(text) - width} more characters)"
    return text if text.isprintable() else "".join(map(_shown, text))


def printable_lines(text: str) -> str:
    """A text of several lines that we wrote, each of them made printable."""
    return joined(text.split("\n"))


def joined(lines: Iterable[str]) -> str:
    """Lines of a text of ours, in each of which anything may stand."""
    return "\n".join(map(printable, lines))


def markdown(text: str) -> str:
    """As text inside Markdown: no tag, no link, no code, no end of a table's cell."""
    shown = printable(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _MARKS.sub(r"\\\g<0>", shown)


def csv_cell(value: Any) -> Any:
    """A cell that no spreadsheet takes for a formula: an apostrophe stands before a text that begins like one."""
    if not isinstance(value, str):
        return value
    shown = printable(value)
    return f"'{shown}" if _FORMULA.match(shown) and not _NUMBER.fullmatch(shown) else shown


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

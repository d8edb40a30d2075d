"""Make text from elsewhere (devices, files, models) fit for one line of a terminal, a log or a table.

Unchanged, such text can move the cursor, colour the screen, imitate lines of ours, or fill the screen for minutes.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

MAX_LINE = 2000  # characters
_MARKS = re.compile(r"[\\`*|~]|!(?=\[)|\](?=[(\[:])")
_FORMULA = re.compile(r"\s*[=+\-@]")
_NUMBER = re.compile(r"[+-]?[0-9.]+(?:[eE][+-]?[0-9]+)?%?")


def printable(text: str, *, width: int = MAX_LINE) -> str:
    """Return `text` on one line: unprintable characters as escapes (\\x1b), and cut after `width` characters."""
    if len(text) > width:
        text = f"{text[:width]}... ({len(text) - width} more characters)"
    return text if text.isprintable() else "".join(map(_shown, text))


def printable_lines(text: str) -> str:
    """Return a text whose line breaks are ours, with each of its lines made printable."""
    return joined(text.split("\n"))


def joined(lines: Iterable[str]) -> str:
    """Make every line printable, since any may hold text from elsewhere, and join them by line breaks."""
    return "\n".join(map(printable, lines))


def markdown(text: str) -> str:
    """Escape text for Markdown, where it can then be no tag, link or code, nor end the cell of a table."""
    shown = printable(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _MARKS.sub(r"\\\g<0>", shown)


def milliseconds(seconds: float) -> str:
    """Format a latency in milliseconds, with two decimals or, where they would be noughts, two digits: none is 0.00."""
    value = seconds * 1e3
    return f"{value:.2f}" if value >= 0.1 else f"{value:.2g}"


def csv_cell(value: Any) -> Any:
    """Return a cell that no spreadsheet takes for a formula: a text that begins like one gets an apostrophe."""
    if not isinstance(value, str):
        return value
    shown = printable(value)
    return f"'{shown}" if _FORMULA.match(shown) and not _NUMBER.fullmatch(shown) else shown


def printable_values(value: Any) -> Any:
    """Return a JSON value with all its texts made printable."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, Mapping):
        return {printable(str(key)): printable_values(item) for key, item in value.items()}
    return [printable_values(item) for item in value] if isinstance(value, list | tuple) else value


def _shown(character: str) -> str:
    if character.isprintable() or character == "\t":
        return character
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")

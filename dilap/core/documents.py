"""Parse JSON and TOML files strictly: a document is read exactly as it is written, or refused with InvalidInput.

Python's own parsers accept more than a document should hold (two values of one key, NaN, numbers of any length), and
refuse the rest with exceptions of many types, RecursionError among them.
"""

import gzip
import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dilap.core.errors import InvalidInput

MAX_BYTES = 256 << 20  # of a file: a table of 10,000 probes with 200 samples each has 40 MB
MAX_TEXT_BYTES = 2 << 30  # of text to calibrate or evaluate on
MAX_DEPTH = 64  # levels of nested lists and objects: a result has 10
_UTF16 = (b"\xff\xfe", b"\xfe\xff")  # what Windows PowerShell writes behind `>`
_HALF_CHARACTER = re.compile(r"\\u[dD][89a-fA-F]")


def read_text(path: Path, *, max_bytes: int = MAX_BYTES) -> str:
    """Read a file of UTF-8 text. Raises InvalidInput where it is absent, too large or in another encoding."""
    try:
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)  # and no more, because /dev/zero has no end
    except FileNotFoundError:
        raise InvalidInput(f"{path}: no such file") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in its name
        raise InvalidInput(f"{path}: not readable ({words_of(error)})") from error
    if len(data) > max_bytes:
        raise InvalidInput(f"{path}: it is larger than {max_bytes >> 20} MB, which no file of this kind is")
    if data.startswith(_UTF16):
        raise InvalidInput(f"{path}: it is UTF-16, which Windows PowerShell writes; save it as UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidInput(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from error


def content_of(path: Path, *, max_bytes: int = MAX_TEXT_BYTES) -> bytes:
    """Return the bytes of a file, unpacked if its name ends in .gz.

    Raises ValueError where they are more than `max_bytes` (10 MB can unpack to 10 GB), OSError where the file cannot be
    read, and EOFError or zlib.error for a damaged archive.
    """
    with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
        data: bytes = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise ValueError(f"it holds more than {max_bytes >> 20:,} MB")
    return data


def words_of(error: OSError | ValueError) -> str:
    """Return what went wrong with a file, without the file's name."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def read_toml(path: Path) -> dict[str, Any]:
    """Read the TOML file `path`. Raises InvalidInput, naming the file, where it is absent or damaged."""
    import tomllib  # noqa: PLC0415 - Python 3.10, which devices may have, is without it

    document = _parsed(tomllib.loads, read_text(path, max_bytes=1 << 20), source=str(path), kind="TOML")
    _require_shallow(document, source=str(path))
    return dict(document)


def parse_object(text: str, *, source: str) -> dict[str, Any]:
    """Parse a JSON object; `source` says in errors where `text` comes from. Raises InvalidInput."""
    document = parse_json(text, source=source)
    if not isinstance(document, dict):
        raise InvalidInput(f"{source}: expected a JSON object, got {_kind(document)}")
    return document


def parse_json(text: str, *, source: str) -> Any:
    """Parse JSON whose numbers are finite and whose integers have at most 64 bits. Raises InvalidInput."""
    document = _parsed(_DECODER.decode, text, source=source, kind="JSON")
    _require_shallow(document, source=source)
    if _HALF_CHARACTER.search(text):
        _require_whole_characters(document, source=source)
    return document


def _parsed(parse: Callable[[str], Any], text: str, *, source: str, kind: str) -> Any:
    try:
        return parse(text)
    except RecursionError:
        raise InvalidInput(_too_deep(source)) from None
    except ValueError as error:  # from json or tomllib, or from the hooks below
        raise InvalidInput(f"{source}: not readable {kind} ({error})") from error


def _without_repeats(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r:.80} is given twice")
    return found


def int64(text: str) -> int:
    """Return the whole number that `text` is. Raises ValueError, also for one of more than 64 bits."""
    value = int(text) if len(text) <= 20 else None  # int() of thousands of digits is slow, and then refused
    if value is None or not -(2**63) <= value < 2**63:
        raise ValueError(f"the integer {text:.24}... has more than 64 bits")
    return value


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"the number {text:.40} is not finite")
    return value


_DECODER = json.JSONDecoder(
    object_pairs_hook=_without_repeats, parse_int=int64, parse_float=_finite, parse_constant=_finite
)


def _require_shallow(document: Any, *, source: str) -> None:
    """Raise InvalidInput for a document that is nested too deeply for the recursion of all later code."""
    level = [document]
    for _ in range(MAX_DEPTH + 1):
        inner = [value for value in level if isinstance(value, dict | list)]
        if not inner:
            return
        level = [child for value in inner for child in (value.values() if isinstance(value, dict) else value)]
    raise InvalidInput(_too_deep(source))


def _too_deep(source: str) -> str:
    return f"{source}: its lists and objects lie more than {MAX_DEPTH} deep inside one another"


def _require_whole_characters(document: Any, *, source: str) -> None:
    """Raise InvalidInput for half a character (such as \\ud800 alone), which can be neither printed nor written."""
    try:
        json.dumps(document, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise InvalidInput(f"{source}: it holds half a character ({error.object[error.start]!r})") from error


def _kind(value: Any) -> str:
    return {list: "a list", str: "a text", type(None): "null"}.get(type(value), f"a {type(value).__name__}")


def value_at(document: Any, *names: str) -> Any:
    """Return the value under `names` in nested objects; None where one of them is absent or no object."""
    for name in names:
        document = document.get(name) if isinstance(document, Mapping) else None
    return document


def is_plain_name(name: str) -> bool:
    """Return whether `name` names a file directly in a folder, and nothing outside it."""
    return name not in ("", ".", "..") and not set(name) & {"/", "\\", "\0"} and os.path.basename(name) == name

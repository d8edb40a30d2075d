"""Ways in which a file or an answer can be damaged, drawn from a seeded generator."""

import random
import re
from collections.abc import Callable

_NUMBER = re.compile(rb"-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?")
_VALUE = re.compile(rb'"(?:[^"\\]|\\.)*"|-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?|true|false|null')
_PAIR = re.compile(rb'"(?:[^"\\]|\\.)*"\s*:\s*(?:"(?:[^"\\]|\\.)*"|-?\d+(?:\.\d+)?|true|false|null)')
NUMBERS = (
    *(b"0", b"-0", b"-1", b"1", b"2", b"0.5", b"1e-320", b"1e400", b"-1e400", b"NaN", b"Infinity", b"-Infinity"),
    *(b"2147483647", b"2147483648", b"4294967296", b"9223372036854775807", b"9223372036854775808", b"1e18", b"-1e18"),
    *(b"1000000000", b"9" * 5000, b"1" + b"0" * 30, b"0x10", b"1_000", "٣".encode(), "²".encode()),
)
VALUES = (
    *(
        b"null",
        b"true",
        b"false",
        b"[]",
        b"{}",
        b'""',
        b'"x"',
        b"[1]",
        b'{"a": 1}',
        b"[[]]",
        b'"\\u0000"',
        b'"\\ud800"',
    ),
    *(b'"\\ud800"', b'"../../etc/passwd"', b'"\\u001b[2J\\r\\n"', b'"' + b"x" * 100_000 + b'"', b"[" * 60 + b"]" * 60),
    *(b"[" * 100_000, b'{"a":' * 5000 + b"1" + b"}" * 5000, b'"=1+1"', b'"<script>"', b'"1"', b"-5", b"1.5"),
)
INSERTS = (b"\0", b"\x1b[31m", b"\r", b"\n", b"\xff\xfe", b"\xef\xbb\xbf", b",", b"}", b"]", b'"', b"\\", b"a" * 10_000)


def _flip(data: bytes, draw: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 1, 2, 8))):
        changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def _cut_off(data: bytes, draw: random.Random) -> bytes:
    return data[: draw.randrange(len(data))]


def _slice(data: bytes, draw: random.Random) -> tuple[int, int]:
    start = draw.randrange(len(data))
    return start, min(len(data), start + draw.choice((1, 2, 4, 8, 64, 1024)))


def _delete(data: bytes, draw: random.Random) -> bytes:
    start, end = _slice(data, draw)
    return data[:start] + data[end:]


def _double(data: bytes, draw: random.Random) -> bytes:
    start, end = _slice(data, draw)
    return data[:end] + data[start:end] + data[end:]


def _insert(data: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(len(data))
    return data[:at] + draw.choice(INSERTS) + data[at:]


def _overwrite(data: bytes, draw: random.Random) -> bytes:
    """With the bytes of a number: counts and lengths of binary headers."""
    size = draw.choice((1, 2, 4, 8))
    value = draw.choice((0, 1, (1 << 8 * size) - 1, 1 << (8 * size - 1), draw.getrandbits(8 * size), 1 << 4 * size))
    at = draw.randrange(len(data))
    return (data[:at] + value.to_bytes(size, "little") + data[at + size :])[: max(len(data), 1)]


def _double_line(data: bytes, draw: random.Random) -> bytes:
    lines = data.split(b"\n")
    at = draw.randrange(len(lines))
    return b"\n".join([*lines[: at + 1], *lines[at:]])


def _delete_line(data: bytes, draw: random.Random) -> bytes:
    lines = data.split(b"\n")
    del lines[draw.randrange(len(lines))]
    return b"\n".join(lines)


def _replaced(pattern: "re.Pattern[bytes]", values: tuple[bytes, ...]) -> Callable[[bytes, random.Random], bytes]:
    def replace(data: bytes, draw: random.Random) -> bytes:
        found = list(pattern.finditer(data))
        if not found:
            return _flip(data, draw)
        one = draw.choice(found)
        return data[: one.start()] + draw.choice(values) + data[one.end() :]

    return replace


def _double_pair(data: bytes, draw: random.Random) -> bytes:
    """A key twice, or in another object."""
    found = list(_PAIR.finditer(data))
    if not found:
        return _double(data, draw)
    one, place = draw.choice(found), draw.choice(found)
    return data[: place.start()] + one.group() + b", " + data[place.start() :]


def _delete_pair(data: bytes, draw: random.Random) -> bytes:
    found = list(re.finditer(_PAIR.pattern + rb"\s*,?", data))
    if not found:
        return _delete(data, draw)
    one = draw.choice(found)
    return data[: one.start()] + data[one.end() :]


_BINARY = (_flip, _flip, _cut_off, _delete, _double, _insert, _overwrite, _overwrite)
_TEXT = (
    *(_flip, _cut_off, _delete, _double, _insert, _double_line, _delete_line, _double_pair, _delete_pair),
    *(_replaced(_NUMBER, NUMBERS), _replaced(_NUMBER, NUMBERS), _replaced(_VALUE, VALUES), _replaced(_VALUE, VALUES)),
)


def mutated(data: bytes, draw: random.Random, *, is_text: bool) -> bytes:
    """Another content, damaged once or a few times."""
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        data = draw.choice(_TEXT if is_text else _BINARY)(data, draw) or b"\0"
    return data

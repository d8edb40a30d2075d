"""The header of a GGUF file, checked against the file's size: what it counts must fit into the file before it is read.

Other readers trust the header: one that counts an array of 2^62 values, or 2^31 blocks, keeps them busy until the
memory is used up.
"""

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from dilap.core.documents import words_of
from dilap.core.errors import InvalidInput

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_ALIGNMENT = "general.alignment"
_LENGTH = struct.Struct("<Q")
_MAX_TEXT = 1 << 26  # bytes; a chat template has thousands
_MAX_NAME = 1 << 16
_SHORTEST_KEY, _SHORTEST_TENSOR = 8 + 4 + 1, 8 + 4 + 4 + 8  # bytes of an entry in the header
_MIN_BITS = 1.5  # the fewest that a weight takes in any format of llama.cpp


@dataclass(frozen=True, kw_only=True)
class GgufHeader:
    """What a header says: `metadata` by key, and the shape and the type of every tensor by its name.

    `kinds` has the type of every value of the metadata, and for an array that of its items, else None. `begins` says at
    which byte of the file a tensor begins.
    """

    metadata: dict[str, Any]
    kinds: dict[str, tuple[int, int | None]]
    shapes: dict[str, tuple[int, ...]]
    types: dict[str, int]
    begins: dict[str, int]

    @property
    def num_weights(self) -> int:
        return sum(map(math.prod, self.shapes.values()))


def read_header(path: Path, *, texts: bool = False) -> GgufHeader:
    """Read the header, with `texts` also arrays of texts, which are None in the metadata otherwise.

    Raises InvalidInput for a file that is no GGUF file or holds less than its header counts, and with `texts` for one
    with a text that is no UTF-8.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _read(_Reader(data, path, texts=texts))
    except (OSError, ValueError) as error:  # ValueError: an empty file
        raise InvalidInput(f"{path}: not a whole GGUF file: {words_of(error)}") from error


def _read(reader: "_Reader") -> GgufHeader:
    if reader.take(4) != b"GGUF":
        reader.fail("it does not begin with GGUF")
    version, num_tensors, num_keys = reader.unpack("I"), reader.unpack("Q"), reader.unpack("Q")
    if version not in (2, 3):
        reader.fail(f"it has version {version}, and 2 and 3 are read; is it big-endian?")
    reader.require(num_keys * _SHORTEST_KEY + num_tensors * _SHORTEST_TENSOR, f"{num_keys} keys, {num_tensors} tensors")
    metadata, kinds = {}, {}
    for _ in range(num_keys):
        key = reader.text(longest=_MAX_NAME)
        if key in metadata:
            reader.fail(f"the key {key!r:.80} is there twice")
        kind = reader.unpack("I")
        metadata[key], item = reader.value(kind)
        kinds[key] = kind, item
    tensors = [reader.tensor() for _ in range(num_tensors)]
    shapes, types = {name: shape for name, shape, *_ in tensors}, {name: kind for name, _, kind, _ in tensors}
    if len(shapes) < num_tensors:
        reader.fail("two tensors have one name")
    start = reader.aligned(metadata.get(_ALIGNMENT) or 32)
    begins = {name: start + offset for name, *_, offset in tensors}
    header = GgufHeader(metadata=metadata, kinds=kinds, shapes=shapes, types=types, begins=begins)
    if header.num_weights * _MIN_BITS / 8 > reader.num_bytes:
        reader.fail(f"its header lists {header.num_weights:,} weights, more than {reader.num_bytes:,} bytes hold")
    return header


class _Reader:
    """Reads a file piece by piece from its beginning, and never past its end.

    With `texts`, all texts are read and must be UTF-8; without, arrays of texts are stepped over.
    """

    def __init__(self, data: mmap.mmap, path: Path, *, texts: bool) -> None:
        self._data, self._path, self._at, self._texts = data, path, 0, texts
        self.num_bytes = len(data)

    def fail(self, reason: str) -> NoReturn:
        raise InvalidInput(f"{self._path}: not a whole GGUF file: {reason}")

    def require(self, num_bytes: int, what: str) -> None:
        if num_bytes > self.num_bytes - self._at:
            self.fail(f"it ends before {what}")

    def take(self, num_bytes: int) -> bytes:
        self.require(num_bytes, f"the {num_bytes:,} bytes that it counts at {self._at:,}")
        self._at += num_bytes
        return self._data[self._at - num_bytes : self._at]

    def unpack(self, kind: str) -> Any:
        return struct.unpack(f"<{kind}", self.take(struct.calcsize(f"<{kind}")))[0]

    def text(self, *, longest: int) -> str:
        if (length := self.unpack("Q")) > longest:
            self.fail(f"a text of {length:,} bytes at {self._at:,}")
        return self.take(length).decode("utf-8", "strict" if self._texts else "replace")

    def value(self, kind: int) -> tuple[Any, int | None]:
        """Return the value of one key, and the type of the items where it is an array."""
        if kind in _SCALARS:
            return self.unpack(_SCALARS[kind]), None
        if kind == _STRING:
            return self.text(longest=_MAX_TEXT), None
        if kind != _ARRAY:
            self.fail(f"a value of the unknown type {kind} at {self._at:,}")
        item, count = self.unpack("I"), self.unpack("Q")
        if item in _SCALARS:
            data = self.take(count * struct.calcsize(f"<{_SCALARS[item]}"))
            return struct.unpack(f"<{count}{_SCALARS[item]}", data), item
        if item != _STRING:
            self.fail(f"an array of the type {item} at {self._at:,}")
        self.require(8 * count, f"the {count:,} texts that it counts")
        if self._texts:
            return [self.text(longest=_MAX_TEXT) for _ in range(count)], item
        self._step_over_texts(count)
        return None, item

    def _step_over_texts(self, count: int) -> None:
        data, at, last = self._data, self._at, self.num_bytes - 8
        for _ in range(count):
            if at > last:
                self.fail(f"it ends before the {count:,} texts that it counts")
            at += 8 + _LENGTH.unpack_from(data, at)[0]
        self._at = at
        self.require(0, "the end of a text")

    def aligned(self, multiple: int) -> int:
        """Return where it stands, rounded up to a multiple."""
        if type(multiple) is not int or multiple < 1:
            self.fail(f"{_ALIGNMENT} is {multiple!r:.40}")
        return -(-self._at // multiple) * multiple

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """Return the name, the shape and the type of one tensor, and where it begins behind the header."""
        name, rank = self.text(longest=_MAX_NAME), self.unpack("I")
        if not 0 < rank <= 4:
            self.fail(f"the tensor {name!r:.80} has {rank} dimensions")
        shape = struct.unpack(f"<{rank}Q", self.take(8 * rank))
        kind, offset = self.unpack("I"), self.unpack("Q")
        return name, shape, kind, offset

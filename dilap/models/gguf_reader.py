"""The gguf package's reader, made fast: it makes an object of every token of a vocabulary, in half a minute."""

import functools
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import gguf
import numpy as np
from gguf import GGUFValueType
from transformers import modeling_gguf_pytorch_utils

_LONGEST = 4096  # items; lists with a value for every layer are shorter
_LENGTH = struct.Struct("<Q")


class QuickReader(gguf.GGUFReader):  # type: ignore[misc]
    """Reads a GGUF file; of long lists, such as a vocabulary, it has the name and no items."""

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple[int, list[Any], list[int], list[GGUFValueType]]:
        if raw_type == GGUFValueType.ARRAY:
            item, count = self._get(orig_offs, np.uint32), self._get(orig_offs + 4, np.uint64)
            if count[0] > _LONGEST:
                size = 12 + self._size_of(GGUFValueType(item[0]), int(count[0]), orig_offs + 12)
                return size, [item, count], [], [GGUFValueType.ARRAY, GGUFValueType(item[0])]
        found: tuple[int, list[Any], list[int], list[GGUFValueType]] = super()._get_field_parts(orig_offs, raw_type)
        return found

    def _size_of(self, kind: GGUFValueType, count: int, start: int) -> int:
        """Return how many bytes the items of a list take that begin at `start`."""
        if kind != GGUFValueType.STRING:
            return count * int(np.dtype(self.gguf_scalar_to_np[kind]).itemsize)
        at = start
        for _ in range(count):
            at += 8 + int(_LENGTH.unpack_from(self.data, at)[0])
        return at - start


@contextmanager
def quick_reading() -> Iterator[None]:
    """Let transformers, which imports its reader when it reads a file, read with `QuickReader`.

    Its progress bar is shown on a terminal alone.
    """
    own, bar = gguf.GGUFReader, modeling_gguf_pytorch_utils.tqdm
    gguf.GGUFReader, modeling_gguf_pytorch_utils.tqdm = QuickReader, functools.partial(bar, disable=None)
    try:
        yield
    finally:
        gguf.GGUFReader, modeling_gguf_pytorch_utils.tqdm = own, bar

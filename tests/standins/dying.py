"""A stand-in for a native library that may die: it kills the process that it is in."""

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dilap.core.errors import InvalidInput


class Fragile:
    """An object of the library, opened on a file."""

    def __init__(self, path: Path, *, scale: int = 1) -> None:
        if path.name == "fatal":
            os.kill(os.getpid(), signal.SIGSEGV)
        if path.name == "bad":
            raise InvalidInput(f"{path}: not a file of ours")
        self.path, self.path_name, self.scale = str(path), path.name, scale

    @property
    def process(self) -> int:
        return os.getpid()

    def table(self, rows: int, columns: int) -> NDArray[np.float32]:
        return np.arange(rows * columns, dtype=np.float32).reshape(rows, columns) * self.scale

    def total(self, numbers: Sequence[int]) -> int:
        print("printed by the library", flush=True)
        return sum(numbers)

    def fail(self) -> None:
        raise RuntimeError("first line\nsecond line")

    def die(self, signal_number: int) -> None:
        print("GGML_ASSERT(tile) failed", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal_number)


def crash(path: Path) -> None:
    """In the place of a library's function on a file."""
    os.kill(os.getpid(), signal.SIGSEGV)


def leave(status: int) -> None:
    os._exit(status)

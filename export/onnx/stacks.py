"""Matrices that are multiplied with the same vector, as one with the rows of all: one product takes less time."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dilap.export.onnx.emitter import Values
from dilap.export.onnx.matrices import Blocks


class Stacks:
    """Names for stacked tensors, and readers that know them. A path is a torch tensor's name without its last word."""

    def __init__(self) -> None:
        self._rows: dict[str, Mapping[str, int]] = {}

    def add(self, path: str, rows: Mapping[str, int]) -> str:
        """`path`, which from now on stands for those paths, with so many rows of each."""
        self._rows[path] = rows
        return path

    def of_values(self, read: Values) -> Values:
        def values(name: str, shape: tuple[int, ...]) -> NDArray[np.floating]:
            if parts := self._parts(name, shape):
                return np.concatenate([read(*part) for part in parts])
            return read(name, shape)

        return values

    def of_blocks(self, read: Blocks) -> Blocks:
        """Every row is quantised by itself, so that stacking comes to the same before and after."""

        def blocks(name: str, shape: tuple[int, int], bits: int) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
            if parts := self._parts(name, shape):
                values, scales = zip(*(read(*part, bits) for part in parts), strict=True)
                return np.concatenate(values), np.concatenate(scales)
            return read(name, shape, bits)

        return blocks

    def _parts(self, name: str, shape: tuple[int, ...]) -> list[tuple[str, Any]]:
        """Name and shape of each tensor in a stacked one."""
        path, _, word = name.rpartition(".")
        return [(f"{part}.{word}", (rows, *shape[1:])) for part, rows in self._rows.get(path, {}).items()]

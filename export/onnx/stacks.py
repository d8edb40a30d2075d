"""Matrices that are multiplied with the same vector, stacked into one: one product takes less time than several.

    stacks = Stacks()
    path = stacks.add("layers.0.mlp.gate_up_proj", {"layers.0.mlp.gate_proj": 1536, "layers.0.mlp.up_proj": 1536})
    values = stacks.of_values(read)
    values(f"{path}.weight", (3072, 576))  # the rows of gate_proj.weight, then those of up_proj.weight

`of_blocks` does the same for quantised matrices.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dilap.export.onnx.emitter import Values
from dilap.export.onnx.matrices import Blocks


class Stacks:
    """Remembers which tensors are stacked under which name, and extends readers of tensors to those names.

    A path is a torch tensor's name without its last word: `layers.0.mlp.up_proj` for `layers.0.mlp.up_proj.weight`.
    """

    def __init__(self) -> None:
        self._rows: dict[str, Mapping[str, int]] = {}

    def add(self, path: str, rows: Mapping[str, int]) -> str:
        """Let `path` stand for the paths in `rows`, stacked in this order with so many rows of each; return `path`."""
        self._rows[path] = rows
        return path

    def of_values(self, read: Values) -> Values:
        """Return a reader of tensors like `read` that also knows the stacked ones."""

        def values(name: str, shape: tuple[int, ...]) -> NDArray[np.floating]:
            if parts := self._parts(name, shape):
                return np.concatenate([read(*part) for part in parts])
            return read(name, shape)

        return values

    def of_blocks(self, read: Blocks) -> Blocks:
        """Return a reader of quantised matrices like `read` that also knows the stacked ones.

        Every row is quantised by itself, so it makes no difference that matrices are stacked after quantisation.
        """

        def blocks(name: str, shape: tuple[int, ...], bits: int) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
            if parts := self._parts(name, shape):
                values, scales = zip(*(read(*part, bits) for part in parts), strict=True)
                return np.concatenate(values), np.concatenate(scales)
            return read(name, shape, bits)

        return blocks

    def _parts(self, name: str, shape: tuple[int, ...]) -> list[tuple[str, Any]]:
        """Return name and shape of each tensor in a stacked one; none for a tensor that is not stacked."""
        path, _, word = name.rpartition(".")
        return [(f"{part}.{word}", (rows, *shape[1:])) for part, rows in self._rows.get(path, {}).items()]

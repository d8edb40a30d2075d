"""Random weights for models that are only timed."""

import zlib
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

_NUM_DRAWN = 1 << 16


class RandomWeights:
    """Random weights, N(0, 0.02). A small block of them is repeated, so that probes are written as fast as the disk.

    Each tensor starts at another place in the block, which depends on its name. Runtimes keep equal tensors only once
    (ExecuTorch in the file, ONNX Runtime when it packs them), and such a model would be read from the cache when timed.
    """

    def __init__(self, seed: int) -> None:
        draw = np.random.default_rng(seed)
        self._normal = draw.normal(0, 0.02, _NUM_DRAWN).astype(np.float32)
        self._bytes = draw.integers(0, 256, _NUM_DRAWN, np.uint8)

    def weights(self, name: str, shape: tuple[int, ...], dtype: DTypeLike = np.float32) -> NDArray[np.floating]:
        """Return random values for the tensor `name`; ones for a norm's weights and zeros for its biases.

        Such norms keep the activations as large as those of a trained model.
        """
        if "norm" in name:
            return np.zeros(shape, dtype) if name.endswith("bias") else np.ones(shape, dtype)
        return _repeated(self._normal.astype(dtype), name, shape)

    def bytes(self, name: str, shape: tuple[int, ...]) -> NDArray[np.uint8]:
        """Return uniformly random bytes, as codes of quantised weights."""
        return _repeated(self._bytes, name, shape)


def _repeated(block: NDArray[Any], name: str, shape: tuple[int, ...]) -> NDArray[Any]:
    return np.resize(np.roll(block, -zlib.crc32(name.encode())), shape)

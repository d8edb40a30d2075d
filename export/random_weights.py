"""Numbers for models that are only timed."""

import zlib
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

_NUM_DRAWN = 1 << 16


class RandomWeights:
    """N(0, 0.02) from one small block repeated, so that a probe is written at the speed of the disk.

    Each tensor starts elsewhere in the block, by its name: runtimes keep equal tensors once (ExecuTorch in the file,
    ONNX Runtime when it packs them), and such a model would be timed out of the cache.
    """

    def __init__(self, seed: int) -> None:
        draw = np.random.default_rng(seed)
        self._normal = draw.normal(0, 0.02, _NUM_DRAWN).astype(np.float32)
        self._bytes = draw.integers(0, 256, _NUM_DRAWN, np.uint8)

    def weights(self, name: str, shape: tuple[int, ...], dtype: DTypeLike = np.float32) -> NDArray[np.floating]:
        """A norm's are ones, and its biases zeros, which keeps the activations of a trained model's size."""
        if "norm" in name:
            return np.zeros(shape, dtype) if name.endswith("bias") else np.ones(shape, dtype)
        return _repeated(self._normal.astype(dtype), name, shape)

    def bytes(self, name: str, shape: tuple[int, ...]) -> NDArray[np.uint8]:
        """Uniform: the codes of quantised weights."""
        return _repeated(self._bytes, name, shape)


def _repeated(block: NDArray[Any], name: str, shape: tuple[int, ...]) -> NDArray[Any]:
    return np.resize(np.roll(block, -zlib.crc32(name.encode())), shape)

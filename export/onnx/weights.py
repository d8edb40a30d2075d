"""The numbers of an ONNX graph: a model's own, or random ones for timing."""

import functools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dilap.core.errors import Unavailable
from dilap.export.onnx.matrices import BLOCK
from dilap.export.random_weights import RandomWeights
from dilap.export.source_model import tensor

_Quantised = tuple[NDArray[np.uint8], NDArray[np.float32]]


class ModelWeights:
    """A torch model's tensors, converted one at a time; `values` and `blocks` are the readers that `build_model` takes.

    Quantised matrices are kept, because their bytes and their scales are read separately.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = tensors
        self.blocks = functools.cache(self._quantise)

    def values(self, name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """Return a tensor. Raises InvalidInput, naming it, where it is missing, not finite or of another shape."""
        array: NDArray[np.float32] = tensor(self._tensors, name, shape).numpy()
        return array

    def _quantise(self, name: str, shape: tuple[int, ...], bits: int) -> _Quantised:
        return quantise(self.values(name, shape).reshape(-1, shape[-1]), bits=bits)


class ProbeWeights:
    """Random weights for timing, with the same two readers as `ModelWeights`."""

    def __init__(self, seed: int) -> None:
        self._random = RandomWeights(seed)

    def values(self, name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
        return self._random.weights(name, shape)

    def blocks(self, name: str, shape: tuple[int, ...], bits: int) -> _Quantised:
        rows, num_blocks = math.prod(shape[:-1]), -(-shape[-1] // BLOCK)
        scales = np.full((rows, num_blocks), 0.06 / (1 << bits), np.float32)  # so that the largest weight is 0.03
        return self._random.bytes(name, (rows, num_blocks, BLOCK * bits // 8)), scales


def quantise(matrix: NDArray[np.float32], *, bits: int) -> _Quantised:
    """Quantise a matrix in symmetric blocks; return its bytes and scales. Raises Unavailable without ONNX Runtime.

    They are those of ONNX Runtime's MatMulNBitsQuantizer, which takes a whole model and needs it in memory twice.
    """
    values, scales, _ = _quantiser(bits).qbits_block_quant(np.ascontiguousarray(matrix.T))
    return values, scales


@functools.cache
def _quantiser(bits: int) -> Any:
    try:
        from onnxruntime.quantization import matmul_nbits_quantizer as library  # noqa: PLC0415 - slow, and not needed in f32
    except ImportError as error:
        raise Unavailable("ONNX Runtime is needed to quantise; pip install 'dilap[onnxruntime]'") from error
    config = library.DefaultWeightOnlyQuantConfig(block_size=BLOCK, is_symmetric=True, bits=bits)
    return library.DefaultWeightOnlyQuantizer(config)

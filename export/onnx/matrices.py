"""How the matrices of an ONNX graph are stored and multiplied: as floats, or in blocks of 8 or 4 bits."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from dilap.core.errors import Unsupported
from dilap.export.onnx.emitter import MICROSOFT, Emitter
from dilap.models.families.family import GATE, UP

# Reads one quantised matrix: its torch name, torch shape and bits -> its bytes (rows x blocks x bytes of a block) and
# its scales (rows x blocks). A tensor of experts has the rows of all of them.
Blocks = Callable[[str, tuple[int, ...], int], tuple[NDArray[np.uint8], NDArray[np.float32]]]
Sizes = tuple[int, int, int]  # experts, channels of one, hidden size

HEAD = "lm_head.weight"
BLOCK = 32  # channels that share a scale
# Columns of a panel. SmolLM2-135M's decode in f32, relative to whole matrices: panels of 16 columns take 0.97 of the
# time, of 32 and 48 0.93 to 0.94, of 64 0.98, of 96 1.13. With 32, products are as fast as memory is read; a prefill of
# 128 tokens takes 1.15 of the time.
_PANEL = 32  # divides every width that FFNs are cut to
_PANELS_FROM = 1 << 19  # weights of the smallest matrix that is stored in panels
# 4 rounds the activations to 8 bits, too. It is no switch, because 1 (f32) is never faster: with it, a decoded token of
# SmolLM2-135M in int4 with two threads takes 18.3 [17.3, 18.8] times as long as with 4, a prompt of 128 tokens 1.57
# [1.54, 1.62] times (AVX2, three starts); with AVX512-VNNI a token takes twice as long.
_ACCURACY_LEVEL = 4


class Matrices(Protocol):
    """How matrices are stored and multiplied: what Linear (without bias) and Embedding do in torch.

    A matrix has the name and the shape (rows x columns) that it has in torch.
    """

    def matmul(self, x: ir.Value, name: str, shape: tuple[int, int]) -> ir.Value:
        """Return `x` times the transposed matrix."""

    def gather(self, rows: ir.Value, name: str, shape: tuple[int, int]) -> ir.Value:
        """Return some rows of a matrix."""

    def tied_matmul(self, x: ir.Value, name: str, shape: tuple[int, int]) -> ir.Value:
        """Do as `matmul` for a matrix that `gather` reads as well: it is stored once, and transposed when loaded."""

    def mixture(self, x: ir.Value, scores: ir.Value, path: str, shape: Sizes, *, num_active: int) -> ir.Value:
        """Return what the experts at `path` give for `x` with the router's `scores` (tokens x experts).

        Those with the `num_active` highest scores are computed for a token.
        The weights of their outputs sum to 1.
        """


# Gate and up lie side by side, and silu(gate) * up is the SwiGLU in which beta is 0 and nothing is cut off.
_SWIGLU: Mapping[str, Any] = {
    "activation_type": "swiglu",
    "swiglu_fusion": 1,
    "activation_alpha": 1.0,
    "activation_beta": 0.0,
    "swiglu_limit": float(np.finfo(np.float32).max),
    "normalize_routing_weights": 1,  # without it QMoE computes the same on CPUs
}


class FloatMatrices:
    """Matrices as floats, stored transposed, as MatMul reads them."""

    def __init__(self, emitter: Emitter) -> None:
        self._emitter = emitter

    def matmul(self, x: ir.Value, name: str, shape: tuple[int, int]) -> ir.Value:
        return self._emitter.op("MatMul", x, self._emitter.weight(name, shape, transposed=True), name=name)

    def gather(self, rows: ir.Value, name: str, shape: tuple[int, int]) -> ir.Value:
        return self._emitter.op("Gather", self._emitter.weight(name, shape), rows)

    def tied_matmul(self, x: ir.Value, name: str, shape: tuple[int, int]) -> ir.Value:
        turned = self._emitter.op("Transpose", self._emitter.weight(name, shape), perm=[1, 0])
        return self._emitter.op("MatMul", x, turned, name=name)

    def mixture(self, x: ir.Value, scores: ir.Value, path: str, shape: Sizes, *, num_active: int) -> ir.Value:
        num_experts, channels, hidden = shape

        def read() -> NDArray[np.floating]:
            return _side_by_side(*(self._emitter.values(f"{path}.{half}", shape) for half in (GATE, UP)))

        first = self._emitter.lazy(f"{path}.gate_up", (num_experts, 2 * channels, hidden), self._emitter.dtype, read)
        last = self._emitter.weight(f"{path}.down_proj", (num_experts, hidden, channels))
        return self._emitter.op("MoE", x, scores, first, None, last, domain=MICROSOFT, k=num_active, **_SWIGLU)


class PanelMatrices(FloatMatrices):
    """Large matrices in panels of 32 columns, which are multiplied as a batch and then put together again.

    ONNX Runtime gives a batch to its threads piece by piece, but a single matrix in halves, one of which is ready late.
    """

    def matmul(self, x: ir.Value, name: str, shape: tuple[int, int]) -> ir.Value:
        if not _has_panels(shape):
            return super().matmul(x, name, shape)
        rows, columns = shape

        def read() -> NDArray[np.floating]:
            return self._emitter.values(name, shape).reshape(-1, _PANEL, columns).swapaxes(1, 2)

        panels = self._emitter.lazy(name, (rows // _PANEL, columns, _PANEL), self._emitter.dtype, read)
        return self._product(x, panels, name, rows)

    def tied_matmul(self, x: ir.Value, name: str, shape: tuple[int, int]) -> ir.Value:
        if not _has_panels(shape):
            return super().tied_matmul(x, name, shape)
        rows, columns = shape
        dims = self._emitter.integers(rows // _PANEL, _PANEL, columns)
        panels = self._emitter.op("Reshape", self._emitter.weight(name, shape), dims)
        return self._product(x, self._emitter.op("Transpose", panels, perm=[0, 2, 1]), name, rows)

    def _product(self, x: ir.Value, panels: ir.Value, name: str, rows: int) -> ir.Value:
        """Multiply `x` (B x S x columns) by the panels (panels x columns x 32); return B x S x rows."""
        batch = self._emitter.op("Unsqueeze", x, self._emitter.integers(1))
        products = self._emitter.op("MatMul", batch, panels, name=name)
        turned = self._emitter.op("Transpose", products, perm=[0, 2, 1, 3])
        return self._emitter.op("Reshape", turned, self._emitter.integers(0, 0, rows))


def _has_panels(shape: tuple[int, int]) -> bool:
    """Return whether panels pay: a small matrix gains less than the three nodes around its product cost."""
    return shape[0] % _PANEL == 0 and shape[0] * shape[1] >= _PANELS_FROM


def _side_by_side(*parts: NDArray[Any]) -> NDArray[Any]:
    """Return 3-D tensors with their rows side by side: the first row of each, then the second."""
    return np.stack(parts, axis=2).reshape(len(parts[0]), -1, parts[0].shape[2])


class BlockMatrices:
    """Matrices quantised to 8 or 4 bits in symmetric blocks of 32 weights, which MatMulNBits multiplies."""

    # Why no dynamic 8-bit quantisation (`quantize_dynamic`): it decodes as fast, and is two to six times as fast in a
    # prefill of 128, but it gives all activations of a prompt one scale, and SmolLM2-135M does not survive that: KL to
    # torch 0.85 (SQNR 6 dB) against 0.007 (25 dB) with blocks of 8 bits.

    def __init__(self, emitter: Emitter, blocks: Blocks, bits: int) -> None:
        self._emitter, self._blocks, self._bits = emitter, blocks, bits

    def matmul(self, x: ir.Value, name: str, shape: tuple[int, int]) -> ir.Value:
        dims = (shape[0], -(-shape[1] // BLOCK), BLOCK * self._bits // 8)
        return self._product(x, self._bytes(name, shape, dims), name, shape)

    def gather(self, rows: ir.Value, name: str, shape: tuple[int, int]) -> ir.Value:
        return self._emitter.op(
            "GatherBlockQuantized",
            self._table(name, shape),
            rows,
            self._scales(name, shape),
            domain=MICROSOFT,
            bits=self._bits,
            block_size=BLOCK,
            quantize_axis=1,
        )

    def tied_matmul(self, x: ir.Value, name: str, shape: tuple[int, int]) -> ir.Value:
        dims = self._emitter.integers(shape[0], shape[1] // BLOCK, BLOCK * self._bits // 8)
        return self._product(x, self._emitter.op("Reshape", self._table(name, shape), dims), name, shape)

    def mixture(self, x: ir.Value, scores: ir.Value, path: str, shape: Sizes, *, num_active: int) -> ir.Value:
        num_experts, channels, hidden = shape
        halves = [(f"{path}.{half}", shape) for half in (GATE, UP)]
        parts = [self._expert_blocks(f"{path}.gate_up", halves, (num_experts, 2 * channels, hidden))]
        down = f"{path}.down_proj", (num_experts, hidden, channels)
        parts.append(self._expert_blocks(down[0], [down], down[1]))
        inputs = [value for values, scales in parts for value in (values, scales, None)]
        return self._emitter.op(
            "QMoE",
            x,
            scores,
            *inputs,
            domain=MICROSOFT,
            k=num_active,
            expert_weight_bits=self._bits,
            block_size=BLOCK,
            **_SWIGLU,
        )

    def _expert_blocks(
        self, name: str, parts: Sequence[tuple[str, tuple[int, ...]]], shape: Sizes
    ) -> tuple[ir.Value, ir.Value]:
        """Return bytes and scales of the experts' matrices (experts x rows x columns) of `parts`, rows side by side."""
        num_experts, rows, columns = shape
        per_byte = 8 // self._bits

        def read(index: int) -> NDArray[np.generic]:
            found = [self._blocks(*part, self._bits)[index] for part in parts]
            return _side_by_side(*(one.reshape(num_experts, rows // len(parts), -1) for one in found))

        values = (num_experts, rows, columns // per_byte)
        scales = (num_experts, rows, columns // BLOCK)
        return (
            self._emitter.lazy(f"{name}.int{self._bits}", values, ir.DataType.UINT8, lambda: read(0)),
            self._emitter.lazy(f"{name}.scales", scales, self._emitter.dtype, lambda: read(1)),
        )

    def _product(self, x: ir.Value, values: ir.Value, name: str, shape: tuple[int, int]) -> ir.Value:
        return self._emitter.op(
            "MatMulNBits",
            x,
            values,
            self._scales(name, shape),
            name=name,
            domain=MICROSOFT,
            K=shape[1],
            N=shape[0],
            bits=self._bits,
            block_size=BLOCK,
            accuracy_level=_ACCURACY_LEVEL,
        )

    def _table(self, name: str, shape: tuple[int, int]) -> ir.Value:
        if shape[1] % BLOCK:
            raise Unsupported(f"{name}: ONNX Runtime's quantised embedding needs a width of {BLOCK} n, got {shape[1]}")
        return self._bytes(name, shape, (shape[0], shape[1] * self._bits // 8))

    def _bytes(self, name: str, shape: tuple[int, int], dims: tuple[int, ...]) -> ir.Value:
        bits = self._bits
        return self._emitter.lazy(
            f"{name}.int{bits}", dims, ir.DataType.UINT8, lambda: self._blocks(name, shape, bits)[0].reshape(dims)
        )

    def _scales(self, name: str, shape: tuple[int, int]) -> ir.Value:
        dims = (shape[0], -(-shape[1] // BLOCK))
        return self._emitter.lazy(
            f"{name}.scales", dims, self._emitter.dtype, lambda: self._blocks(name, shape, self._bits)[1]
        )

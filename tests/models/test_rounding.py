"""Weights rounded in torch are what the runtimes' own quantisers store."""

import ctypes
import importlib
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dilap import backends
from dilap.backends.llamacpp.library import library
from dilap.core.errors import InvalidInput
from dilap.models.rounding import FORMATS, rounded

GGML_TYPES = {"q8_0": 8, "q5_0": 6, "q4_0": 2, "iq4_nl": 20}
ONNX_BITS = {"int8": 8, "int4": 4}
BACKENDS = dict.fromkeys(GGML_TYPES, "llamacpp") | dict.fromkeys(ONNX_BITS, "onnxruntime")
BACKENDS |= {"8da4w": "executorch", "8da8w": "executorch"}


def stored(weight: torch.Tensor, precision: str) -> torch.Tensor:
    """Return what the runtime's own quantiser makes of a matrix."""
    if reason := backends.get(BACKENDS[precision]).unavailable():
        pytest.skip(reason)
    if precision in GGML_TYPES:
        return stored_by_ggml(weight, precision)
    if precision in ONNX_BITS:
        return stored_by_onnx_runtime(weight, ONNX_BITS[precision])
    return stored_by_torchao(weight, precision)


def stored_by_ggml(weight: torch.Tensor, precision: str) -> torch.Tensor:
    gguf = importlib.import_module("gguf")
    library()
    ggml = importlib.import_module("llama_cpp._ggml").libggml
    kind = gguf.GGMLQuantizationType(GGML_TYPES[precision])
    rows = weight.float().contiguous().numpy()
    packed = np.empty(gguf.quant_shape_to_byte_shape(rows.shape, kind), np.uint8)
    quantise = ggml.ggml_quantize_chunk
    quantise.restype, quantise.argtypes = ctypes.c_size_t, [ctypes.c_int, *[ctypes.c_void_p] * 2]
    quantise.argtypes += [*[ctypes.c_int64] * 3, ctypes.c_void_p]
    size = quantise(kind.value, rows.ctypes.data, packed.ctypes.data, 0, *rows.shape, None)
    assert size == packed.nbytes
    return torch.from_numpy(gguf.quants.dequantize(packed, kind))


def stored_by_onnx_runtime(weight: torch.Tensor, bits: int) -> torch.Tensor:
    quantise = importlib.import_module("dilap.export.onnx.weights").quantise
    values, scales = quantise(weight.float().numpy(), bits=bits)
    if bits == 4:
        values = np.stack([values & 15, values >> 4], axis=-1).reshape(*values.shape[:2], -1)
    floats = (values.astype(np.float32) - (1 << (bits - 1))) * scales[..., None]
    return torch.from_numpy(floats.reshape(len(weight), -1)[:, : weight.shape[1]])


def stored_by_torchao(weight: torch.Tensor, precision: str) -> torch.Tensor:
    linear = nn.Linear(weight.shape[1], len(weight), bias=False)
    linear.weight = nn.Parameter(weight.float())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what ExecuTorch and torch deprecate among themselves is not ours to mend
        importlib.import_module("dilap.export.executorch.quantisation").quantise_linear_(linear, precision=precision)
    quantised: Any = linear.weight
    dequantised: torch.Tensor = quantised.dequantize()
    return dequantised.detach()


def normal(seed: int, num_rows: int = 48, num_columns: int = 256) -> torch.Tensor:
    return torch.randn(num_rows, num_columns, generator=torch.Generator().manual_seed(seed))


def extremes() -> torch.Tensor:
    """Blocks that are special in some way."""
    weight = normal(1)
    weight[0:4] = 0
    weight[4:8, 40:] = 0
    weight[8:10] = weight[8:10].abs()
    weight[10:12] = -weight[10:12].abs()
    weight[12:16] *= torch.logspace(-35, -3, 4)[:, None]
    weight[16:20] *= torch.logspace(1, 5, 4)[:, None]
    weight[20:24] = weight[20:24].round()  # weights that are equally large, of both signs
    weight[24:28] = (weight[24:28] * 8).round() / 8  # and many that lie halfway between two codes
    weight[28:32] = torch.randint(-1, 2, (4, 256), generator=torch.Generator().manual_seed(2)).float()
    weight[32:36, ::3] *= 1e-3
    weight[36:40] = weight[36:40] ** 3
    weight[40:44, 5] = -40
    weight[44:48] = torch.arange(-128.0, 128.0)
    return weight


@pytest.mark.parametrize("precision", FORMATS)
def test_rounded_weights_are_those_that_the_runtime_stores(precision: str) -> None:
    weight = normal(0)
    assert torch.equal(rounded(weight, precision), stored(weight, precision))


@pytest.mark.parametrize("precision", FORMATS)
def test_special_blocks_are_rounded_as_the_runtime_does(precision: str) -> None:
    weight = extremes()
    assert torch.equal(rounded(weight, precision), stored(weight, precision))


@pytest.mark.parametrize("precision", ["int8", "int4", "8da4w"])
def test_rows_that_no_block_divides_are_rounded_as_the_runtime_does(precision: str) -> None:
    weight = normal(3)[:, :72].contiguous()
    assert torch.equal(rounded(weight, precision), stored(weight, precision))


def test_rows_that_no_block_divides_stay_halves_in_llama_cpp() -> None:
    weight = normal(4)[:, :72]
    assert torch.equal(rounded(weight, "q4_0"), weight.half().float())


@pytest.mark.parametrize(
    ("precision", "dtype"), [("f32", torch.float32), ("f16", torch.float16), ("bf16", torch.bfloat16)]
)
def test_floats_are_cast(precision: str, dtype: torch.dtype) -> None:
    weight = normal(5)
    assert torch.equal(rounded(weight, precision), weight.to(dtype).float())


def test_half_a_matrix_is_rounded_like_the_same_in_f32() -> None:
    half = normal(6).half()
    assert torch.equal(rounded(half, "q4_0"), rounded(half.float(), "q4_0"))


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(InvalidInput, match=r"q3_K.*q4_0"):
        rounded(normal(7), "q3_K")

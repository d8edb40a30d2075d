"""Weights rounded in torch are what the runtimes' own quantisers store, and those rounded well are kept by them."""

import ctypes
import importlib
import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dilap import backends
from dilap.backends.llamacpp.library import library
from dilap.core.errors import InvalidInput
from dilap.models.rounding import BLOCK, FORMATS, SHARES, Format, compensated, is_on_grid, rounded

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


OF_BLOCKS = [precision for precision, form in FORMATS.items() if not form.whole_row]


def correlated(seed: int, num_columns: int = 256) -> torch.Tensor:
    """Return the Gram matrix of inputs that vary together, some more than others."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(num_columns, num_columns, generator=generator) * torch.logspace(0.5, -1.5, num_columns)
    inputs = torch.randn(2 * num_columns, num_columns, generator=generator) @ mixing.T
    return inputs.T @ inputs


def error(weight: torch.Tensor, other: torch.Tensor, gram: torch.Tensor) -> float:
    change = (weight - other).double()
    return float((change @ gram.double() * change).sum())


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("precision", OF_BLOCKS)
def test_rounding_leaves_compensated_weights_as_they_are(precision: str, seed: int) -> None:
    found = compensated(normal(seed), correlated(seed), precision)
    assert torch.equal(rounded(found, precision), found)


@pytest.mark.parametrize("precision", OF_BLOCKS)
def test_special_blocks_are_kept_too(precision: str) -> None:
    found = compensated(extremes(), correlated(0), precision)
    assert found.isfinite().all()
    assert torch.equal(rounded(found, precision), found)


@pytest.mark.parametrize("precision", OF_BLOCKS)
def test_the_runtime_stores_compensated_weights_as_they_are(precision: str) -> None:
    found = compensated(normal(8), correlated(8), precision)
    # GGUF files are written in f16 before they are quantised.
    given = found.half() if precision in GGML_TYPES else found
    assert torch.equal(stored(given, precision), found)


@pytest.mark.parametrize("precision", OF_BLOCKS)
def test_compensation_halves_the_error_of_outputs(precision: str) -> None:
    weight, gram = normal(9), correlated(9)
    plain, found = rounded(weight, precision), compensated(weight, gram, precision)
    assert error(weight, found, gram) < error(weight, plain, gram) / 2


@pytest.mark.parametrize("precision", ["q4_0", "iq4_nl", "int4", "8da4w"])
def test_without_correlations_scales_are_chosen_by_importance(precision: str) -> None:
    weight, gram = normal(10), torch.logspace(0, -2, 16).repeat(16).diag()
    plain, found = rounded(weight, precision), compensated(weight, gram, precision)
    assert error(weight, found, gram) < 0.9 * error(weight, plain, gram)


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_rows_that_no_block_divides_are_compensated(precision: str) -> None:
    weight, gram = normal(11)[:, :72], correlated(11, 72)
    found = compensated(weight, gram, precision)
    assert torch.equal(rounded(found, precision), found)
    assert error(weight, found, gram) < error(weight, rounded(weight, precision), gram) / 2


def test_rows_that_llama_cpp_keeps_as_halves_are_not_compensated() -> None:
    weight, gram = normal(12)[:, :72], correlated(12, 72)
    assert torch.equal(compensated(weight, gram, "q4_0"), weight.half().float())


def test_inputs_that_are_always_zero_do_no_harm() -> None:
    weight, gram, dead = normal(13), correlated(13), slice(64, 96)
    gram[dead] = 0
    gram[:, dead] = 0
    plain, found = rounded(weight, "q4_0"), compensated(weight, gram, "q4_0")
    assert error(weight, found, gram) < error(weight, plain, gram) / 2
    assert (weight - found)[:, dead].square().sum() <= (weight - plain)[:, dead].square().sum()


def test_without_any_inputs_weights_are_rounded_on_their_own() -> None:
    weight = normal(14)
    found = compensated(weight, torch.zeros(256, 256), "q4_0")
    assert error(weight, found, torch.eye(256)) <= error(weight, rounded(weight, "q4_0"), torch.eye(256))


def test_weights_are_on_the_grid_only_once_rounded() -> None:
    weight = normal(15)
    assert not is_on_grid(weight, "q4_0")
    assert is_on_grid(rounded(weight, "q4_0"), "q4_0")


def reference(weight: torch.Tensor, gram: torch.Tensor, precision: str) -> torch.Tensor:
    """Compensate row by row and column by column, all others at once, with the inverse of what is left (in f64)."""
    form, weight, gram = FORMATS[precision], weight.double(), gram.double()
    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    found = torch.empty_like(weight)
    for row, into in zip(weight, found, strict=True):
        left, inverse = row.clone(), damped.inverse()
        for block in sorted(range(len(row) // BLOCK), key=lambda b: -gram.diagonal()[BLOCK * b :][:BLOCK].sum()):
            columns = sorted(range(BLOCK * block, BLOCK * (block + 1)), key=lambda c: -gram[c, c])
            tries = [_compensated_once(left, inverse, columns, form, one) for one in _scales(left, columns, form)]
            tries = [
                one
                for one in tries
                if is_on_grid(one[1][columns[0] // BLOCK * BLOCK :][:BLOCK][None].float(), precision)
            ]
            _, values, left, inverse = min(tries, key=lambda one: one[0])
            into[columns] = values[columns]
    return found.float()


def _scales(left: torch.Tensor, columns: list[int], form: Format) -> list[tuple[float, int, float]]:
    """Return scales to try, each with the column that keeps the largest code, and that code."""
    high, low = max(columns, key=lambda c: left[c]), min(columns, key=lambda c: left[c])
    whole = [(float(left[column]) / code, column, code) for column, code in zip((high, low), form.anchors, strict=True)]
    tries = [(share * scale, column, code) for share in SHARES for scale, column, code in whole]
    four_bits = [(round(math.frexp(s)[0] * 16) / 16 * 2 ** math.frexp(s)[1], column, code) for s, column, code in whole]
    as_stored = [float(torch.tensor(scale).to(form.scale_type)) for scale, _, _ in tries + four_bits]
    return [(scale, *one[1:]) for scale, one in zip(as_stored, tries + four_bits, strict=True)]


def _compensated_once(
    left: torch.Tensor, inverse: torch.Tensor, columns: list[int], form: Format, choice: tuple[float, int, float]
) -> tuple[float, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the loss, the values, and the weights and the inverse that are left after the columns of a block."""
    left, inverse, values, loss = left.clone(), inverse.clone(), torch.zeros_like(left), 0.0
    scale, anchor, code = choice
    codes = form.nearest(torch.arange(4 * form.least, 4 * form.most) / 4).clamp(form.least, form.most).unique().double()
    for column in columns:
        nearest = float(codes[(codes - left[column] / scale).abs().argmin()])
        values[column] = (code if column == anchor else nearest) * scale
        change, pivot = left[column] - values[column], inverse[column, column].clone()
        loss += float(change**2 / pivot)
        left -= change / pivot * inverse[column]
        inverse -= torch.outer(inverse[:, column], inverse[column]) / pivot
    return loss, values, left, inverse


@pytest.mark.parametrize("precision", OF_BLOCKS)
def test_compensation_does_what_the_plain_method_does(precision: str) -> None:
    weight, gram = normal(16, num_rows=2, num_columns=64), correlated(16, 64)
    assert torch.equal(compensated(weight, gram, precision), reference(weight, gram, precision))

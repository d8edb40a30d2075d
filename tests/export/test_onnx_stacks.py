"""Stacked matrices of an ONNX graph."""

import numpy as np
import pytest

from dilap.export.onnx.stacks import Stacks
from dilap.export.onnx.weights import quantise

ROWS = {"layer.query": 64, "layer.key": 32, "layer.value": 32}


@pytest.fixture
def stacks() -> Stacks:
    stacks = Stacks()
    assert stacks.add("layer.qkv", ROWS) == "layer.qkv"
    return stacks


def values(name: str, shape: tuple[int, ...]) -> np.ndarray:
    seed = {"layer.query": 1, "layer.key": 2, "layer.value": 3}.get(name.rpartition(".")[0], 4)
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize(("word", "rest"), [("weight", (96,)), ("bias", ())])
def test_a_stack_has_its_parts_rows_in_their_order(stacks: Stacks, word: str, rest: tuple[int, ...]) -> None:
    stacked = stacks.of_values(values)(f"layer.qkv.{word}", (128, *rest))
    parts = np.split(stacked, [64, 96])
    for part, (path, rows) in zip(parts, ROWS.items(), strict=True):
        np.testing.assert_array_equal(part, values(f"{path}.{word}", (rows, *rest)))


def test_other_tensors_are_read_as_they_are(stacks: Stacks) -> None:
    np.testing.assert_array_equal(stacks.of_values(values)("head.weight", (4, 3)), values("head.weight", (4, 3)))


@pytest.mark.parametrize("bits", [4, 8])
def test_quantising_a_stack_is_stacking_what_was_quantised(stacks: Stacks, bits: int) -> None:
    read = stacks.of_blocks(lambda name, shape, bits: quantise(values(name, shape), bits=bits))
    whole = quantise(stacks.of_values(values)("layer.qkv.weight", (128, 96)), bits=bits)
    for got, wanted in zip(read("layer.qkv.weight", (128, 96), bits), whole, strict=True):
        np.testing.assert_array_equal(got, wanted)

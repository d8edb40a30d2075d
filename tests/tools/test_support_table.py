"""The README's table of what is supported is what the backends declare, and what they declare is so."""

import importlib
from pathlib import Path
from typing import Any

import pytest
from standins import ROOT

from dilap import backends

tool: Any = importlib.import_module("tools.support_table")
# The tool tries every pair; these are a kind each: unequal widths, equal ones, none. ExecuTorch is in its own tests.
PAIRS = [
    ("llama", "llamacpp", "q4_0"),
    ("qwen3", "llamacpp", "q8_0"),
    ("olmo2", "llamacpp", "q8_0"),
    ("smollm3", "llamacpp", "q8_0"),
    ("qwen3_moe", "llamacpp", "q8_0"),
    ("gemma2", "llamacpp", "q4_0"),
    ("gemma3_text", "llamacpp", "q8_0"),
    ("opt", "llamacpp", "f16"),
    ("qwen3", "onnxruntime", "int4"),
    ("qwen3_moe", "onnxruntime", "int4"),
    ("opt", "onnxruntime", "f32"),
    ("qwen3_moe", "executorch", "f32"),
    ("qwen3_moe", "tensorrt", "f16"),
]


def test_the_readme_has_the_table_of_the_tool() -> None:
    assert tool.table(tool.declared_pairs()) in (ROOT / "backends" / "README.md").read_text(encoding="utf-8")


@pytest.mark.filterwarnings("ignore:::torch", "ignore:::torchao", "ignore:::executorch", "ignore:::copyreg")
@pytest.mark.parametrize(("family", "backend", "precision"), PAIRS)
def test_a_pair_does_what_is_declared(family: str, backend: str, precision: str, tmp_path: Path) -> None:
    if reason := backends.get(backend).unavailable():
        pytest.skip(reason)
    tool.try_out(tool.declared(family, backend, precision), tmp_path)


NETWORKS = [
    ("roberta", "onnxruntime", "f32"),
    ("xlm-roberta", "onnxruntime", "int8"),
    ("regnet", "onnxruntime", "f32"),
    ("efficientnet", "tensorrt", "f16"),
    ("bert", "tensorrt", "f16"),
]


def test_the_readme_has_the_table_of_networks() -> None:
    assert tool.table(tool.declared_networks()) in (ROOT / "backends" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(("family", "backend", "precision"), NETWORKS)
def test_a_network_does_what_is_declared(family: str, backend: str, precision: str, tmp_path: Path) -> None:
    if backend == "tensorrt":  # whose files are compiled here, by TensorRT for RTX, and run by a device
        pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT for RTX is not installed")
    elif reason := backends.get(backend).unavailable():
        pytest.skip(reason)
    tool.try_out_network(tool.declared_network(family, backend, precision), tmp_path)


def test_a_trial_notices_a_network_that_is_held_against_the_declaration(tmp_path: Path) -> None:
    pair = tool.Pair(family="convnext", backend="onnxruntime", precision="f32", plans="no", reason="made up")
    with pytest.raises(tool.VerificationFailed, match="which it says it cannot hold"):
        tool.try_out_network(pair, tmp_path)


def test_a_trial_notices_what_is_held_against_the_declaration(tmp_path: Path) -> None:
    pair = tool.Pair(family="llama", backend="onnxruntime", precision="f32", plans="no", reason="made up")
    with pytest.raises(tool.VerificationFailed, match="which it says it cannot hold"):
        tool.try_out(pair, tmp_path)


def test_a_trial_notices_a_plan_that_is_not_held(tmp_path: Path) -> None:
    with pytest.raises(tool.Unsupported, match=r"layers\.1\.channels is removed"):
        tool.try_out(tool.Pair(family="qwen3", backend="llamacpp", precision="f16", plans="any plan"), tmp_path)

"""Whole jobs on a model with experts, through the Python interface."""

from pathlib import Path

import pytest
from standins.fake_job import prune_tiny
from standins.models import tiny_model, tiny_tokenizer

from dilap import backends
from dilap.core.errors import Unsupported
from dilap.job.result import PruneResult
from dilap.models.anatomy import architecture_of
from dilap.models.load import load, save_checkpoint


@pytest.fixture
def experts(tmp_path: Path) -> Path:
    """A checkpoint of a tiny model with experts."""
    words = tiny_tokenizer(tmp_path / "words")
    save_checkpoint(tiny_model("qwen3_moe"), words, tmp_path / "experts")
    return tmp_path / "experts"


def numbers_of_experts(result: PruneResult) -> list[int]:
    return [layer.num_channels // 32 for layer in result.pruned.artifact.decoder.layers]


def require(backend: str) -> None:
    if reason := backends.get(backend).unavailable():
        pytest.skip(reason)


@pytest.mark.usefixtures("fake_device")
def test_a_budget_leaves_llamacpp_equally_many_experts_in_every_layer(
    experts: Path, corpus: Path, tmp_path: Path
) -> None:
    require("llamacpp")
    result = prune_tiny(experts, corpus, tmp_path / "run", budget="80%", method="dilap", precision="q8_0")
    assert result.status == "kept"
    assert result.pruned.artifact.details["architecture"] == "qwen3moe"
    assert len(set(numbers_of_experts(result))) == 1
    checkpoint = load(str(tmp_path / "run")).model
    assert type(checkpoint).__name__ == "Qwen3MoeForCausalLM"
    assert architecture_of(checkpoint) == result.pruned.artifact.decoder


def test_a_ratio_keeps_as_many_experts_as_every_layer_needs_in_onnxruntime(
    experts: Path, corpus: Path, tmp_path: Path
) -> None:
    require("onnxruntime")
    asked = {"backend": "onnxruntime", "precision": "f32", "estimate": True, "target": "jetson_cpu"}
    result = prune_tiny(experts, corpus, tmp_path / "run", budget=None, ratio=0.3, method="dilap", **asked)
    dense, pruned = result.dense.artifact.decoder, result.pruned.artifact.decoder
    kept = sum(map(pruned.attention_parameters, pruned.layers)) + sum(map(pruned.ffn_parameters, pruned.layers))
    whole = sum(map(dense.attention_parameters, dense.layers)) + sum(map(dense.ffn_parameters, dense.layers))
    assert 0.6 < kept / whole <= 0.7
    assert (result.pruned.artifact.sqnr_db or 0) > 100


def test_a_runtime_without_experts_is_refused_before_anything_runs(experts: Path, corpus: Path, tmp_path: Path) -> None:
    require("executorch")
    with pytest.raises(Unsupported, match="no operator that sends tokens to experts"):
        prune_tiny(experts, corpus, tmp_path / "run", backend="executorch", precision="f32")
    assert not (tmp_path / "run").exists()

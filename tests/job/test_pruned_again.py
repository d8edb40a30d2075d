"""A pruned model, whose layers have widths of their own, is pruned again."""

from pathlib import Path
from typing import Any

import pytest
from standins.fake_job import FinishedJob
from standins.models import FAMILIES, Kept, logits, masked_, plan_for, random_tokens, tiny_model
from torch.testing import assert_close
from transformers import PreTrainedModel

import dilap
from dilap.core.codec import decode, read_json
from dilap.core.plan import Plan
from dilap.models.anatomy import architecture_of
from dilap.models.cut import shrink_

FIRST: Kept = {"layers.0.channels": tuple(range(64)), "layers.1.kv_groups": (), "layers.2.channels": tuple(range(32))}
SECOND: Kept = {"layers.0.channels": tuple(range(8, 40)), "layers.2.kv_groups": (1,)}


def pruned(family: str) -> PreTrainedModel:
    model = tiny_model(family)
    return shrink_(model, plan_for(model, FIRST))


@pytest.mark.parametrize("family", FAMILIES)
def test_masked_equals_cut(family: str) -> None:
    plan, tokens = plan_for(pruned(family), SECOND), random_tokens(2, 12)
    found = logits(shrink_(pruned(family), plan), tokens)
    assert_close(found, logits(masked_(pruned(family), plan), tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_block_that_is_gone_is_no_block(family: str) -> None:
    names = [block.name for block in architecture_of(pruned(family)).blocks]
    assert "layers.1.attention" not in names
    assert len(names) == 5


def test_widths_that_become_equal_are_a_stock_model_again() -> None:
    model = tiny_model("llama")
    shrink_(model, plan_for(model, {"layers.0.channels": tuple(range(64))}))
    equal: Kept = {f"layers.{layer}.channels": tuple(range(64)) for layer in (1, 2)}
    shrink_(model, plan_for(model, equal))
    assert type(model).__name__ == "LlamaForCausalLM"
    assert not hasattr(model.config, "layer_widths")


@pytest.mark.usefixtures("fake_device")
@pytest.mark.parametrize("method", ["dilap", "flap", "llm_pruner", "puzzle", "sleb"])
def test_a_run_is_pruned_again_by_a_job(method: str, finished: FinishedJob, tmp_path: Path) -> None:
    options: dict[str, Any] = {"calib": str(finished.corpus), "eval_text": str(finished.corpus), "method": method}
    options |= {"evaluations": 2, "step": 0.3, "calib_length": 32, "context": 64, "precision": "f16"}
    options["progress"] = lambda _: None
    first = dilap.prune(
        str(finished.checkpoint), budget="80%", out=tmp_path / "first", **(options | {"method": "dilap"})
    )
    again = dilap.prune(str(tmp_path / "first"), budget="85%", out=tmp_path / "again", **options)
    assert again.pruned.parameters < first.pruned.parameters == again.dense.parameters
    plan = decode(Plan, read_json(tmp_path / "again" / "plan.json"), source="plan.json")
    assert plan.architecture == first.pruned.artifact.decoder

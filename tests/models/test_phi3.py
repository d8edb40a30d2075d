"""Phi-3: fused matrices are cut and exported by their parts, and a head may be turned in part."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from standins.models import (
    byte_level_tokenizer,
    compensated_model,
    exported_llama,
    logits,
    logits_with_cache,
    masked_,
    plan_for,
    pruned_model,
    random_tokens,
    tiny_model,
    tiny_tokenizer,
)
from torch.testing import assert_close

from dilap import backends, export
from dilap.backends import readers
from dilap.core.groups import indices_kept
from dilap.models.anatomy import blocks_of, exported_tensors, numerics_of
from dilap.models.cut import shrink_
from dilap.models.families import family_of
from dilap.models.load import save_checkpoint

TOKENS = random_tokens(2, 12)
WHOLE = {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 1.0}}


def longrope(*, turned: int, **changes: Any) -> dict[str, Any]:
    """Changes of a tiny Phi-3: of 16 channels of a head, so many are turned, and otherwise in texts of more than 64."""
    rope = {"rope_type": "longrope", "rope_theta": 5000.0, "partial_rotary_factor": turned / 16}
    rope["short_factor"] = [1 + 0.2 * i for i in range(turned // 2)]
    rope["long_factor"] = [3.0 + i for i in range(turned // 2)]
    return {"rope_parameters": {**rope, **changes}, "original_max_position_embeddings": 64}


def test_parts_of_a_fused_matrix_keep_their_own_rows() -> None:
    """4 query heads on 2 KV heads of 16: rows 0 to 63 are queries, 64 to 95 keys, 96 to 127 values."""
    attention, ffn = blocks_of(tiny_model("phi3"))[:2]
    kept = indices_kept(attention.groups, {"layers.0.kv_groups": (1,), "layers.0.query_slots": (0,)})
    rows = kept["model.layers.0.self_attn.qkv_proj.weight", 0]
    assert rows.tolist() == [*range(32, 48), *range(80, 96), *range(112, 128)]
    kept = indices_kept(ffn.groups, {"layers.0.channels": (0, 5)})
    assert kept["model.layers.0.mlp.gate_up_proj.weight", 0].tolist() == [0, 5, 96, 101]


KEPT: dict[str, dict[str, tuple[int, ...]]] = {
    "heads": {"layers.1.kv_groups": (1,), "layers.2.query_slots": (0,)},
    "channels": {"layers.0.channels": (3, 5, 90)},
    "missing": {"layers.0.kv_groups": (), "layers.1.channels": ()},
    "equal": {f"layers.{layer}.kv_groups": (1,) for layer in range(3)},
}


@pytest.mark.parametrize("kind", KEPT)
@pytest.mark.parametrize("changes", [{}, WHOLE, longrope(turned=12)], ids=["partial", "whole", "longrope"])
def test_masked_equals_cut_with_and_without_cache(kind: str, changes: dict[str, Any]) -> None:
    plan = plan_for(tiny_model("phi3"), KEPT[kind])
    cut = shrink_(tiny_model("phi3", **changes), plan)
    found = logits(cut, TOKENS)
    assert_close(found, logits(masked_(tiny_model("phi3", **changes), plan), TOKENS), rtol=1e-4, atol=1e-4)
    assert_close(logits_with_cache(cut, TOKENS), found, rtol=1e-4, atol=1e-4)


def test_another_attention_can_be_chosen_after_the_cut() -> None:
    model = pruned_model("phi3", KEPT["equal"])
    expected = logits(model, TOKENS)
    model.set_attn_implementation("eager")
    assert model.model.layers[1].self_attn.config._attn_implementation == "eager"
    assert_close(logits(model, TOKENS), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kept", [{}, KEPT["heads"], KEPT["missing"]], ids=["dense", "heads", "missing"])
def test_exported_tensors_have_the_paths_and_shapes_of_a_llama(kept: dict[str, tuple[int, ...]]) -> None:
    found = exported_tensors(pruned_model("phi3", kept))
    llama = pruned_model("llama", kept).state_dict()
    assert {name: one.shape for name, one in found.items()} == {name: one.shape for name, one in llama.items()}
    assert len(found) == len(llama)
    assert family_of(tiny_model("phi3").config).exported_paths.query == "self_attn.q_proj"


def test_matrices_of_whole_turned_heads_are_exported_without_a_copy() -> None:
    model = tiny_model("phi3", **WHOLE)
    fused = model.model.layers[1].self_attn.qkv_proj.weight
    found = exported_tensors(model)["model.layers.1.self_attn.k_proj.weight"]
    assert found.data_ptr() == fused[64].data_ptr()


def turned(rotary: Any) -> dict[str, Any]:
    """The same rotary embedding for a Llama, of which a table of factors for texts of every length says everything."""
    plain = [rotary.base ** (-i / 8) for i in range(8)]
    factors = [one / scaled if scaled else 1e30 for one, scaled in zip(plain, rotary.frequencies, strict=True)]
    table = {"rope_type": "longrope", "rope_theta": rotary.base, "attention_factor": rotary.magnitude}
    table |= {"short_factor": factors, "long_factor": factors, "original_max_position_embeddings": 64}
    return {"rope_parameters": table}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        WHOLE,
        longrope(turned=16),
        longrope(turned=8),
        longrope(turned=12, attention_factor=1.7),
        {"tie_word_embeddings": True},
    ],
    ids=["partial", "whole", "longrope", "half", "magnitude", "tied"],
)
def test_exports_a_llama_that_computes_the_same(changes: dict[str, Any]) -> None:
    model = tiny_model("phi3", **changes)
    rotary = numerics_of(model).layers[0].rotary
    tied = changes.get("tie_word_embeddings", False)
    llama = exported_llama(model, tie_word_embeddings=tied, rms_norm_eps=1e-5, **turned(rotary))
    assert_close(logits(llama, TOKENS), logits(model, TOKENS), rtol=1e-4, atol=1e-4)


def test_output_biases_that_a_method_adds_are_exported() -> None:
    model = compensated_model("phi3", KEPT["heads"])
    own, exported = model.state_dict(), exported_tensors(model)
    names = [name for name in own if name.endswith(".bias")]
    assert len(names) == 6
    assert all(torch.equal(exported[name], own[name]) for name in names)


@pytest.mark.parametrize("backend", ["llamacpp", "onnxruntime"])
def test_runtimes_turn_a_part_of_a_head_as_short_texts_do(backend: str, tmp_path: Path) -> None:
    """Half of a head, with a magnitude, in layers of their own widths, as exact as f32 gets."""
    if reason := backends.get(backend).unavailable():
        pytest.skip(reason)
    changes = longrope(turned=8, attention_factor=1.7) | {"tie_word_embeddings": True}
    model = pruned_model("phi3", {**KEPT["heads"], **KEPT["channels"]}, **changes)
    words, out = byte_level_tokenizer(tmp_path / "words"), tmp_path / "out"
    artifact = export.get(backend).export(model, tokenizer=words, precision="f32", plan_digest="", out=out)
    assert artifact.sqnr_db is not None
    assert artifact.sqnr_db > 100, f"{artifact.sqnr_db:.1f} dB"
    assert "other rotary frequencies in texts of more than 64 tokens" in artifact.details["notes"][-1]
    reader = readers.open_reader(backend, out / artifact.path, threads=1)
    assert reader.max_tokens == 64
    reader.close()


def test_the_frequencies_are_those_of_short_texts_after_a_long_one() -> None:
    model = tiny_model("phi3", **longrope(turned=12))
    before = numerics_of(model)
    logits(model, random_tokens(1, 100))
    assert numerics_of(model) == before


def test_its_own_heads_need_no_stock_class_where_that_would_count_the_factors_by_the_hidden_size() -> None:
    """The stock config takes a head for hidden_size / heads channels, and wants a factor for every turned pair."""
    assert type(pruned_model("phi3", KEPT["equal"])).__name__ == "Phi3ForCausalLM"
    assert type(pruned_model("phi3", KEPT["equal"], **longrope(turned=12))).__name__ == "PrunedPhi3ForCausalLM"


def test_longrope_is_written_by_its_older_names_too(tmp_path: Path) -> None:
    """transformers 4.57 takes three entries in rope_scaling, and all others from beside it."""
    model = tiny_model("phi3", **longrope(turned=12))
    save_checkpoint(model, tiny_tokenizer(tmp_path / "words"), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert sorted(config["rope_scaling"]) == ["long_factor", "short_factor", "type"]
    assert (config["rope_scaling"]["type"], config["rope_theta"]) == ("longrope", 5000.0)
    assert (config["partial_rotary_factor"], config["original_max_position_embeddings"]) == (0.75, 64)

"""The shrunk model computes what the masked one computes, in every family and at every edge."""

from typing import Any

import pytest
import torch
from standins.models import (
    FAMILIES,
    Kept,
    logits,
    logits_with_cache,
    masked_,
    plan_for,
    projections,
    random_tokens,
    tiny_model,
)
from torch.testing import assert_close
from transformers import LlamaForCausalLM, PreTrainedModel, Qwen3ForCausalLM

from dilap.core.errors import Mismatch
from dilap.core.plan import Plan
from dilap.models.anatomy import architecture_of, decoder_layers, sublayers
from dilap.models.cut import shrink_
from dilap.models.modeling_dilap import NoAttention, NoFeedForward

ODD = tuple(range(1, 96, 2))
CASES: dict[str, Kept] = {
    "mixed_widths": {"layers.0.kv_groups": (1,), "layers.1.channels": ODD, "layers.2.channels": tuple(range(33))},
    "attention_free": {"layers.1.kv_groups": ()},
    "ffn_free": {"layers.1.channels": ()},
    "first_layer_without_attention": {"layers.0.kv_groups": (), "layers.2.kv_groups": (0,)},
    "first_layer_without_ffn": {"layers.0.channels": ()},
    "last_layer_without_attention": {"layers.2.kv_groups": (), "layers.2.channels": ODD},
    "first_layer_deleted": {"layers.0.kv_groups": (), "layers.0.channels": ()},
    "middle_layer_deleted": {"layers.1.kv_groups": (), "layers.1.channels": (), "layers.0.channels": ODD},
    "attention_in_one_layer_only": {"layers.0.kv_groups": (), "layers.2.kv_groups": ()},
    "equal_widths": {f"layers.{layer}.channels": ODD for layer in range(3)},
    "nothing_removed": {},
}
SLOTS: Kept = {"layers.0.query_slots": (1,), "layers.1.query_slots": (0,), "layers.2.kv_groups": (1,)}
TOKENS = random_tokens(2, 12)


def shrunk(family: str, kept: Kept, **changes: Any) -> PreTrainedModel:
    model = tiny_model(family, **changes)
    return shrink_(model, plan_for(model, kept))


def assert_masked_equals_shrunk(family: str, kept: Kept, **changes: Any) -> None:
    dense = tiny_model(family, **changes)
    expected = logits(masked_(dense, plan_for(dense, kept)), TOKENS)
    found = logits(shrunk(family, kept, **changes), TOKENS)
    # The sums are the same but for zeros; f32 adds them in another order.
    assert_close(found, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", FAMILIES)
def test_shrunk_model_equals_the_masked_one(family: str, case: str) -> None:
    assert_masked_equals_shrunk(family, CASES[case])


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "opt"])
def test_query_slots_are_removed_from_every_kv_group(family: str) -> None:
    assert_masked_equals_shrunk(family, SLOTS)


def test_heads_wider_than_the_hidden_size_shrink() -> None:
    assert_masked_equals_shrunk("qwen3", CASES["mixed_widths"] | SLOTS, head_dim=24)


def test_attention_and_ffn_biases_of_llama_shrink() -> None:
    assert_masked_equals_shrunk("llama", CASES["mixed_widths"], attention_bias=True, mlp_bias=True)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", FAMILIES)
def test_shrunk_model_with_cache_equals_the_one_without(family: str, case: str) -> None:
    model = shrunk(family, CASES[case])
    # The cached kernel sums one query at a time: f32 noise.
    assert_close(logits_with_cache(model, TOKENS), logits(model, TOKENS), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_removal_is_not_a_no_op(family: str) -> None:
    difference = logits(shrunk(family, CASES["mixed_widths"]), TOKENS) - logits(tiny_model(family), TOKENS)
    assert difference.abs().max() > 0.1


def test_removed_sublayer_holds_no_parameters() -> None:
    layers = decoder_layers(shrunk("llama", {"layers.0.kv_groups": (), "layers.1.channels": ()}))
    assert isinstance(layers[0].self_attn, NoAttention)
    assert isinstance(layers[1].mlp, NoFeedForward)
    first, second = ({name.split(".")[0] for name, _ in layers[i].named_parameters()} for i in (0, 1))
    assert first == {"mlp", "post_attention_layernorm"}
    assert second == {"self_attn", "input_layernorm"}


def test_weights_replace_the_output_projections() -> None:
    model = tiny_model("opt")
    weight = torch.full((64, len(ODD)), 0.5)
    bias = model.model.decoder.layers[1].fc2.bias.detach().clone()
    shrink_(
        model, plan_for(model, {"layers.1.channels": ODD}), parameters={"model.decoder.layers.1.fc2.weight": weight}
    )
    assert torch.equal(model.model.decoder.layers[1].fc2.weight, weight)
    assert torch.equal(model.model.decoder.layers[1].fc2.bias, bias)


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_may_come_whole_or_cut(family: str) -> None:
    model, plan = tiny_model(family), plan_for(tiny_model(family), CASES["mixed_widths"])
    changed = {name: value + 0.1 for name, value in model.named_parameters() if "layers.1." in name}
    whole = shrink_(tiny_model(family), plan, parameters=changed)
    with torch.no_grad():
        for name, value in changed.items():
            model.get_parameter(name).copy_(value)
    cut = {name: value for name, value in whole.named_parameters() if "layers.1." in name}
    for one in (whole, shrink_(tiny_model(family), plan, parameters=cut)):
        assert torch.equal(logits(one, TOKENS), logits(shrink_(tiny_model(family), plan), TOKENS)) is False
        assert torch.equal(logits(one, TOKENS), logits(whole, TOKENS))
    assert torch.equal(logits(whole, TOKENS), logits(shrink_(model, plan), TOKENS))


@pytest.mark.parametrize("family", FAMILIES)
def test_output_biases_may_be_added(family: str) -> None:
    model, path = tiny_model(family), next(one.path for one in sublayers(tiny_model(family)) if one.layer == 1)
    plain = logits(model, TOKENS)
    shrink_(model, plan_for(model, {}), parameters={f"{path}.bias": torch.full((64,), 0.25)})
    assert torch.equal(model.get_submodule(path).bias, torch.full((64,), 0.25))
    assert architecture_of(model).out_bias
    assert architecture_of(model).ffn_out_bias
    assert not torch.equal(logits(model, TOKENS), plain)


def test_unknown_parameter_is_a_mismatch() -> None:
    model = tiny_model("llama")
    for name in ("model.layers.9.mlp.down_proj.weight", "model.norm.weight"):
        with pytest.raises(Mismatch, match=f"no parameter '{name}'"):
            shrink_(model, plan_for(model, {}), parameters={name: torch.zeros(1)})


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_model_stays_bf16(family: str) -> None:
    model = tiny_model(family).to(torch.bfloat16)
    plan = plan_for(model, CASES["mixed_widths"])
    shrink_(model, plan, parameters=projections(model, {"layers.1.ffn": torch.zeros(64, len(ODD))}))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_plan_for_another_shape_is_a_mismatch() -> None:
    plan = plan_for(tiny_model("llama", intermediate_size=80), {})
    with pytest.raises(Mismatch, match="another shape"):
        shrink_(tiny_model("llama"), plan)


def test_pruned_model_is_pruned_again_by_a_plan_of_its_own_shape() -> None:
    twice = shrunk("llama", CASES["mixed_widths"])
    twice = shrink_(twice, plan_for(twice, {"layers.1.kv_groups": ()}))
    once = shrunk("llama", CASES["mixed_widths"] | {"layers.1.kv_groups": ()})
    assert torch.equal(logits(twice, TOKENS), logits(once, TOKENS))


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_widths_give_the_stock_class_and_config(family: str) -> None:
    model = shrunk(family, CASES["equal_widths"])
    assert type(model) is type(tiny_model(family))
    assert getattr(model.config, "layer_widths", None) is None
    fresh = type(model)(model.config)
    assert {name: p.shape for name, p in fresh.named_parameters()} == {
        name: p.shape for name, p in model.named_parameters()
    }


def test_equal_widths_after_deleted_layers_are_stock() -> None:
    model = shrunk("qwen3", {"layers.1.kv_groups": (), "layers.1.channels": ()})
    assert type(model) is Qwen3ForCausalLM
    assert (model.config.num_hidden_layers, len(model.config.layer_types)) == (2, 2)


def test_equal_widths_with_fewer_heads_are_stock() -> None:
    model = shrunk("llama", {f"layers.{layer}.kv_groups": (layer % 2,) for layer in range(3)})
    assert type(model) is LlamaForCausalLM
    assert (model.config.num_attention_heads, model.config.num_key_value_heads, model.config.head_dim) == (2, 1, 16)


def test_opt_with_fewer_heads_is_not_stock() -> None:
    model = shrunk("opt", {f"layers.{layer}.kv_groups": (1, 3) for layer in range(3)})
    assert type(model).__name__ == "PrunedOPTForCausalLM"
    assert architecture_of(model).layers[0].num_heads == 2


def test_attention_free_model_of_equal_widths_is_a_pruned_class() -> None:
    model = shrunk("llama", {f"layers.{layer}.channels": () for layer in range(3)})
    assert type(model).__name__ == "PrunedLlamaForCausalLM"
    assert_masked_equals_shrunk("llama", {f"layers.{layer}.channels": () for layer in range(3)})


def test_config_lists_the_widths_of_the_kept_layers() -> None:
    model = shrunk("llama", CASES["middle_layer_deleted"])
    assert model.config.layer_widths == [[4, 2, 48], [4, 2, 96]]
    assert model.config.architectures == ["PrunedLlamaForCausalLM"]


def test_full_plan_changes_no_value() -> None:
    plan: Plan = plan_for(tiny_model("llama"), {})
    assert torch.equal(logits(shrink_(tiny_model("llama"), plan), TOKENS), logits(tiny_model("llama"), TOKENS))


@pytest.mark.parametrize("tied", [False, True])
def test_embedding_and_head_have_the_values_that_they_are_given(tied: bool) -> None:
    model = tiny_model("llama", tie_word_embeddings=tied)
    embedding, head = (model.get_input_embeddings().weight.detach() * factor for factor in (2, 3))
    parameters = {"model.embed_tokens.weight": embedding, "lm_head.weight": head}
    shrink_(model, plan_for(model, {}), parameters=parameters)
    assert torch.equal(model.get_input_embeddings().weight, embedding)
    assert torch.equal(model.get_output_embeddings().weight, head)
    assert not model.config.tie_word_embeddings
    assert not architecture_of(model).tied_embeddings


def test_a_tied_head_follows_the_embedding() -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    embedding = model.get_input_embeddings().weight.detach() * 2
    shrink_(model, plan_for(model, {}), parameters={"model.embed_tokens.weight": embedding})
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert torch.equal(model.get_output_embeddings().weight, embedding)
    assert architecture_of(model).tied_embeddings

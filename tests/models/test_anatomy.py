"""What is found in a loaded model."""

from typing import Any

import pytest
import torch
from standins.models import CLASSES, FAMILIES, plan_for, tiny_model
from transformers import (
    CONFIG_MAPPING,
    GPT2Config,
    GPT2LMHeadModel,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from dilap.core.errors import InvalidInput, Unsupported
from dilap.core.shape import LayerWidths
from dilap.models.anatomy import architecture_of, model_digest, require_finite, sublayers
from dilap.models.cut import shrink_
from dilap.models.families import family_of


@pytest.mark.parametrize("family", FAMILIES)
def test_groups_are_found_in_every_layer(family: str) -> None:
    slots = 1 if family == "opt" else 2
    blocks = architecture_of(tiny_model(family)).blocks
    assert [(group.name, group.num_units) for block in blocks for group in block.groups] == [
        (f"layers.{layer}.{kind}", units)
        for layer in range(3)
        for kind, units in (("kv_groups", 4 // slots), ("query_slots", slots), ("channels", 96))
    ]


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("llama", {"qkv_bias": False, "out_bias": False, "ffn_bias": False, "qk_norm": False, "ffn_matrices": 3}),
        ("mistral", {"qkv_bias": False, "out_bias": False, "ffn_bias": False, "qk_norm": False, "ffn_matrices": 3}),
        ("qwen2", {"qkv_bias": True, "out_bias": False, "ffn_bias": False, "qk_norm": False, "ffn_matrices": 3}),
        ("qwen3", {"qkv_bias": False, "out_bias": False, "ffn_bias": False, "qk_norm": True, "ffn_matrices": 3}),
        ("olmo2", {"qkv_bias": False, "out_bias": False, "ffn_bias": False, "qk_norm": "joint", "ffn_matrices": 3}),
        ("smollm3", {"qkv_bias": False, "out_bias": False, "ffn_bias": False, "qk_norm": False, "ffn_matrices": 3}),
        ("gemma2", {"qkv_bias": False, "out_bias": False, "ffn_bias": False, "qk_norm": False, "ffn_matrices": 3}),
        ("gemma3_text", {"qkv_bias": False, "out_bias": False, "ffn_bias": False, "qk_norm": True, "ffn_matrices": 3}),
        ("opt", {"out_bias": True, "ffn_bias": True, "ffn_out_bias": True, "qk_norm": False, "ffn_matrices": 2}),
    ],
)
def test_biases_norms_and_gates_are_found(family: str, expected: dict[str, Any]) -> None:
    found = architecture_of(tiny_model(family))
    assert {name: getattr(found, name) for name in expected} == expected


def test_learned_positions_and_layer_norms_are_counted() -> None:
    found = architecture_of(tiny_model("opt"))
    assert (found.num_positions, found.norm_vectors) == (130, 2)  # OPT has two rows more than positions


def test_head_dim_need_not_divide_the_hidden_size() -> None:
    found = architecture_of(tiny_model("qwen3", head_dim=24))
    assert (found.head_dim, found.layers[0]) == (24, LayerWidths(num_heads=4, num_kv_heads=2, num_channels=96))


@pytest.mark.parametrize("family", FAMILIES)
def test_pruned_model_has_the_architecture_of_its_plan(family: str) -> None:
    model = tiny_model(family)
    plan = plan_for(model, {"layers.0.kv_groups": (), "layers.1.channels": (2, 7), "layers.2.kv_groups": (1,)})
    assert architecture_of(shrink_(model, plan)) == plan.pruned_architecture()


@pytest.mark.parametrize("family", FAMILIES)
def test_sublayers_come_layer_by_layer_attention_first(family: str) -> None:
    model = tiny_model(family)
    model = shrink_(model, plan_for(model, {"layers.0.kv_groups": (), "layers.1.channels": ()}))
    names = [sublayer.name for sublayer in sublayers(model)]
    assert names == ["layers.0.ffn", "layers.1.attention", "layers.2.attention", "layers.2.ffn"]


def test_unknown_architecture_lists_the_known_ones() -> None:
    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=1, vocab_size=20))
    known = ", ".join(sorted(CLASSES))
    with pytest.raises(Unsupported, match=f"'gpt2' is not known; DiLAP prunes: {known}"):
        architecture_of(model)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("glm", "the nearest is llama, and this one has mlp.gate_up_proj in place of mlp.gate_proj, mlp.up_proj"),
        ("mixtral", "nearest is llama, .* has mlp.experts, mlp.gate in place of mlp.down_proj, mlp.gate_proj, mlp.up"),
        ("cohere", "the nearest is llama, and this one has no post_attention_layernorm"),
        ("stablelm", "the nearest is llama, and this one has biases in its norms"),
        ("gemma", "the nearest is llama, and this one may compute something else .*activation gelu_pytorch_tanh"),
        ("qwen2_moe", "the nearest is qwen2, and this one has mlp.experts"),
        ("gemma3", "it is more than a model of text: .* model_type 'gemma3_text'"),
    ],
)
def test_unknown_architecture_names_the_nearest_and_what_differs(kind: str, words: str) -> None:
    with pytest.raises(Unsupported, match=words) as caught:
        family_of(CONFIG_MAPPING[kind]())
    assert "\n" not in str(caught.value)


def test_layers_of_several_attention_types_are_refused() -> None:
    types = ["full_attention", "sliding_attention"]
    config = Qwen2Config(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=1,
        num_key_value_heads=1,
        intermediate_size=8,
        vocab_size=20,
        layer_types=types,
        use_sliding_window=True,
    )
    with pytest.raises(Unsupported, match="several attention types"):
        architecture_of(Qwen2ForCausalLM(config))


def test_projected_embeddings_are_refused() -> None:
    config = OPTConfig(
        hidden_size=32,
        word_embed_proj_dim=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        ffn_dim=8,
        vocab_size=20,
        do_layer_norm_before=False,
        max_position_embeddings=16,
    )
    with pytest.raises(Unsupported, match="embeddings of another width"):
        architecture_of(OPTForCausalLM(config))


def test_digest_tells_weights_apart() -> None:
    model = tiny_model("llama")
    before = model_digest(model)
    assert before == model_digest(tiny_model("llama"))
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    assert before != model_digest(model)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_tensor_that_is_not_finite_is_named(value: float) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = value
    with pytest.raises(InvalidInput, match=r"tensor model\.layers\.1\.mlp\.up_proj\.weight of the model holds NaN"):
        require_finite(model)

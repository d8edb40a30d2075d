"""A model rounded part by part holds what its runtime stores, and rounded well it stays nearer to the dense one."""

import pytest
import torch
from standins.models import FAMILIES, random_tokens, tiny_model
from transformers import PreTrainedModel

from dilap.core.errors import InvalidInput
from dilap.models.anatomy import architecture_of
from dilap.models.families import family_of
from dilap.models.reference import final_hidden
from dilap.models.rounded_model import round_model_
from dilap.models.rounding import is_on_grid, rounded

TOKENS = random_tokens(12, 40)


def whole(model: PreTrainedModel, precision: str) -> dict[str, str]:
    """Return one precision for all blocks."""
    return {block.name: precision for block in architecture_of(model).blocks}


def changed(before: PreTrainedModel, after: PreTrainedModel) -> set[str]:
    pairs = zip(before.named_parameters(), after.parameters(), strict=True)
    return {name for (name, old), new in pairs if not torch.equal(old, new)}


def distance(model: PreTrainedModel, dense: PreTrainedModel) -> float:
    with torch.no_grad():
        return float((final_hidden(model, TOKENS) - final_hidden(dense, TOKENS)).square().sum())


@pytest.mark.parametrize("family", [*FAMILIES, "qwen3_moe"])
def test_the_matrices_of_all_blocks_are_rounded(family: str) -> None:
    dense, model = tiny_model(family), tiny_model(family)
    round_model_(model, whole(model, "int4"))
    layers = family_of(model.config).layers
    matrices = {name: one for name, one in dense.named_parameters() if one.dim() > 1 and name.startswith(layers)}
    routers = {name for name in matrices if name.endswith("mlp.gate.weight")}
    assert changed(dense, model) == set(matrices) - routers
    assert all(
        torch.equal(model.get_parameter(name), rounded(matrices[name], "int4")) for name in matrices.keys() - routers
    )


def test_only_the_parts_named_are_rounded_each_to_its_own_precision() -> None:
    dense, model = tiny_model("llama"), tiny_model("llama")
    round_model_(model, {"layers.1.ffn": "q4_0", "layers.2.attention": "q8_0", "embedding": "q5_0"}, tokens=TOKENS)
    ffn, attention = ("gate_proj", "up_proj", "down_proj"), ("q_proj", "k_proj", "v_proj", "o_proj")
    expected = {f"model.layers.1.mlp.{name}.weight": "q4_0" for name in ffn}
    expected |= {f"model.layers.2.self_attn.{name}.weight": "q8_0" for name in attention}
    expected["model.embed_tokens.weight"] = "q5_0"
    assert changed(dense, model) == set(expected)
    assert all(is_on_grid(model.get_parameter(name), precision) for name, precision in expected.items())


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma3_text"])
def test_a_model_that_is_rounded_well_is_nearer_to_the_dense_one(family: str) -> None:
    dense, plain, well = (tiny_model(family, num_hidden_layers=2) for _ in range(3))
    round_model_(plain, whole(dense, "int4"))
    round_model_(well, whole(dense, "int4"), tokens=TOKENS)
    assert distance(well, dense) < 0.8 * distance(plain, dense)  # random models have inputs of little correlation


def test_later_layers_are_rounded_for_what_rounded_ones_give() -> None:
    first, second = (tiny_model("llama", num_hidden_layers=2) for _ in range(2))
    round_model_(first, whole(first, "int4"), tokens=TOKENS)
    round_model_(second, {name: "int4" for name in whole(second, "int4") if "layers.1" in name}, tokens=TOKENS)
    assert "model.layers.1.mlp.down_proj.weight" in changed(first, second)


def test_a_head_of_its_own_makes_up_for_its_rounding() -> None:
    dense, plain, well = (tiny_model("llama", num_hidden_layers=1) for _ in range(3))
    round_model_(plain, {"head": "int4"})
    round_model_(well, {"head": "int4"}, tokens=TOKENS)
    with torch.no_grad():
        logits = [model(TOKENS).logits for model in (dense, plain, well)]
    assert changed(dense, well) == {"lm_head.weight"}
    assert (logits[2] - logits[0]).square().sum() < 0.8 * (logits[1] - logits[0]).square().sum()


def test_a_tied_head_is_rounded_as_the_embedding_that_it_is() -> None:
    dense, model = (tiny_model("llama", tie_word_embeddings=True, num_hidden_layers=1) for _ in range(2))
    round_model_(model, {"head": "int8", "embedding": "int8"}, tokens=TOKENS)
    expected = rounded(dense.get_input_embeddings().weight, "int8")
    assert torch.equal(model.get_output_embeddings().weight, expected)


def test_a_tied_head_with_a_precision_of_its_own_is_refused() -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    with pytest.raises(InvalidInput, match="q4_0 and None"):
        round_model_(model, {"head": "q4_0"})


def test_a_model_in_bf16_is_refused() -> None:
    with pytest.raises(InvalidInput, match=r"bfloat16.*float\(\)"):
        round_model_(tiny_model("llama").to(torch.bfloat16), {"head": "q4_0"})

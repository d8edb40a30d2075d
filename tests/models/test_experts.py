"""Experts are the units of a feed-forward network: masked in the router or cut out, the model computes the same."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from standins.models import Kept, logits, logits_with_cache, plan_for, random_tokens, tiny_model, tiny_tokenizer
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, PreTrainedModel

from dilap.core.errors import Unsupported
from dilap.core.plan import full_plan
from dilap.core.rules import Capabilities, WidthRules, portable_levels
from dilap.core.shape import Architecture, Experts
from dilap.models.anatomy import architecture_of, blocks_of
from dilap.models.cut import shrink_
from dilap.models.load import load, save_checkpoint
from dilap.models.routing import Routed

EQUAL: Kept = {"layers.0.experts": (0, 2, 4), "layers.1.experts": (1, 3, 5), "layers.2.experts": (0, 1, 5)}
MIXED: Kept = {"layers.0.experts": (1, 4), "layers.1.experts": (), "layers.2.experts": (0, 1, 3, 5)}
HEADS: Kept = {"layers.0.kv_groups": (1,), "layers.1.query_slots": (0,), "layers.2.kv_groups": ()}
TOKENS = random_tokens(2, 12)


def masked_experts_(model: PreTrainedModel, kept: Kept) -> PreTrainedModel:
    """`model` in its dense shape, with routers to which the logits of removed experts are minus infinity."""
    for layer, one in enumerate(model.model.layers):
        router = one.mlp.gate
        removed = torch.tensor([unit not in kept[f"layers.{layer}.experts"] for unit in range(router.num_experts)])

        def route(hidden: torch.Tensor, router: Any = router, removed: torch.Tensor = removed) -> Routed:
            scores = torch.nn.functional.linear(hidden.reshape(-1, hidden.shape[-1]), router.weight)
            weights, experts = scores.masked_fill(removed, -torch.inf).softmax(-1).topk(router.top_k, -1)
            if router.norm_topk_prob:
                weights = weights / weights.sum(-1, keepdim=True)
            return scores, weights, experts

        if removed.all():
            one.mlp.register_forward_hook(lambda _, __, output: 0 * output)
        else:
            router.forward = route
    return model


@pytest.mark.parametrize("normed", [True, False], ids=["weights sum to 1", "weights of all"])
@pytest.mark.parametrize("kept", [EQUAL, MIXED], ids=["equal", "mixed"])
def test_masked_equals_shrunk(kept: Kept, normed: bool) -> None:
    plan = plan_for(tiny_model("qwen3_moe", norm_topk_prob=normed), kept)
    shrunk = shrink_(tiny_model("qwen3_moe", norm_topk_prob=normed), plan)
    masked = masked_experts_(tiny_model("qwen3_moe", norm_topk_prob=normed), kept)
    assert_close(logits(shrunk, TOKENS), logits(masked, TOKENS), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kept", [EQUAL | HEADS, MIXED | HEADS], ids=["equal", "mixed"])
def test_cached_equals_uncached(kept: Kept) -> None:
    model = shrink_(tiny_model("qwen3_moe"), plan_for(tiny_model("qwen3_moe"), kept))
    assert_close(logits_with_cache(model, TOKENS), logits(model, TOKENS), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("kept", "name"), [(EQUAL, "Qwen3MoeForCausalLM"), (MIXED, "PrunedQwen3MoeForCausalLM")], ids=["equal", "mixed"]
)
def test_checkpoint_loads_without_us(kept: Kept, name: str, tmp_path: Path) -> None:
    model = shrink_(tiny_model("qwen3_moe"), plan_for(tiny_model("qwen3_moe"), kept))
    save_checkpoint(model, tiny_tokenizer(tmp_path / "words"), tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert type(loaded).__name__ == name
    assert torch.equal(logits(loaded, TOKENS), logits(model, TOKENS))


@pytest.mark.parametrize("kept", [EQUAL, MIXED], ids=["equal", "mixed"])
def test_checkpoint_is_pruned_again(kept: Kept, tmp_path: Path) -> None:
    model = shrink_(tiny_model("qwen3_moe"), plan_for(tiny_model("qwen3_moe"), kept))
    save_checkpoint(model, tiny_tokenizer(tmp_path / "words"), tmp_path / "out")
    loaded = load(str(tmp_path / "out")).model
    assert architecture_of(loaded) == architecture_of(model)
    left = {"layers.0.experts": (0, 1)}
    again, same = (shrink_(one, plan_for(one, left)) for one in (loaded, model))
    assert torch.equal(logits(again, TOKENS), logits(same, TOKENS))


def test_a_token_keeps_its_number_of_experts() -> None:
    model = tiny_model("qwen3_moe")
    kept = full_plan(architecture_of(model), base="base").kept
    with pytest.raises(ValueError, match=r"layers\.1\.experts: 1 of 6 units kept, but at least 2 stay"):
        replace(plan_for(model, {}), kept=kept | {"layers.1.experts": (3,)})


def test_runtimes_offer_no_fewer_experts_than_a_token_is_sent_to() -> None:
    block = architecture_of(tiny_model("qwen3_moe")).blocks[1]
    levels = Capabilities(ffn_multiple=32).levels(block)
    assert levels == [(0,), (2,), (3,), (4,), (5,), (6,)]
    assert portable_levels(block, levels) == levels[1:]
    assert [WidthRules(ffn_multiple=256).rounded(block.main, wanted) for wanted in (1, 4, 9)] == [2, 4, 6]


def test_many_experts_have_at_most_12_levels() -> None:
    block = architecture_of(tiny_model("qwen3_moe", num_experts=64)).blocks[1]
    levels = Capabilities(ffn_removal=False).levels(block)
    assert (len(levels), levels[0], levels[-1]) == (12, (2,), (64,))


def test_channels_of_half_an_expert_are_no_width() -> None:
    dense = architecture_of(tiny_model("qwen3_moe"))
    for num_channels in (32, 80):
        layers = (replace(dense.layers[0], num_channels=num_channels), *dense.layers[1:])
        with pytest.raises(ValueError, match=f"layer 0: {num_channels} channels are not 2 or more experts of 32"):
            replace(dense, layers=layers)


def test_units_are_slices_of_the_experts_and_rows_of_the_router() -> None:
    members = blocks_of(tiny_model("qwen3_moe"))[1].main.members
    assert [(member.tensor, member.axis) for member in members] == [
        ("model.layers.0.mlp.experts.gate_up_proj", 0),
        ("model.layers.0.mlp.experts.down_proj", 0),
        ("model.layers.0.mlp.gate.weight", 0),
    ]


@pytest.mark.parametrize("kept", [{}, EQUAL, MIXED], ids=["dense", "equal", "mixed"])
def test_all_parameters_are_counted(kept: Kept) -> None:
    model = shrink_(tiny_model("qwen3_moe"), plan_for(tiny_model("qwen3_moe"), kept))
    assert architecture_of(model).num_parameters == sum(one.numel() for one in model.parameters())


def active(architecture: Architecture) -> Architecture:
    """The same with as many experts as a token is sent to."""
    layers = tuple(replace(layer, num_channels=2 * 32) for layer in architecture.layers)
    return replace(architecture, layers=layers)


def test_a_token_costs_what_its_experts_and_the_router_cost() -> None:
    dense = architecture_of(tiny_model("qwen3_moe"))
    unused_rows = 3 * 4 * 64  # of the router, for the other 4 of 6 experts in 3 layers
    assert dense.decode_flops(context=9) - active(dense).decode_flops(context=9) == 2 * unused_rows
    for_both = [one.decode_bytes(context=9, precision="f32", cache_bits=16) for one in (dense, active(dense))]
    assert for_both[0] - for_both[1] == 4 * unused_rows
    prompts = [one.prefill_flops(prompt_tokens=5) for one in (dense, active(dense))]
    assert prompts[0] - prompts[1] == 2 * 5 * unused_rows


def test_a_prompt_reads_all_experts() -> None:
    dense = architecture_of(tiny_model("qwen3_moe"))
    read = [one.prefill_bytes(prompt_tokens=5, precision="f32", cache_bits=16) for one in (dense, active(dense))]
    assert read[0] - read[1] == 4 * (dense.num_parameters - active(dense).num_parameters)


def test_layers_without_experts_are_refused() -> None:
    for mixed in ({"mlp_only_layers": [1]}, {"decoder_sparse_step": 2}):
        with pytest.raises(Unsupported, match=r"layer [01] has no experts .*cannot be pruned yet"):
            architecture_of(tiny_model("qwen3_moe", **mixed))


def test_plans_of_models_without_experts_have_the_digests_that_they_had() -> None:
    plan = full_plan(architecture_of(tiny_model("llama")), base="base")
    assert plan.digest == "f74f060186db81e45a2b6db880aa21591a90daba0f7e1647d34841f9918a144e"
    assert plan.digest != replace(plan, base="other").digest


def test_the_weights_of_experts_are_normed_as_the_config_says() -> None:
    for normed in (True, False):
        architecture = architecture_of(tiny_model("qwen3_moe", norm_topk_prob=normed))
        assert architecture.experts == Experts(num_channels=32, num_active=2, normed=normed)


def test_experts_are_at_least_one() -> None:
    with pytest.raises(ValueError, match="tokens are sent to some of them"):
        Experts(num_channels=32, num_active=0, normed=True)

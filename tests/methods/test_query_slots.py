"""Methods that score units may cut query slots too: the same query head of every KV head, whose cache stays."""

from itertools import product

import pytest
import torch
from standins.models import logits, masked_, random_tokens, tiny_model, tiny_task
from standins.quick_methods import method
from torch.testing import assert_close

from dilap.core.groups import Member
from dilap.methods.adapters import Adapters
from dilap.methods.compresso import Compresso, _Gates
from dilap.methods.llm_pruner import aligned
from dilap.methods.loraprune import LoraPrune, _Run
from dilap.methods.units import unit_scores
from dilap.models.anatomy import sublayers
from dilap.models.cut import shrink_
from dilap.search.weights import WeightCosts

# peft asks transformers by the old name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
GROUPS, SLOTS = "layers.1.kv_groups", "layers.1.query_slots"


def test_inputs_are_summed_over_those_of_a_unit() -> None:
    """2 KV heads of 16 with 2 query heads each: heads 0 and 1 read KV head 0, heads 0 and 2 are slot 0."""
    attention, ffn = list(sublayers(tiny_model("llama")))[2:4]
    found = unit_scores(torch.tensor([1.0, 10.0, 100.0, 1000.0]).repeat_interleave(16), attention)
    assert {name: scores.tolist() for name, scores in found.items()} == {
        GROUPS: [16 * 11.0, 16 * 1100.0],
        SLOTS: [16 * 101.0, 16 * 1010.0],
    }
    assert unit_scores(torch.arange(96.0), ffn)["layers.1.channels"].tolist() == list(range(96))


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.7, 0.9, 1.0])
@pytest.mark.parametrize("num_kv_heads", [3, 12])
def test_a_sublayer_loses_up_to_that_share_of_its_weights(num_kv_heads: int, share: float) -> None:
    """With a KV head for every query head, the share of the heads, rounded down."""
    model = tiny_model("llama", hidden_size=96, num_attention_heads=12, num_key_value_heads=num_kv_heads)
    task = tiny_task(model)
    block, costs = task.architecture.blocks[2], WeightCosts(architecture=task.architecture)
    found = tuple(task._grid(block, share).values())
    every = product(range(1, num_kv_heads + 1), range(1, 12 // num_kv_heads + 1))
    wanted = (1 - share) * costs.block(block, (num_kv_heads, 12 // num_kv_heads)) * (1 - 1e-9)
    assert costs.block(block, found) == min(cost for counts in every if (cost := costs.block(block, counts)) >= wanted)
    if num_kv_heads == 12:
        assert found == (max(1, 12 - int(share * 12)), 1)


@pytest.mark.parametrize("name", ["magnitude", "wanda_sp", "llm_pruner", "loraprune", "compresso"])
def test_slots_are_cut_where_groups_alone_are_not_enough(name: str) -> None:
    """A fifth of the attention's weights: one KV head with all its query heads has half of them."""
    model = tiny_model("llama", num_hidden_layers=6)
    task = tiny_task(model, share=0.3)
    found = method(name)(task)
    widths = [one for one in found.plan.all_widths() if one.num_heads]
    assert any(one.num_heads < 2 * one.num_kv_heads for one in widths)
    tokens = random_tokens(2, 12)
    if not found.parameters:
        cut = shrink_(tiny_model("llama", num_hidden_layers=6), found.plan)
        assert_close(logits(masked_(model, found.plan), tokens), logits(cut, tokens), rtol=1e-4, atol=1e-4)


def test_scores_of_slots_are_summed_over_the_kv_heads() -> None:
    member = Member(tensor="query.weight", axis=0, grid=(2, 2, 1), dimension=1)
    assert aligned(torch.tensor([1.0, 10.0, 100.0, 1000.0]), member, folded=False).flatten().tolist() == [101, 1010]


def test_loraprune_masks_a_slot_of_every_kv_head() -> None:
    """2 KV heads of 16 with 2 query heads each: slot 1 are the rows 16 to 31 and 48 to 63 of the queries alone."""
    task = tiny_task(tiny_model("llama"))
    group = next(block.groups[1] for block in task.blocks if block.name == "layers.1.attention")
    with Adapters(task, rank=2, alpha=2, dropout=0.0) as adapted:
        run = _Run(LoraPrune(), task, adapted, {group.name: group}, {group.name: 1})
        run.masks = {group.name: torch.tensor([1.0, 0.0])}
        list(run._mask_hooks())
        rows = {
            name: adapted.matrix(f"model.layers.1.self_attn.{name}.weight")(torch.ones(1, 64))[0]
            for name in ("q_proj", "k_proj", "v_proj")
        }
    gone = {name: (one == 0).nonzero().flatten().tolist() for name, one in rows.items()}
    assert gone == {"q_proj": [*range(16, 32), *range(48, 64)], "k_proj": [], "v_proj": []}


@pytest.mark.parametrize("family", ["llama", "opt", "qwen2"])
def test_compresso_counts_the_weights_of_any_numbers_of_units(family: str) -> None:
    task = tiny_task(tiny_model(family))
    outs, costs = list(sublayers(task.model)), WeightCosts(architecture=task.architecture)
    with Adapters(task, rank=2, alpha=2, dropout=0.0) as adapted:
        gates = _Gates(Compresso(), task, adapted, outs)
    numbers = {group.name: 1 + group.num_units // 2 for one in outs for group in one.block.groups}
    numbers = {name: min(number, 2) if "channels" not in name else number for name, number in numbers.items()}
    sizes = {group.name: group.num_units for one in outs for group in one.block.groups}
    numbers = {name: min(number, sizes[name]) for name, number in numbers.items()}
    expected = sum(costs.block(one.block, tuple(numbers[g.name] for g in one.block.groups)) for one in outs)
    found = gates._weights({name: torch.tensor(float(number)) for name, number in numbers.items()})
    assert float(found) == pytest.approx(expected, rel=0.02)  # biases of output projections count with the units

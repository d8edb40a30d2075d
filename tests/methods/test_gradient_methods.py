"""LLM-Pruner, LoRAPrune and Compresso: the golden checks of their specification."""

import math
from dataclasses import replace

import pytest
import torch
from standins.fabricated import tiny_llama
from standins.models import tiny_model, tiny_task
from torch.testing import assert_close

from dilap.core.groups import Member
from dilap.core.shape import Architecture, LayerWidths
from dilap.core.space import Space
from dilap.methods.adapters import Adapters
from dilap.methods.compresso import Compresso, _Gates, lagrangian, open_probability, sampled
from dilap.methods.llm_pruner import LlmPruner, aligned, element_scores, gradients_of, reduced
from dilap.methods.loraprune import LoraPrune, _Run, estimated_gradient, faded, removals
from dilap.models.anatomy import decoder_layers, sublayers
from dilap.models.families import family_of
from dilap.models.reference import next_token_loss
from dilap.models.text import Calibration
from dilap.search.limit import CostLimit
from dilap.search.method import PruneTask

# peft asks transformers by the old name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

# LLM-Pruner


def arithmetic_task(architecture: Architecture) -> PruneTask:
    """A task for counting alone: no model, no text."""
    nothing = torch.zeros(0, 0)
    return PruneTask(
        model=None,
        base="base",
        text=Calibration(name="none", train=nothing, validation=nothing),
        cost_limit=CostLimit(limit=1.0, predict=lambda *_: 0.0),
        space=Space(architecture=architecture, choices=(), fixed_cost=0.0),
    )


TINY_LLAMA = replace(
    tiny_llama(*(LayerWidths(num_heads=32, num_kv_heads=4, num_channels=5632),) * 22),
    hidden_size=2048,
    head_dim=64,
    vocab_size=32000,
    tied_embeddings=False,
)
LLAMA_3_8B = replace(
    tiny_llama(*(LayerWidths(num_heads=32, num_kv_heads=8, num_channels=14336),) * 32),
    hidden_size=4096,
    head_dim=128,
    vocab_size=128256,
    tied_embeddings=False,
)


@pytest.mark.parametrize(
    ("architecture", "layers", "dense", "expected"),
    [
        (TINY_LLAMA, range(4, 18), 1_100_048_384, 945_907_712),
        (LLAMA_3_8B, range(4, 30), 8_030_261_248, 6_612_586_496),
    ],
    ids=["TinyLlama", "Llama-3-8B"],
)
def test_published_parameter_counts(architecture: Architecture, layers: range, dense: int, expected: int) -> None:
    """A quarter of the KV groups and channels of these layers, as the authors' tables count."""
    task = arithmetic_task(architecture)
    scores = {
        block.main.name: torch.zeros(block.main.num_units) for block in architecture.blocks if block.layer in layers
    }
    assert architecture.num_parameters == dense
    assert task.keep(scores, ratio=0.25).pruned_architecture().num_parameters == expected


def group_score(weights: list[torch.Tensor], gradients: list[torch.Tensor], variant: str) -> float:
    zero = torch.zeros(())
    sums = [element_scores(variant, w, g, zero).sum() for w, g in zip(weights, gradients, strict=True)]  # type: ignore[arg-type]
    return float(sum(one.abs() if variant == "vectorize" else one for one in sums))


def gated_unit(*, gate: torch.Tensor, scale: float = 1.0) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Weights of one gated unit, up and down rescaled against each other, with the gradients of some loss."""
    generator = torch.Generator().manual_seed(0)
    x, target = torch.randn(20, 5, generator=generator), torch.randn(20, 4, generator=generator)
    weights = [gate.clone(), torch.randn(5, generator=generator) * scale, torch.randn(4, generator=generator) / scale]
    for weight in weights:
        weight.requires_grad_(True)
    output = (torch.nn.functional.silu(x @ weights[0]) * (x @ weights[1]))[:, None] * weights[2]
    gradients = torch.autograd.grad((output - target).square().mean(), weights)
    return [weight.detach() for weight in weights], list(gradients)


def test_a_unit_with_a_closed_gate_has_no_first_order_score() -> None:
    weights, gradients = gated_unit(gate=torch.zeros(5))
    assert group_score(weights, gradients, "first") == 0
    assert group_score(weights, gradients, "l2") > 0


def test_b_first_order_does_not_depend_on_how_a_unit_is_scaled() -> None:
    gate = torch.randn(5, generator=torch.Generator().manual_seed(1))
    one, other = (gated_unit(gate=gate, scale=scale) for scale in (1.0, 3.0))
    assert group_score(*one, "first") == pytest.approx(group_score(*other, "first"), rel=1e-4)
    assert group_score(*one, "l2") != pytest.approx(group_score(*other, "l2"), rel=0.1)


def test_c_signed_sums_are_no_larger_than_sums_of_absolute_values() -> None:
    weights, gradients = gated_unit(gate=torch.ones(5))
    assert group_score(weights, gradients, "vectorize") <= group_score(weights, gradients, "first")


def test_query_heads_are_paired_with_the_kv_head_that_they_read() -> None:
    """4 query heads of 1 channel on 2 KV heads: 0 and 1 read 0, 2 and 3 read 1; the authors' fold pairs 0 with 2."""
    scores = torch.tensor([1.0, 10.0, 100.0, 1000.0])
    member = Member(tensor="query.weight", axis=0, grid=(2, 2, 1))
    assert aligned(scores, member, folded=False).flatten().tolist() == [11, 1100]
    assert aligned(scores, member, folded=True).flatten().tolist() == [101, 1010]


@pytest.mark.parametrize(("reduce", "expected"), [("sum", 6), ("mean", 3), ("max", 4), ("prod", 8), ("first", 2)])
def test_scores_of_matrices_are_reduced(reduce: str, expected: float) -> None:
    assert reduced([torch.tensor([2.0]), torch.tensor([4.0])], reduce).tolist() == [expected]  # type: ignore[arg-type]


@pytest.mark.parametrize("per_sequence", [False, True])
def test_gradients_are_those_of_the_mean_loss(per_sequence: bool) -> None:
    task = tiny_task(tiny_model("llama"))
    found = gradients_of(task, per_sequence=per_sequence)
    weight = decoder_layers(task.model)[1].get_parameter("mlp.up_proj.weight").requires_grad_(True)
    (expected,) = torch.autograd.grad(next_token_loss(task.model, task.text.train), [weight])
    name = "model.layers.1.mlp.up_proj.weight"
    assert_close(found.means[name], expected, rtol=1e-3, atol=1e-6)
    if per_sequence:
        parts = [torch.autograd.grad(next_token_loss(task.model, row[None]), [weight])[0] for row in task.text.train]
        assert_close(
            found.squares[name],
            torch.stack(parts).square().mean(0),
            rtol=1e-3,
            atol=1e-8,
        )


@pytest.mark.parametrize("variant", ["first", "second", "mixed", "vectorize", "l1", "l2"])
def test_every_variant_leaves_both_ends_alone(variant: str) -> None:
    model = tiny_model("llama", num_hidden_layers=8)
    found = LlmPruner(variant=variant, untouched_last=0.125)(tiny_task(model, share=0.8))  # type: ignore[arg-type]
    widths = found.plan.all_widths()
    assert widths[0] == widths[7] == found.plan.architecture.layers[0]
    assert len(set(widths[1:7])) == 1


# LoRAPrune


def test_loraprune_a_estimate_is_the_change_of_one_step() -> None:
    """One plain step of size 1 on both adapters changes B A by minus the estimate."""
    generator = torch.Generator().manual_seed(0)
    a, grad_a = torch.randn(2, 2, 5, generator=generator, dtype=torch.float64)
    b, grad_b = torch.randn(2, 4, 2, generator=generator, dtype=torch.float64)
    change = (b - grad_b) @ (a - grad_a) - b @ a
    assert_close(-change, estimated_gradient(a, b, grad_a, grad_b))


def test_loraprune_b_ever_more_units_are_masked() -> None:
    gone = [removals(20, step=step, steps=50) for step in range(51)]
    assert gone == sorted(gone)
    assert gone[0] == gone[5] == 0
    assert faded(25, 50) == pytest.approx(1 - 0.5**3)


@pytest.mark.parametrize("steps", [1, 7, 50])
def test_loraprune_c_the_last_step_masks_all_that_are_to_go(steps: int) -> None:
    assert removals(13, step=steps, steps=steps) == 13
    assert removals(13, step=max(0, steps - 1), steps=steps) <= 13


def test_loraprune_masks_a_unit_in_all_parts_of_a_fused_matrix() -> None:
    """2 KV heads of 16 with 2 query heads each: rows 0 to 63 are queries, 64 to 95 keys, 96 to 127 values."""
    task = tiny_task(tiny_model("phi3"))
    group = next(block.main for block in task.blocks if block.name == "layers.1.attention")
    with Adapters(task, rank=2, alpha=2, dropout=0.0) as adapted:
        run = _Run(LoraPrune(), task, adapted, {group.name: group}, {group.name: 1})
        run.masks = {group.name: torch.tensor([0.0, 1.0])}
        list(run._mask_hooks())
        rows = adapted.matrix("model.layers.1.self_attn.qkv_proj.weight")(torch.ones(1, 64))[0]
    gone = (rows == 0).nonzero().flatten().tolist()
    assert gone == [*range(32), *range(64, 80), *range(96, 112)]


def test_loraprune_ends_with_equal_widths_between_the_ends() -> None:
    model = tiny_model("llama", num_hidden_layers=10)
    widths = LoraPrune(steps=6)(tiny_task(model, share=0.7)).plan.all_widths()
    assert widths[0] == widths[9] == tiny_task(model).architecture.layers[0]
    assert len(set(widths[1:9])) == 1


def test_adapters_merge_to_what_they_compute_and_come_off() -> None:
    model = tiny_model("llama")
    task = tiny_task(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with Adapters(task, rank=4, alpha=8, dropout=0.0) as adapted:
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, parameter in adapted.wrapped.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0, 0.05, generator=generator)
            expected = model(task.text.train).logits
        merged = adapted.merged()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert len(merged) == len(family_of(model.config).matrices) * task.num_layers
    model.load_state_dict({**before, **merged})
    with torch.no_grad():
        assert_close(model(task.text.train).logits, expected, rtol=1e-3, atol=1e-3)


# Compresso


@pytest.mark.parametrize(("log_alpha", "expected"), [(-2.0, 0.401), (0.0, 0.832), (2.0, 0.973)])
def test_compresso_a_gates_open_as_often_as_the_formula_says(log_alpha: float, expected: float) -> None:
    values = torch.full((200_000,), log_alpha)
    share = float((sampled(values, generator=torch.Generator().manual_seed(0)) > 0).float().mean())
    assert share == pytest.approx(float(open_probability(values[:1])), abs=0.01)
    assert float(open_probability(values[:1])) == pytest.approx(expected, abs=0.005)
    assert float(open_probability(values[:1])) == pytest.approx(1 / (1 + math.exp(-log_alpha - 1.5986)), abs=1e-4)


def test_compresso_b_too_little_sparsity_closes_gates() -> None:
    """One ascent step from zero: the first multiplier falls below 0, the second rises, and both push gates shut."""
    log_alpha, multipliers = torch.zeros(5, requires_grad=True), torch.zeros(2, requires_grad=True)
    sparsity = 1 - open_probability(log_alpha).mean()
    lagrangian(sparsity, 0.6, multipliers).backward(retain_graph=True)
    assert multipliers.grad is not None
    stepped = (0.1 * multipliers.grad).detach()
    assert stepped[0] < 0 < stepped[1]
    (gradient,) = torch.autograd.grad(lagrangian(sparsity, 0.6, stepped), [log_alpha])
    assert (gradient > 0).all()


def test_compresso_c_folded_gates_compute_what_gated_ones_do() -> None:
    weight, x = torch.randn(3, 8), torch.randn(5, 8)
    gates = torch.rand(4)
    scale = gates.repeat_interleave(2)
    assert_close((weight * scale) @ x.T, weight @ (x * scale).T)


def test_compresso_gates_start_open() -> None:
    task = tiny_task(tiny_model("llama"))
    outs = list(sublayers(task.model))
    with Adapters(task, rank=2, alpha=2, dropout=0.0) as adapted:
        gates = _Gates(Compresso(), task, adapted, outs)
        assert float(gates.sparsity().detach()) < 0.01
        assert task.cost_limit.cost(gates.plan(0.0)) == task.cost_limit.predict(task.architecture.layers)

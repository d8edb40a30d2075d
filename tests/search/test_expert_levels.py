"""Experts in the search: how they are ranked, what a level costs, and that a masked router computes the cut model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from standins.models import (
    library_of,
    logits,
    plan_at,
    random_tokens,
    tiny_model,
    tiny_net,
    tiny_space,
    tiny_task,
)
from torch.testing import assert_close
from transformers import PreTrainedModel

from dilap import methods
from dilap.core.errors import Unsupported
from dilap.models.anatomy import ExpertSublayer, all_sublayers, sublayers
from dilap.models.cut import shrink_
from dilap.models.reference import Teacher
from dilap.search.curvature import linearise
from dilap.search.experts import importances, inputs_recorded, output_errors
from dilap.search.library import fit_choices
from dilap.search.library_file import kept_library
from dilap.search.refit import refit_refusal, refit_sequentially
from dilap.search.supernet import Supernet

TOKENS = random_tokens(8, 24)
OTHERS = random_tokens(3, 12, seed=1)
CONFIGS = [(0, 0, 0, 0, 0, 0), (1, 1, 2, 2, 0, 3), (3, 2, 0, 1, 4, 3), (0, 3, 2, 0, 0, 1)]
WEIGHING = ("magnitude", "wanda_sp", "flap", "llm_pruner", "loraprune", "compresso", "puzzle", "sprint")


def with_inputs(model: PreTrainedModel, layer: int) -> tuple[ExpertSublayer, list[torch.Tensor]]:
    """The experts of a layer, and what enters them on the calibration tokens, in two batches."""
    found = [one for one in all_sublayers(model) if isinstance(one, ExpertSublayer) and one.layer == layer]
    with inputs_recorded(found) as inputs, torch.no_grad():
        for batch in TOKENS.split(5):
            model(batch)
    return found[0], inputs[found[0].name]


def outputs_of(network: Any, x: torch.Tensor, kept: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """By hand, with a router that chooses among the experts `kept`: output, weights, and norms of all outputs."""
    x = x.detach()
    scores = x @ network.gate.weight.detach().T
    removed = torch.tensor([expert not in kept for expert in range(scores.shape[1])])
    weights, chosen = scores.masked_fill(removed, -torch.inf).softmax(-1).topk(2, -1)
    weights = torch.zeros_like(scores).scatter(1, chosen, weights / weights.sum(-1, keepdim=True))
    tensors = zip(network.experts.gate_up_proj.detach(), network.experts.down_proj.detach(), strict=True)
    every = []
    for gate_up, down in tensors:
        gate, up = (x @ gate_up.T).chunk(2, -1)
        every.append((torch.nn.functional.silu(gate) * up) @ down.T)
    outputs = torch.stack(every, 1)  # tokens x experts x hidden
    return (weights[:, :, None] * outputs).sum(1), weights, outputs.norm(dim=-1)


def test_an_expert_is_worth_the_mean_of_its_weight_times_the_norm_of_its_output() -> None:
    one, inputs = with_inputs(tiny_model("qwen3_moe"), 1)
    x = torch.cat([batch.reshape(-1, 64) for batch in inputs])
    _, weights, norms = outputs_of(one.out, x, list(range(6)))
    expected = (weights * norms).sum(0) / (weights > 0).sum(0)
    assert_close(importances(one, inputs), expected, rtol=1e-4, atol=1e-5)


def test_an_expert_without_tokens_is_worth_nothing() -> None:
    model = tiny_model("qwen3_moe")
    _, inputs = with_inputs(model, 0)
    mean = torch.cat([batch.reshape(-1, 64) for batch in inputs]).mean(0)
    one = next(one for one in all_sublayers(model) if isinstance(one, ExpertSublayer))
    with torch.no_grad():
        one.weight[4] = -1e3 * mean  # never chosen by tokens like these
        found = importances(one, [mean.expand(1, 3, 64)])
    assert found[4] == 0
    assert (found > 0).sum() == 2


def test_the_error_of_a_level_is_that_of_the_output_without_its_experts() -> None:
    one, inputs = with_inputs(tiny_model("qwen3_moe"), 1)
    x = torch.cat([batch.reshape(-1, 64) for batch in inputs])
    dense = outputs_of(one.out, x, list(range(6)))[0]
    kept = [[0, 1, 2, 3, 4, 5], [0, 2, 3, 5], [1, 4], []]
    changes = [outputs_of(one.out, x, experts)[0] - dense for experts in kept[1:3]]
    expected = [0.0, *(float(change.square().sum() / dense.square().sum()) for change in changes)]
    found = output_errors(one, [torch.tensor(experts, dtype=torch.int64) for experts in kept], inputs)
    assert found == pytest.approx([*expected, 1.0], rel=1e-4, abs=1e-9)


def test_levels_keep_the_experts_that_are_worth_most() -> None:
    model = tiny_model("qwen3_moe")
    one, inputs = with_inputs(model, 1)
    best = importances(one, inputs).argsort(descending=True).tolist()
    fits = library_of(model, tiny_space(model), TOKENS)[3]
    assert [fit.units["layers.1.experts"] for fit in fits] == [tuple(sorted(best[:count])) for count in (6, 3, 2, 0)]
    assert [fits[0].error, fits[-1].error] == pytest.approx([0, 1])


def test_fitting_leaves_the_model_as_it_was() -> None:
    model, tokens = tiny_model("qwen3_moe"), OTHERS
    before = logits(model, tokens)
    library_of(model, tiny_space(model), TOKENS)
    assert torch.equal(logits(model, tokens), before)
    assert not any(one._forward_hooks or one._forward_pre_hooks for one in model.modules())


def test_a_library_is_read_from_its_files(tmp_path: Path) -> None:
    model = tiny_model("qwen3_moe")
    choices = tiny_space(model).choices
    made = kept_library(tmp_path, choices, lambda missing: fit_choices(model, missing, TOKENS))
    read = kept_library(tmp_path, choices, lambda _: pytest.fail("it is there already"))
    for one, two in zip(made[1], read[1], strict=True):
        assert (one.units, one.error) == (two.units, two.error)
        assert torch.equal(one.weight, two.weight)


@pytest.mark.parametrize("config", CONFIGS)
def test_a_masked_router_computes_the_cut_model(config: tuple[int, ...]) -> None:
    model = tiny_model("qwen3_moe")
    space, net = tiny_net(model, TOKENS)
    weights = {one.name: net.library[i][config[i]].weight for i, one in enumerate(net.sublayers)}
    net.set(config)
    masked = logits(model, OTHERS)
    net.close()
    parameters = {f"{one.path}.weight": weights[one.name] for one in net.sublayers if weights[one.name].numel()}
    shrunk = shrink_(tiny_model("qwen3_moe"), plan_at(space, net, config), parameters=parameters)
    assert_close(masked, logits(shrunk, OTHERS), rtol=1e-4, atol=1e-4)


def test_routers_that_are_only_told_their_experts_score_as_masked_ones() -> None:
    model = tiny_model("qwen3_moe")
    teacher, net = Teacher.of(model, OTHERS), tiny_net(model, TOKENS)[1]
    for config in CONFIGS:
        found = net.kls(teacher, config)
        net.set(config)
        assert_close(found, teacher.kls(model), rtol=1e-4, atol=1e-5)


def test_scoring_and_closing_leave_the_model_as_it_was() -> None:
    model = tiny_model("qwen3_moe")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    teacher, net = Teacher.of(model, OTHERS), tiny_net(model, TOKENS)[1]
    for config in CONFIGS:
        net.kls(teacher, config)
        net.set(config)
    net.close()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(one._forward_hooks or one._forward_pre_hooks for one in model.modules())


@torch.no_grad()
def kl_on_the_way(net: Supernet, teacher: Teacher, index: int, level: int, share: float) -> float:
    """The real KL where experts give `share` of a level's output in place of their own."""
    fit, network = net.library[index][level], net.outs[index]
    kept = fit.columns.tolist()

    def move(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        wanted = torch.zeros_like(output)
        if kept:
            dense = net.library[index][0].weight  # the router has the rows of its current level
            own, network.gate.weight = network.gate.weight, torch.nn.Parameter(dense)
            wanted = outputs_of(network, inputs[0].reshape(-1, 64), kept)[0].reshape(output.shape)
            network.gate.weight = own
        moved: torch.Tensor = output + share * (wanted - output)
        return moved

    hook = network.register_forward_hook(move)
    value = teacher.kl(net.model)
    hook.remove()
    return value


@pytest.mark.parametrize("config", [(0, 1, 0, 2, 0, 0), (1, 3, 2, 1, 0, 2)])
def test_slopes_are_those_towards_the_outputs_of_the_levels(config: tuple[int, ...]) -> None:
    model, step = tiny_model("qwen3_moe"), 1e-4  # at 1e-3 a later router sends a token to another expert
    teacher, net = Teacher.of(model, OTHERS), tiny_net(model, TOKENS)[1]
    net.set(config)
    b = linearise(net, teacher, samples=1, seed=0).b.split([len(levels) for levels in net.library])
    for index in (1, 3, 5):
        for level, slope in enumerate(b[index].tolist()):
            ahead, behind = (kl_on_the_way(net, teacher, index, level, share) for share in (step, -step))
            assert slope == pytest.approx((ahead - behind) / (2 * step), rel=0.03, abs=5e-3)


def test_linearising_keeps_the_config() -> None:
    model, config = tiny_model("qwen3_moe"), (1, 3, 2, 1, 0, 2)
    teacher, net = Teacher.of(model, OTHERS), tiny_net(model, TOKENS)[1]
    net.set(config)
    before = teacher.kl(model)
    first, second = (linearise(net, teacher, samples=2, seed=0, batch_tokens=12) for _ in range(2))
    assert teacher.kl(model) == before
    assert torch.equal(first.b, second.b)
    assert torch.equal(first.Q, second.Q)


def test_a_refit_leaves_experts_alone() -> None:
    model, config = tiny_model("qwen3_moe"), (1, 1, 2, 3, 0, 2)
    space, net = tiny_net(model, TOKENS)
    teacher = Teacher.of(model, TOKENS)
    before = net.kl(teacher, config)
    parameters = refit_sequentially(net, config, TOKENS, correction=1.0)
    assert sorted(parameters) == [f"model.layers.{layer}.self_attn.o_proj.weight" for layer in range(3)]
    for index in (1, 5):
        routed = net.library[index][config[index]].weight
        parameters[f"{net.sublayers[index].path}.weight"] = routed
    shrunk = shrink_(tiny_model("qwen3_moe"), plan_at(space, net, config), parameters=parameters)
    assert teacher.kl(shrunk) < before
    assert net.kl(teacher, config, parameters=parameters) == pytest.approx(teacher.kl(shrunk), rel=1e-3)


def test_a_refit_of_the_dense_config_is_the_dense_model() -> None:
    model = tiny_model("qwen3_moe")
    assert refit_refusal(model) is None
    dense = logits(model, TOKENS[:2])
    space, net = tiny_net(model, TOKENS)
    parameters = refit_sequentially(net, space.dense, TOKENS, correction=1.0)
    for name, value in parameters.items():
        model.get_parameter(name).data = value
    assert_close(logits(model, TOKENS[:2]), dense, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "method", ["dilap", "uniform", "layer_error", "equal_widths", "ziplm", "shortgpt", "sleb", "llm_streamline"]
)
def test_methods_that_need_no_channels_keep_the_limit(method: str) -> None:
    task = tiny_task(tiny_model("qwen3_moe"), share=0.75)
    found = methods.get(method)(task)
    assert task.cost_limit.cost(found.plan) <= task.cost_limit.limit
    assert found.plan.pruned_architecture() != task.architecture
    shrink_(task.model, found.plan, parameters=found.parameters)


def test_equal_widths_keep_equally_many_experts() -> None:
    found = methods.get("equal_widths")(tiny_task(tiny_model("qwen3_moe"), share=0.5))
    counts = {len(units) for name, units in found.plan.kept.items() if name.endswith("experts") and units}
    assert len(counts) == 1
    assert counts < {2, 3, 6}


@pytest.mark.parametrize("method", WEIGHING)
def test_methods_that_weigh_channels_refuse_before_they_begin(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    task = tiny_task(tiny_model("qwen3_moe"))
    monkeypatch.setattr(task.model, "forward", lambda **_: pytest.fail("it has begun"))
    monkeypatch.setattr(task.model.model, "forward", lambda **_: pytest.fail("it has begun"))
    with pytest.raises(Unsupported, match="whole experts: use one that chooses measured levels") as caught:
        methods.get(method)(task)
    assert "\n" not in str(caught.value)


def test_output_projections_are_not_listed_for_a_model_with_experts() -> None:
    with pytest.raises(Unsupported, match="whole experts"):
        list(sublayers(tiny_model("qwen3_moe")))

"""FLAP, Wanda-sp and magnitude: the golden checks of their specification, against values from the formulas."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from standins.fabricated import tiny_llama
from standins.models import logits, masked_, random_tokens, tiny_model, tiny_task
from torch.testing import assert_close
from transformers import PreTrainedModel

from dilap.core.errors import InvalidInput, Unsupported
from dilap.core.rules import WidthRules
from dilap.core.shape import LayerWidths
from dilap.methods.flap import Flap, global_counts, group_cost, metric_of, standardised
from dilap.methods.wanda_sp import channel_scores
from dilap.methods.wanda_sp import prune as wanda_sp
from dilap.models.anatomy import decoder_layers, sublayers
from dilap.models.cut import shrink_
from dilap.models.families import family_of
from dilap.models.modeling_dilap import add_output_biases_
from dilap.models.statistics import InputStatistics, layer_statistics
from dilap.search.method import Pruned, PruneTask

STRUCTURES = ("UL-UM", "UL-MM", "AL-MM", "AL-AM")
METRICS = ("IFV", "WIFV", "WIFN")


def statistics_of(x: torch.Tensor) -> InputStatistics:
    found = InputStatistics()
    found.add(x)
    return found


def flap(model: PreTrainedModel, *, share: float = 0.7, **settings: Any) -> tuple[PruneTask, Pruned]:
    task = tiny_task(model, share=share)
    return task, Flap(**settings)(task)


def inputs_and_outputs(model: PreTrainedModel, tokens: torch.Tensor, path: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Of one projection, in the dense model (tokens x inputs), (tokens x hidden)."""
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    hook = model.get_submodule(path).register_forward_hook(lambda _, inputs, out: found.append((inputs[0], out)))
    with torch.no_grad():
        model(tokens)
    hook.remove()
    x, y = found[0]
    return x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])


@pytest.mark.parametrize("squared", [False, True])
def test_metrics_are_the_formulas(squared: bool) -> None:
    """Side by side: IFV = var, WIFV = var * |W_j|^2, WIFN = mean |W_oj| sqrt(mean_seq sum x^2), attention squared."""
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(3, 5, 4, generator=generator) + 1, torch.randn(6, 4, generator=generator)
    flat = x.reshape(-1, 4)
    expected = {
        "IFV": ((flat - flat.mean(0)) ** 2).sum(0) / (len(flat) - 1),
        "WIFV": ((flat - flat.mean(0)) ** 2).sum(0) / (len(flat) - 1) * (weight**2).sum(0),
        "WIFN": weight.abs().mean(0) * ((x**2).sum(1).mean(0)).sqrt(),
    }
    for name, values in expected.items():
        found = metric_of(name, weight, statistics_of(x), squared=squared)  # type: ignore[arg-type]
        assert_close(found, values**2 if squared else values, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "opt", "qwen2"])
def test_bias_is_the_mean_output_of_what_is_removed(family: str) -> None:
    model = tiny_model(family)
    task, found = flap(model)
    for one in sublayers(model):
        x, _ = inputs_and_outputs(model, task.text.train, one.path)
        kept = set(found.plan.kept[f"layers.{one.layer}.channels"])
        if one.kind == "ffn":
            removed = [unit for unit in range(96) if unit not in kept]
            added = found.parameters[f"{one.path}.bias"] - (0 if one.out.bias is None else one.out.bias)
            assert_close(added, one.out.weight[:, removed] @ x.mean(0)[removed], rtol=0.05, atol=0.01)


def test_mean_residual_is_zero_and_the_error_is_no_larger_than_without_bias() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(200, 8, generator=generator) + 0.5, torch.randn(5, 8, generator=generator)
    removed = torch.tensor([1, 4, 6])
    left = x @ weight.T - x[:, [0, 2, 3, 5, 7]] @ weight[:, [0, 2, 3, 5, 7]].T
    bias = weight[:, removed] @ statistics_of(x).mean.float()[removed]
    assert_close((left - bias).mean(0), torch.zeros(5), atol=1e-5, rtol=0)
    assert (left - bias).square().sum() <= left.square().sum()


@pytest.mark.parametrize("metric", ["IFV", "WIFV"])
def test_constant_channels_go_first_and_without_loss(metric: Any) -> None:
    """Gates and ups of four channels give constants: zero weights and biases of their own."""
    model = tiny_model("llama", mlp_bias=True)
    for layer in decoder_layers(model):
        with torch.no_grad():
            for path in ("gate_proj", "up_proj"):
                layer.get_parameter(f"mlp.{path}.weight")[[3, 5, 50, 90]] = 0
                layer.get_parameter(f"mlp.{path}.bias")[[3, 5, 50, 90]] = 0.5
    before, task = logits(model, random_tokens(2, 12)), tiny_task(model)
    findings = Flap(metric=metric, structure="UL-UM")._findings(task)
    plan = task.keep(findings.sums(), ratio=4.5 / 96)
    assert set(plan.kept["layers.0.channels"]) == set(range(96)) - {3, 5, 50, 90}
    assert [widths.num_kv_heads for widths in plan.all_widths()] == [2, 2, 2]
    shrink_(model, plan, parameters=findings.biases(plan))
    assert_close(logits(model, random_tokens(2, 12)), before, rtol=1e-3, atol=2e-2)


@pytest.mark.parametrize("kind", [{"num_key_value_heads": 4}, {}], ids=["mha", "gqa"])
def test_sliced_equals_masked_with_biases(kind: dict[str, int]) -> None:
    model, tokens = tiny_model("llama", **kind), random_tokens(2, 12)
    _, found = flap(model)
    sliced = shrink_(tiny_model("llama", **kind), found.plan, parameters=found.parameters)
    masked_(model, found.plan)
    add_output_biases_(model, family_of(model.config))
    with torch.no_grad():
        for name, value in found.parameters.items():
            model.get_parameter(name).copy_(value)
    assert_close(logits(model, tokens), logits(sliced, tokens), rtol=1e-4, atol=1e-4)


def test_hand_example() -> None:
    attention, ffn = torch.tensor([1.0, 3.0, 2.0, 10.0]).square(), torch.tensor([1.0, 2.0, 4.0, 9.0])
    heads = standardised(attention).reshape(2, 2).mean(1)
    assert_close(heads, torch.tensor([-0.4918, 0.4918]), rtol=0, atol=1e-4)
    assert_close(standardised(ffn), torch.tensor([-0.8429, -0.5620, 0.0, 1.4049]), rtol=0, atol=1e-4)
    scores, costs = {"heads": heads, "channels": standardised(ffn)}, {"heads": 8 / 3, "channels": 1.0}
    assert global_counts(scores, costs, ratio=0.5, strict=False) == {"heads": 1, "channels": 2}


def test_upstream_compatible_leaves_out_the_unit_at_the_threshold() -> None:
    attention, ffn = torch.tensor([1.0, 3.0, 2.0, 10.0]).square(), torch.tensor([1.0, 2.0, 4.0, 9.0])
    scores = {"heads": standardised(attention).reshape(2, 2).mean(1), "channels": standardised(ffn)}
    kept = global_counts(scores, {"heads": 8 / 3, "channels": 1.0}, ratio=0.5, strict=True)
    assert kept == {"heads": 1, "channels": 1}


def test_error_of_one_compensated_channel_is_its_metric() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(100, 6, generator=generator, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    for j in range(6):
        error = torch.outer(x[:, j] - x[:, j].mean(), weight[:, j]).square().sum()
        wifv = metric_of("WIFV", weight, statistics_of(x), squared=False)[j]
        assert float(error) == pytest.approx((len(x) - 1) * float(wifv), rel=1e-4)


@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.5])
def test_removed_cost_is_within_one_unit_of_the_ratio(ratio: float) -> None:
    task = tiny_task(tiny_model("llama"))
    findings = Flap()._findings(task)
    scores, costs = {}, {}
    for one, values in zip(findings.sublayers, findings.metrics, strict=True):
        scores[one.name] = standardised(values).reshape(2 if one.kind == "attention" else 96, -1).mean(1)
        costs[one.name] = group_cost(task.architecture) if one.kind == "attention" else 1.0
    counts = global_counts(scores, costs, ratio=ratio, strict=False)
    total = sum(costs[name] * len(values) for name, values in scores.items())
    removed = sum(costs[name] * (len(values) - counts[name]) for name, values in scores.items())
    assert abs(removed - ratio * total) <= group_cost(task.architecture)


@pytest.mark.parametrize(("ratio", "expected"), [(1, 4 / 3), (2, 2.0), (4, 10 / 3)])
def test_cost_of_a_kv_group_is_that_of_its_weights(ratio: int, expected: float) -> None:
    """4d/3 with multi-head attention; Llama-3-8B's 426.7 with a ratio of 4 and d = 128, not 512/3."""
    layer = LayerWidths(num_heads=2 * ratio, num_kv_heads=2, num_channels=64)
    architecture = replace(tiny_llama(layer), head_dim=1)
    assert group_cost(architecture) == pytest.approx(expected)


def test_worked_example_of_grouped_heads() -> None:
    """Section 8.2: removing a KV group of 4 query and 2 KV heads of 2 costs 96 weights, 4 channels of 3 x 8."""
    layer = LayerWidths(num_heads=4, num_kv_heads=2, num_channels=6)
    architecture = replace(tiny_llama(layer), head_dim=2, hidden_size=8)
    less = replace(layer, num_heads=2, num_kv_heads=1)
    assert architecture.attention_parameters(layer) - architecture.attention_parameters(less) == 96
    assert group_cost(architecture) == 4


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("metric", METRICS)
def test_every_metric_and_structure_keeps_the_target(metric: Any, structure: Any) -> None:
    task, found = flap(tiny_model("llama"), metric=metric, structure=structure)
    assert 0.8 * task.cost_limit.limit <= task.cost_limit.cost(found.plan) <= task.cost_limit.limit


def test_uniform_structure_gives_every_layer_the_same_widths() -> None:
    _, found = flap(tiny_model("llama"), structure="UL-UM")
    assert len(set(found.plan.all_widths())) == 1


def test_manual_heads_are_removed_as_asked() -> None:
    task, found = flap(tiny_model("llama"), structure="AL-MM", remove_heads=4, share=0.8)
    assert sum(widths.num_kv_heads for widths in found.plan.all_widths()) == 2 * task.num_layers - 2


def test_runtime_without_output_biases_is_unsupported() -> None:
    task = tiny_task(tiny_model("llama"), rules=WidthRules(output_biases=False))
    with pytest.raises(Unsupported, match="--set compensate=false"):
        Flap()(task)
    assert not Flap(compensate=False)(task).parameters


def test_wanda_scores_of_columns_are_the_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(50, 4, generator=generator), torch.randn(6, 4, generator=generator)
    expected = torch.stack([weight[:, j].abs().mean() * x[:, j].square().mean().sqrt() for j in range(4)])
    assert_close(channel_scores(weight, statistics_of(x[None]).norms), expected)


def test_wanda_sp_scores_a_layer_on_what_the_pruned_ones_give() -> None:
    """Layer by layer by hand: score, zero the columns of what goes, and go on through the pruned layer."""
    found = wanda_sp(tiny_task(tiny_model("llama"))).plan
    model = tiny_model("llama")
    for step in layer_statistics(model, tiny_task(model).text.train, propagate="pruned"):
        i = step.index
        for one in (one for one in sublayers(model) if one.layer == i):
            norms = step.statistics[f"{one.kind}_out"].norms  # type: ignore[index]
            columns, mask = one.out.weight.abs().mean(0) * norms, torch.ones(one.out.in_features)
            grid = columns.reshape(2, 2, 16) if one.kind == "attention" else columns.reshape(96, 1)
            for dimension, group in enumerate(one.block.groups):  # KV groups and query slots, or channels
                kept = found.kept[group.name]
                scores = grid.movedim(dimension, 0).flatten(1).sum(1)
                assert set(kept) == set(scores.topk(len(kept)).indices.tolist())
                stay = torch.zeros(len(scores)).index_fill_(0, torch.tensor(kept), 1.0)
                shape = [len(scores) if other == dimension else 1 for other in range(grid.dim())]
                mask *= stay.reshape(shape).expand(grid.shape).reshape(-1)
            with torch.no_grad():
                one.out.weight.mul_(mask)


def test_heads_are_counted_as_the_authors_count_them() -> None:
    """Query heads: 4 of a model with 2 in every KV group are 2 groups."""
    task, found = flap(tiny_model("llama"), structure="AL-MM", remove_heads=4, share=0.8)
    assert sum(widths.num_heads for widths in found.plan.all_widths()) == 4 * task.num_layers - 4


@pytest.mark.parametrize("family", ["llama", "opt", "qwen2", "qwen3", "phi3"])
def test_masks_only_is_functionally_the_cut_model(family: str) -> None:
    tokens = random_tokens(2, 12)
    _, cut = flap(tiny_model(family))
    _, masked = flap(tiny_model(family), masks_only=True)
    assert masked.plan.all_widths() == masked.plan.architecture.layers
    assert sum(masked.facts["masked"].values()) > 0
    models = [shrink_(tiny_model(family), one.plan, parameters=one.parameters) for one in (cut, masked)]
    assert_close(logits(models[1], tokens), logits(models[0], tokens), rtol=1e-4, atol=1e-4)


def test_statistics_are_of_the_first_nsamples_sequences() -> None:
    task = tiny_task(tiny_model("llama"))
    few = replace(task, text=replace(task.text, train=task.text.train[:3]))
    wanted, found = Flap()._findings(few), Flap(nsamples=3)._findings(task)
    assert all(torch.equal(a, b) for a, b in zip(wanted.metrics, found.metrics, strict=True))
    with pytest.raises(InvalidInput, match="nsamples is 9, but there are 8 calibration sequences"):
        Flap(nsamples=9)(task)


def test_a_layer_without_units_is_removed_and_its_mean_output_stays() -> None:
    """It goes to the bias of the last sublayer before it, behind which nothing reads the stream."""
    model, tokens = tiny_model("llama"), random_tokens(2, 12)
    task = tiny_task(model)
    findings = Flap()._findings(task)
    counts = {block.main.name: block.main.num_units for block in task.architecture.blocks}
    plan = task.keep(
        {name: torch.zeros(n) for name, n in counts.items()}, counts=counts | {"layers.1.channels": 0}, may_remove=True
    )
    assert [widths.num_channels for widths in plan.all_widths()] == [96, 0, 96]
    biases = findings.biases(plan)
    cut = shrink_(tiny_model("llama"), plan, parameters=biases)
    add_output_biases_(model, family_of(model.config))
    with torch.no_grad():  # the same by hand: the network of layer 1 gives its mean output for every token
        weight, bias = (decoder_layers(model)[1].get_parameter(f"mlp.down_proj.{one}") for one in ("weight", "bias"))
        bias.copy_(weight.float() @ findings.means[3])
        weight.zero_()
    assert_close(logits(cut, tokens), logits(model, tokens), rtol=1e-4, atol=1e-4)


def test_a_runtime_that_needs_every_sublayer_keeps_a_unit_of_each() -> None:
    rules = WidthRules(ffn_removal=False, attention_removal=False)
    task = tiny_task(tiny_model("llama"), rules=rules)
    counts = {block.main.name: 0 for block in task.architecture.blocks}
    plan = task.keep({name: torch.zeros(96) for name in counts}, counts=counts, may_remove=True)
    assert all(widths.num_kv_heads == widths.num_channels == 1 for widths in plan.all_widths())

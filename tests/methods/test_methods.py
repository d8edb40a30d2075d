"""Every method keeps its limit with a plan that loads, leaves the model alone, and repeats itself."""

import re
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from standins import ROOT
from standins.models import exported_llama, logits, random_tokens, tiny_model, tiny_task
from standins.quick_methods import NAMES, method
from transformers import PreTrainedModel

from dilap import methods
from dilap.core.errors import Infeasible, InvalidInput, Unsupported
from dilap.core.rules import WidthRules
from dilap.core.shape import LayerWidths
from dilap.models.cut import shrink_
from dilap.search.method import Pruned
from dilap.search.pruned_file import load_pruned, save_pruned

# peft asks transformers by the old name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
TOKENS = random_tokens(2, 12, seed=2)
FAMILIES = ("llama", "opt")  # grouped heads with a gated network; biases without


def model_of(kind: str) -> PreTrainedModel:
    """Deep enough for methods that leave the ends alone; MHA or GQA."""
    changes = {"mha": {"num_key_value_heads": 4}, "gqa": {}}[kind]
    return tiny_model("llama", num_hidden_layers=6, **changes)


@cache
def pruned(name: str, kind: str = "gqa") -> Pruned:
    return method(name)(tiny_task(model_of(kind), share=0.7))


@pytest.mark.parametrize("kind", ["mha", "gqa"])
@pytest.mark.parametrize("name", NAMES)
def test_plan_keeps_the_limit(name: str, kind: str) -> None:
    task = tiny_task(model_of(kind), share=0.7)
    limit, cost = task.cost_limit.limit, task.cost_limit.cost(pruned(name, kind).plan)
    assert 0.5 * limit < cost <= limit * (1 + 1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_model_is_left_as_it_was(name: str) -> None:
    model = model_of("gqa")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    method(name)(tiny_task(model, share=0.8))
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not model.training


@pytest.mark.parametrize("name", NAMES)
def test_method_is_deterministic_for_a_seed(name: str) -> None:
    again = method(name)(tiny_task(model_of("gqa"), share=0.7))
    assert again.plan == pruned(name).plan
    assert all(torch.equal(value, again.parameters[key]) for key, value in pruned(name).parameters.items())


@pytest.mark.parametrize("kind", ["mha", "gqa"])
@pytest.mark.parametrize("name", NAMES)
def test_result_shrinks_to_the_widths_of_its_plan(name: str, kind: str) -> None:
    found = pruned(name, kind)
    model = shrink_(model_of(kind), found.plan, parameters=found.parameters)
    assert torch.isfinite(logits(model, TOKENS)).all()
    assert sum(p.numel() for p in model.parameters()) >= found.plan.pruned_architecture().num_parameters


@pytest.mark.parametrize("name", NAMES)
def test_query_heads_are_never_removed_unevenly(name: str) -> None:
    """Every layer keeps a whole number of query heads a KV head."""
    for widths in pruned(name).plan.all_widths():
        assert widths.num_heads % max(1, widths.num_kv_heads) == 0


@pytest.mark.parametrize("name", NAMES)
def test_impossible_target_is_infeasible(name: str) -> None:
    with pytest.raises(Infeasible):
        method(name)(tiny_task(model_of("gqa"), share=0.005))


@pytest.mark.parametrize("name", NAMES)
def test_answer_survives_a_round_trip(name: str, tmp_path: Path) -> None:
    save_pruned(tmp_path / "pruned.safetensors", pruned(name))
    found = load_pruned(tmp_path / "pruned.safetensors")
    assert found.plan == pruned(name).plan
    assert found.parameters.keys() == pruned(name).parameters.keys()
    assert dict(found.facts) == dict(pruned(name).facts)


def test_damaged_answer_says_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "pruned.safetensors"
    path.write_bytes(b"{")
    with pytest.raises(InvalidInput, match=r"damaged result of a method .*; remove the file and run again"):
        load_pruned(path)


def test_readmes_own_method_is_found_by_module_and_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readme = (ROOT / "dilap" / "README.md").read_text()
    (code,) = re.findall(r"```python\n(from .*?)```", readme, re.DOTALL)
    assert len(code.splitlines()) < 40
    (tmp_path / "my_module.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    task = tiny_task(model_of("gqa"), share=0.8)
    found = methods.get("my_module:SmallestGates", {"power": "1"})(task)
    assert task.cost_limit.cost(found.plan) <= task.cost_limit.limit
    kept = found.plan.kept["layers.0.channels"]
    gates = task.model.model.layers[0].mlp.gate_proj.weight.detach().abs().sum(1)
    assert set(kept) == set(gates.topk(len(kept)).indices.tolist())


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("magic", {}, "unknown method 'magic'"),
        ("no_such_module:X", {}, "cannot be imported"),
        ("dilap.methods.flap:Missing", {}, "has no 'Missing'"),
        ("flap", {"metrics": "WIFN"}, "method flap has no setting 'metrics'; it has metric"),
        ("flap", {"metric": "FLOPS"}, "metric is IFV or WIFV or WIFN, got 'FLOPS'"),
        ("flap", {"remove_heads": "few"}, "remove_heads is int, got 'few'"),
        ("magnitude", {"ratio": "1"}, "method magnitude has no settings, got ratio"),
    ],
)
def test_wrong_names_and_settings_are_one_line(name: str, settings: dict[str, str], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        methods.get(name, settings)


def test_kept_units_are_the_best_and_rounded_to_what_loads() -> None:
    task = tiny_task(model_of("gqa"), rules=WidthRules(ffn_multiple=32, head_pruning=False))
    scores = {block.main.name: torch.arange(block.main.num_units) for block in task.blocks}
    plan = task.keep(scores, ratio=0.45)
    assert plan.kept["layers.0.channels"] == tuple(range(32, 96))
    assert plan.kept["layers.0.kv_groups"] == (0, 1)


def test_no_group_loses_all_units() -> None:
    task = tiny_task(model_of("gqa"))
    plan = task.keep({group.name: torch.zeros(group.num_units) for group in task.groups}, ratio=1.0)
    assert min(len(units) for units in plan.kept.values()) == 1


WHOLE = {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 1.0}


@pytest.mark.parametrize("name", [name for name in NAMES if name not in methods.TRAINED])
def test_plan_of_fused_matrices_is_that_of_separate_ones(name: str) -> None:
    fused = tiny_model("phi3", num_hidden_layers=6, rope_parameters=WHOLE)
    separate = exported_llama(fused, num_hidden_layers=6, rms_norm_eps=1e-5)
    found, expected = (method(name)(tiny_task(model, share=0.7)) for model in (fused, separate))
    assert found.plan.kept == expected.plan.kept


@pytest.mark.parametrize("name", methods.TRAINED)
def test_trained_methods_prune_fused_matrices(name: str) -> None:
    model = tiny_model("phi3", num_hidden_layers=6)
    task = tiny_task(model, share=0.7)
    found = method(name)(task)
    assert task.cost_limit.cost(found.plan) <= task.cost_limit.limit * (1 + 1e-9)
    assert torch.isfinite(logits(shrink_(model, found.plan, parameters=found.parameters), TOKENS)).all()


def test_sprint_tunes_nothing_in_front_of_a_norm() -> None:
    task = tiny_task(tiny_model("olmo2"))
    with pytest.raises(Unsupported, match="the norms of OLMo 2 stand behind its sublayers; use --set tune=false"):
        methods.get("sprint")(task)
    assert methods.get("sprint", {"tune": "false"})(task).plan.architecture == task.architecture


def test_the_default_method_skips_the_refit_of_a_family_with_norms_behind_its_sublayers() -> None:
    said: list[str] = []
    task = tiny_task(tiny_model("olmo2"), share=0.6, report=said.append)
    pruned = methods.get("dilap")(task)
    assert task.cost_limit.predict(pruned.plan.all_widths()) <= task.cost_limit.limit
    assert [line for line in said if line.startswith("refit")] == [
        "refit: skipped, the projections of the search stay: the norms of OLMo 2 stand behind its sublayers"
    ]


RULES: dict[str, tuple[WidthRules, dict[str, tuple[int, ...]]]] = {
    "without attention": (WidthRules(attention_removal=False), {"layers.1.kv_groups": ()}),
    "without a feed-forward network": (WidthRules(ffn_removal=False), {"layers.1.channels": ()}),
    "fewer heads": (WidthRules(head_pruning=False), {"layers.1.kv_groups": (0,)}),
    "multiples of 32": (WidthRules(ffn_multiple=32), {"layers.1.channels": tuple(range(33))}),
    "without this layer": (WidthRules(layer_removal=False), {"layers.1.kv_groups": (), "layers.1.channels": ()}),
    "equal ones": (WidthRules(equal_widths=True), {"layers.1.channels": tuple(range(32))}),
}


@pytest.mark.parametrize("what", RULES)
def test_plan_that_does_not_load_is_refused(what: str) -> None:
    rules, kept = RULES[what]
    full = tiny_task(model_of("gqa")).without([])
    plan = type(full)(base="base", architecture=full.architecture, kept={**full.kept, **kept})
    with pytest.raises(Unsupported, match=what):
        rules.require(plan)


def test_a_method_that_removes_layers_is_refused_at_its_first_plan() -> None:
    task = tiny_task(model_of("gqa"), rules=WidthRules(layer_removal=False))
    with pytest.raises(Unsupported, match=r"layer 1: .* loads no model without this layer"):
        task.without_layers([1])


def test_removed_layers_load_whatever_sublayers_may_be_removed() -> None:
    task = tiny_task(model_of("gqa"))
    rules = WidthRules(attention_removal=False, ffn_removal=False, equal_widths=True, head_pruning=False)
    rules.require(task.without_layers([1, 3]))
    assert task.without_layers([1, 3]).all_widths()[1] == LayerWidths(num_heads=0, num_kv_heads=0, num_channels=0)


@pytest.mark.parametrize("name", methods.TRAINED)
def test_methods_that_train_read_the_training_text(name: str) -> None:
    """Their results change with it and with nothing else."""
    task = tiny_task(model_of("gqa"), share=0.7)
    same = method(name)(replace(task, training=task.text.train))
    other = method(name)(replace(task, training=random_tokens(8, 24, seed=9)))
    changed = [key for key, value in other.parameters.items() if not torch.equal(value, same.parameters[key])]
    assert changed
    assert all(torch.equal(value, same.parameters[key]) for key, value in pruned(name).parameters.items())

"""A family that is a plain variation of Llama is one new file; one with factors exports tensors that have them."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from standins.models import (
    CLASSES,
    CLONES,
    FAMILIES,
    Kept,
    byte_level_tokenizer,
    compensated_model,
    exported_llama,
    logits,
    masked_,
    plan_for,
    random_tokens,
    tiny_model,
)
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from dilap import backends, export
from dilap.core.errors import Unsupported
from dilap.core.numerics import Numerics
from dilap.core.plan import full_plan
from dilap.core.rules import Capabilities, WidthRules
from dilap.models import families
from dilap.models.anatomy import architecture_of, blocks_of, exported_tensors, numerics_of, stand_in_numerics
from dilap.models.cut import shrink_
from dilap.models.families import family_of

KEPT: Kept = {"layers.0.channels": tuple(range(64)), "layers.1.kv_groups": (1,), "layers.2.query_slots": (0,)}
FILE = '"""A clone."""\n\nfrom dilap.models.families.family import Family\n\nFAMILY = Family(name="clone")\n'


class CloneConfig(LlamaConfig):  # type: ignore[misc]
    model_type = "clone"


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The folder of families with a file more."""
    (tmp_path / "families").mkdir()
    (tmp_path / "families" / "clone.py").write_text(FILE)
    monkeypatch.setattr(families, "__path__", [*families.__path__, str(tmp_path / "families")])
    families.families.cache_clear()
    yield
    families.families.cache_clear()


def clone_model() -> PreTrainedModel:
    llama = tiny_model("llama")
    settings = {name: one for name, one in llama.config.to_dict().items() if name != "model_type"}
    model = LlamaForCausalLM(CloneConfig(**settings)).eval()
    model.load_state_dict(llama.state_dict())
    return model


@pytest.mark.usefixtures("clone")
def test_a_file_makes_the_family_known() -> None:
    assert family_of(clone_model().config).name == architecture_of(clone_model()).family == "clone"


@pytest.mark.usefixtures("clone")
def test_its_masked_model_equals_the_cut_one() -> None:
    plan, tokens = plan_for(clone_model(), KEPT), random_tokens(2, 12)
    found = logits(shrink_(clone_model(), plan), tokens)
    assert_close(found, logits(masked_(clone_model(), plan), tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("clone")
@pytest.mark.parametrize(("backend", "precision"), [("llamacpp", "f32"), ("onnxruntime", "f32")])
def test_runtimes_hold_it_as_they_hold_llama(backend: str, precision: str, tmp_path: Path) -> None:
    if reason := backends.get(backend).unavailable():
        pytest.skip(reason)
    model = shrink_(clone_model(), plan_for(clone_model(), KEPT))
    backends.require_loadable(backends.get(backend), architecture_of(model), precision=precision)
    artifact = export.get(backend).export(
        model,
        tokenizer=byte_level_tokenizer(tmp_path / "words"),
        precision=precision,
        plan_digest="",
        out=tmp_path / "out",
    )
    assert artifact.sqnr_db is not None
    assert artifact.sqnr_db > 60


@pytest.mark.parametrize("family", CLONES)
@pytest.mark.parametrize("backend", ["llamacpp", "onnxruntime"])
def test_a_llama_under_another_name_is_held_as_llama_is(family: str, backend: str, tmp_path: Path) -> None:
    if reason := backends.get(backend).unavailable():
        pytest.skip(reason)
    model = shrink_(tiny_model(family), plan_for(tiny_model(family), KEPT))
    words = byte_level_tokenizer(tmp_path / "words")
    out = tmp_path / "out"
    artifact = export.get(backend).export(model, tokenizer=words, precision="f32", plan_digest="", out=out)
    assert (artifact.sqnr_db or 0) > 60


@pytest.mark.parametrize("family", CLASSES)
def test_units_lie_in_every_tensor_whose_size_they_set(family: str) -> None:
    """Cutting one unit of every group changes the shape of each of its members, and of no other tensor."""
    model = tiny_model(family)
    before = {name: tuple(one.shape) for name, one in model.named_parameters()}
    groups = [one for block in blocks_of(model) for one in block.groups if one.num_units > 1 and not one.whole]
    members = {member.tensor for group in groups for member in group.members}
    kept: Kept = {group.name: tuple(range(1, group.num_units)) for group in groups}
    after = {name: tuple(one.shape) for name, one in shrink_(model, plan_for(model, kept)).named_parameters()}
    assert {name for name in before if before[name] != after[name]} == members


def test_numerics_are_those_that_the_model_computes_with() -> None:
    model = tiny_model("llama", rms_norm_eps=3e-6, rope_parameters={"rope_theta": 500.0, "rope_type": "default"})
    numerics = numerics_of(model)
    rotary = numerics.layers[2].rotary
    assert rotary is not None
    assert rotary.frequencies == tuple(model.model.rotary_emb.inv_freq.tolist())
    assert (numerics.norm_eps, numerics.activation, rotary.base) == (3e-6, "silu", 500.0)
    assert numerics.context_length == model.config.max_position_embeddings


def turned(numerics: Numerics) -> list[bool]:
    """Whether the heads of each layer have a rotary embedding."""
    return [layer.rotary is not None for layer in numerics.layers]


def test_smollm3_turns_the_heads_of_the_layers_that_its_config_says() -> None:
    model = tiny_model("smollm3", no_rope_layers=[0, 1, 1])
    assert turned(numerics_of(model)) == [False, True, True]


def test_layers_keep_their_kind_of_positions_when_another_is_removed() -> None:
    model = tiny_model("smollm3")  # its layer 1 has no rotary embedding
    shrunk = shrink_(model, plan_for(model, {"layers.0.kv_groups": (), "layers.0.channels": ()}))
    assert shrunk.config.no_rope_layers == [0, 1]
    assert turned(numerics_of(shrunk)) == [False, True]


def test_probes_of_smollm3_have_its_usual_pattern() -> None:
    architecture = architecture_of(tiny_model("smollm3", num_hidden_layers=9))
    assert turned(stand_in_numerics(architecture)) == [layer not in (3, 7) for layer in range(9)]


def test_heads_under_one_norm_stay_or_go_together() -> None:
    model = tiny_model("olmo2")
    kept = full_plan(architecture_of(model), base="base").kept
    replace(plan_for(model, {}), kept=kept | {"layers.1.kv_groups": ()})
    for group in ("kv_groups", "query_slots"):
        with pytest.raises(ValueError, match=f"{group}: 1 of 2 units kept, but they stay or go together"):
            replace(plan_for(model, {}), kept=kept | {f"layers.1.{group}": (0,)})


def test_runtimes_offer_no_part_of_heads_under_one_norm() -> None:
    attention = architecture_of(tiny_model("olmo2")).blocks[0]
    assert Capabilities().levels(attention) == [(0, 0), (2, 2)]
    assert [WidthRules().rounded(group, 1) for group in attention.groups] == [2, 2]


def test_learned_positions_turn_nothing() -> None:
    assert not any(turned(numerics_of(tiny_model("opt"))))


@pytest.mark.parametrize("family", CLASSES)
def test_stand_ins_compute_with_what_the_family_does(family: str) -> None:
    """Timed with random weights, a model takes the time of the real one."""
    model = tiny_model(family)
    real, stand_in = numerics_of(model), stand_in_numerics(architecture_of(model))
    found, expected = ((one.activation, any(turned(one))) for one in (stand_in, real))
    assert found == expected


def test_a_rotary_embedding_that_depends_on_the_length_is_refused() -> None:
    rope = {"rope_theta": 5000.0, "rope_type": "dynamic", "factor": 2.0}
    with pytest.raises(Unsupported, match="cannot be exported yet; known, on whole heads: default, linear"):
        numerics_of(tiny_model("llama", rope_parameters=rope))


def test_norms_behind_the_sublayers_are_refused() -> None:
    with pytest.raises(Unsupported, match="OPT-350m"):
        numerics_of(tiny_model("opt", do_layer_norm_before=False))


FACTORS = ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling")


def assert_exports_a_llama(**changes: Any) -> None:
    """A Llama with the tensors that a Granite exports has its logits."""
    model, tokens = tiny_model("granite", **changes), random_tokens(2, 12)
    llama = exported_llama(model, **{name: one for name, one in changes.items() if name not in FACTORS})
    assert_close(logits(llama, tokens), logits(model, tokens), rtol=1e-4, atol=1e-4)  # f32 rounds other numbers


@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied head"])
@pytest.mark.parametrize("biases", [False, True], ids=["no biases", "biases"])
def test_granite_exports_a_llama_that_computes_the_same(tied: bool, biases: bool) -> None:
    assert_exports_a_llama(tie_word_embeddings=tied, attention_bias=biases, mlp_bias=biases)


@pytest.mark.parametrize("factor", FACTORS)
def test_granite_may_have_any_of_its_factors(factor: str) -> None:
    assert_exports_a_llama(**{**dict.fromkeys(FACTORS, 1), "attention_multiplier": 0.25, factor: 0.7})


def test_biases_that_a_method_adds_are_exported_with_the_factor() -> None:
    model = compensated_model("granite", {})
    own, exported = model.state_dict(), exported_tensors(model)
    names = [name for name in own if name.endswith(("o_proj.bias", "down_proj.bias"))]
    assert len(names) == 6
    assert all(torch.equal(exported[name], 0.5 * own[name]) for name in names)


def test_factors_are_applied_in_f32() -> None:
    model = tiny_model("granite", residual_multiplier=0.22).to(torch.bfloat16)
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(exported_tensors(model)[name], 0.22 * model.get_parameter(name).float())


@pytest.mark.parametrize("family", [one for one in FAMILIES if one != "granite" and not one.startswith("gemma")])
def test_families_without_factors_export_their_own_tensors(family: str) -> None:
    own, exported = (model := tiny_model(family)).state_dict(), exported_tensors(model)
    assert {name: one.data_ptr() for name, one in exported.items()} == {
        name: one.data_ptr() for name, one in own.items()
    }


GEMMAS = ("gemma2", "gemma3_text")


@pytest.mark.parametrize("family", GEMMAS)
def test_gemma_tells_which_layers_slide(family: str) -> None:
    numerics = numerics_of(tiny_model(family))
    assert [layer.window for layer in numerics.layers] == [8, None, 8]
    assert numerics.context_length == 128


def test_each_kind_of_layer_of_gemma_3_has_its_rotary_embedding() -> None:
    layers = numerics_of(tiny_model("gemma3_text")).layers
    assert [layer.rotary and layer.rotary.base for layer in layers] == [1e4, 1e6, 1e4]


def test_gemma_2_tells_its_scales_and_caps() -> None:
    found = numerics_of(tiny_model("gemma2"))
    assert (found.attention_scale, found.embedding_scale) == (24**-0.5, 8.0)
    assert (found.attention_softcap, found.logits_softcap) == (4.0, 5.0)


def test_gemma_3_has_no_cap_of_attention_whatever_its_config_says() -> None:
    found, tokens = tiny_model("gemma3_text", attn_logit_softcapping=4.0), random_tokens(2, 12)
    assert numerics_of(found).attention_softcap is None
    assert torch.equal(logits(found, tokens), logits(tiny_model("gemma3_text"), tokens))


@pytest.mark.parametrize("family", GEMMAS)
def test_gemma_scales_embeddings_by_a_root_rounded_as_its_weights_are(family: str) -> None:
    model = tiny_model(family, hidden_size=48).to(torch.bfloat16)
    assert numerics_of(model).embedding_scale == 6.9375  # the root of 48 is 6.928


@pytest.mark.parametrize("family", GEMMAS)
def test_norms_of_gemma_are_exported_as_gains(family: str) -> None:
    model = tiny_model(family)
    own, exported = model.state_dict(), exported_tensors(model)
    norms = [name for name, module in model.named_modules() if type(module).__name__.endswith("RMSNorm")]
    assert len(norms) == 3 * (4 if family == "gemma2" else 6) + 1
    for name in own:
        gain = 1 + own[name] if name.removesuffix(".weight") in norms else own[name]
        assert torch.equal(exported[name], gain), name


@pytest.mark.parametrize("family", GEMMAS)
def test_the_layers_of_gemma_that_are_left_keep_their_kinds(family: str) -> None:
    model = tiny_model(family)
    shrunk = shrink_(model, plan_for(model, {"layers.0.kv_groups": (), "layers.0.channels": ()}))
    assert [layer.window for layer in numerics_of(shrunk).layers] == [None, 8]


@pytest.mark.parametrize(("family", "period"), [("gemma2", 2), ("gemma3_text", 6)])
def test_probes_of_gemma_have_its_usual_pattern(family: str, period: int) -> None:
    layers = stand_in_numerics(architecture_of(tiny_model(family, num_hidden_layers=13))).layers
    assert [layer.window is None for layer in layers] == [(index + 1) % period == 0 for index in range(13)]

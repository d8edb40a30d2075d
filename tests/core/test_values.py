"""The values that travel: budgets, plans, architectures and statistics."""

import json
import math
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from standins.fabricated import tiny_llama
from standins.models import FAMILIES, Kept, plan_for, random_tokens, tiny_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from dilap.core.codec import decode, encode
from dilap.core.errors import InvalidInput
from dilap.core.measurement import Fingerprint, Measurement, median_interval, quantile
from dilap.core.plan import Plan, full_plan
from dilap.core.precisions import for_every_layer
from dilap.core.shape import Architecture, LayerWidths
from dilap.core.workload import Budget, Workload
from dilap.models.anatomy import architecture_of
from dilap.models.cut import shrink_


def architecture(*layers: tuple[int, int, int]) -> Architecture:
    widths = tuple(LayerWidths(num_heads=h, num_kv_heads=kv, num_channels=c) for h, kv, c in layers)
    return replace(tiny_llama(*widths), vocab_size=300)


DENSE = architecture((4, 2, 96), (4, 2, 96))
FULL = full_plan(DENSE, base="base")


@pytest.mark.parametrize(
    ("text", "seconds"), [("40ms", 0.04), ("0.5s", 0.5), ("900us", 9e-4), (" 7 ms ", 7e-3), (".5s", 0.5)]
)
def test_absolute_budget_does_not_depend_on_the_dense_model(text: str, seconds: float) -> None:
    assert Budget.parse(text).limit_seconds(dense_seconds=3.0) == pytest.approx(seconds)


@pytest.mark.parametrize(("text", "fraction"), [("70%", 0.7), ("1.4x", 1 / 1.4), ("100%", 1.0)])
def test_relative_budget_scales_the_dense_latency(text: str, fraction: float) -> None:
    assert Budget.parse(text).limit_seconds(dense_seconds=2.0) == pytest.approx(2 * fraction)


@pytest.mark.parametrize("text", ["", "40", "ms", "-3ms", "0ms", "0%", "0x", "4 0ms", "40MS", "1e3ms", "nan%", "fast"])
def test_bad_budget_is_invalid_input_that_quotes_it(text: str) -> None:
    with pytest.raises(InvalidInput, match=r"is not understood; write 40ms") as caught:
        Budget.parse(text)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize("text", ["40ms", "70%"])
def test_budget_prints_as_it_is_written(text: str) -> None:
    assert str(Budget.parse(text)) == text


def test_budget_keeps_the_statistic_that_was_asked_for() -> None:
    assert Budget.parse("40ms", statistic="p90").statistic == "p90"


@pytest.mark.parametrize("given", [{}, {"seconds": 1.0, "fraction": 0.5}, {"seconds": math.inf}, {"fraction": -0.1}])
def test_budget_is_exactly_one_positive_number(given: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="one positive number"):
        Budget(**given)  # type: ignore[arg-type]


@pytest.mark.parametrize("widths", [(-1, 1, 8), (0, 1, 8), (2, 0, 8), (3, 2, 8), (0, 0, -1)])
def test_impossible_widths_are_refused(widths: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match=r"width|heads"):
        LayerWidths(num_heads=widths[0], num_kv_heads=widths[1], num_channels=widths[2])


def test_groups_are_kv_heads_query_slots_and_channels() -> None:
    blocks = architecture((4, 2, 96), (0, 0, 8)).blocks
    assert [(group.name, group.num_units) for block in blocks for group in block.groups] == [
        ("layers.0.kv_groups", 2),
        ("layers.0.query_slots", 2),
        ("layers.0.channels", 96),
        ("layers.1.channels", 8),
    ]


def test_plan_survives_a_round_trip() -> None:
    plan = replace(FULL, kept=FULL.kept | {"layers.0.channels": (1, 5), "layers.1.kv_groups": ()})
    assert decode(Plan, encode(plan), source="plan.json") == plan


def test_precisions_of_a_plan_are_those_of_blocks_head_and_embedding() -> None:
    named = {"layers.1.ffn": "f16", "head": "q8_0", "embedding": "q8_0"}
    plan = replace(FULL, precisions=named)
    assert decode(Plan, encode(plan), source="plan.json") == plan
    assert plan.digest != FULL.digest
    with pytest.raises(ValueError, match=r"a precision to layers\.9\.ffn, which its architecture does not have"):
        replace(FULL, precisions={"layers.9.ffn": "f16"})


def test_precisions_of_a_pruned_model_are_renumbered_past_deleted_layers() -> None:
    dense = architecture((4, 2, 96), (4, 2, 96), (4, 2, 96), (4, 2, 96))
    plan = full_plan(dense, base="base")
    removed = ("layers.1.kv_groups", "layers.1.channels", "layers.2.channels")
    given = {f"layers.{index}.{kind}": f"{kind}{index}" for index in range(4) for kind in ("attention", "ffn")}
    plan = replace(plan, kept=plan.kept | dict.fromkeys(removed, ()), precisions=given | {"head": "h"})
    assert plan.pruned_precisions() == {
        "layers.0.attention": "attention0",
        "layers.0.ffn": "ffn0",
        "layers.1.attention": "attention2",  # its feed-forward network is removed
        "layers.2.attention": "attention3",
        "layers.2.ffn": "ffn3",
        "head": "h",
    }


def test_a_kind_of_sublayer_stands_for_those_of_all_layers() -> None:
    found = for_every_layer({"ffn": "q8_0", "layers.0.ffn": "f16", "head": "q4_0"}, DENSE)
    every = {block.name for block in DENSE.blocks if block.kind == "ffn"}
    assert found == dict.fromkeys(every, "q8_0") | {"layers.0.ffn": "f16", "head": "q4_0"}


@pytest.mark.parametrize("qk_norm", [False, True, "joint"])
def test_the_kind_of_query_norm_survives_a_round_trip(qk_norm: Literal[False, True, "joint"]) -> None:
    shape = replace(DENSE, qk_norm=qk_norm)
    document = json.loads(json.dumps(encode(shape)))
    assert decode(Architecture, document, source="x") == shape
    with pytest.raises(InvalidInput, match="'both' is none of False, True, 'joint'"):
        decode(Architecture, document | {"qk_norm": "both"}, source="x")


def test_digest_changes_with_the_kept_units() -> None:
    assert FULL.digest == full_plan(DENSE, base="base").digest
    assert FULL.digest != replace(FULL, kept=FULL.kept | {"layers.0.channels": (1, 5)}).digest


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ({"layers.0.channels": (5, 1)}, "ascending"),
        ({"layers.0.channels": (1, 1)}, "ascending"),
        ({"layers.0.channels": (96,)}, "below 96"),
        ({"layers.0.channels": (-1, 3)}, "below 96"),
        ({"layers.0.query_slots": ()}, "through its kv_groups"),
        ({"layers.7.channels": (0,)}, r"group layers\.7\.channels"),
        ({"layers.0.kv_groups": (), "layers.1.kv_groups": ()}, "no layer keeps attention"),
    ],
)
def test_impossible_plan_is_refused(kept: Kept, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(FULL, kept=FULL.kept | kept)


def test_plan_must_name_every_group() -> None:
    kept = {name: units for name, units in FULL.kept.items() if name != "layers.1.channels"}
    with pytest.raises(ValueError, match=r"layers\.1\.channels"):
        replace(FULL, kept=kept)


def test_widths_follow_from_the_kept_units() -> None:
    kept = {
        "layers.0.kv_groups": (1,),
        "layers.0.query_slots": (0,),
        "layers.0.channels": (3, 4),
        "layers.1.channels": (),
    }
    first, second = replace(FULL, kept=FULL.kept | kept).all_widths()
    assert first == LayerWidths(num_heads=1, num_kv_heads=1, num_channels=2)
    assert second == LayerWidths(num_heads=4, num_kv_heads=2, num_channels=0)


def test_layer_that_keeps_nothing_is_deleted() -> None:
    plan = replace(FULL, kept=FULL.kept | {"layers.0.kv_groups": (), "layers.0.channels": ()})
    assert plan.pruned_architecture().layers == DENSE.layers[1:]


def count(model: PreTrainedModel) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


WIDE = {"qwen3": {"head_dim": 24}}  # heads * head_dim need not be the hidden size


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_closed_form_counts_the_parameters(family: str, tied: bool) -> None:
    changes: dict[str, Any] = {"tie_word_embeddings": tied} | WIDE.get(family, {})
    model = tiny_model(family, **changes)
    assert architecture_of(model).num_parameters == count(model)


MIXED = {
    "layers.0.kv_groups": (1,),
    "layers.0.channels": tuple(range(33)),
    "layers.1.kv_groups": (),
    "layers.2.query_slots": (1,),
    "layers.2.channels": (),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_closed_form_counts_the_parameters_of_a_pruned_model(family: str) -> None:
    model = tiny_model(family)
    kept = {name: units for name, units in MIXED.items() if family != "opt" or "query_slots" not in name}
    plan = plan_for(model, kept)
    assert plan.pruned_architecture().num_parameters == count(shrink_(model, plan))


def norm_weights(found: Architecture) -> int:
    return 2 * found.hidden_size * len(found.layers)


@torch.no_grad()
def test_decode_flops_are_those_torch_counts() -> None:
    model, context = tiny_model("llama", attn_implementation="eager"), 24
    cache = model(input_ids=random_tokens(1, context - 1), use_cache=True).past_key_values
    with FlopCounterMode(display=False) as counter:
        model(input_ids=random_tokens(1, 1), past_key_values=cache, use_cache=True)
    found = architecture_of(model)
    expected = found.decode_flops(context=context) - 2 * norm_weights(found)  # torch counts products of matrices only
    assert counter.get_total_flops() == pytest.approx(expected, rel=1e-3)  # rotary angles are a product too


@torch.no_grad()
def test_prefill_flops_are_those_torch_counts() -> None:
    model, prompt = tiny_model("llama", attn_implementation="eager"), 24
    with FlopCounterMode(display=False) as counter:
        model(input_ids=random_tokens(1, prompt), logits_to_keep=1)
    found = architecture_of(model)
    masked_pairs = prompt * (prompt - 1) // 2  # the eager kernel multiplies them although they are masked
    heads = sum(layer.num_heads for layer in found.layers)
    expected = found.prefill_flops(prompt_tokens=prompt) - 2 * norm_weights(found) * prompt
    expected += 4 * heads * found.head_dim * masked_pairs
    assert counter.get_total_flops() == pytest.approx(expected, rel=1e-3)


def test_quantile_interpolates_between_order_statistics() -> None:
    assert quantile([4, 1, 3, 2], 0.5) == 2.5
    assert quantile([10, 20], 0.9) == pytest.approx(19)
    assert quantile([7], 0.9) == 7


def test_interval_encloses_the_median() -> None:
    found = median_interval([float(value) for value in range(100, 0, -1)])
    assert (found.value, found.low, found.high) == (50.5, 40.0, 61.0)
    assert found.half_width == pytest.approx(10.5 / 50.5)


def test_interval_of_few_samples_is_their_range() -> None:
    found = median_interval([3.0, 1.0, 2.0])
    assert (found.low, found.value, found.high) == (1.0, 2.0, 3.0)


def fingerprint(**changes: Any) -> Fingerprint:
    fields: dict[str, Any] = dict.fromkeys(
        ["device", "machine", "processor", "power_mode", "runtime", "runtime_version", "runtime_build"], "x"
    )
    return Fingerprint(**fields | {"num_cores": 2, "memory_bytes": 1, "last_level_cache_bytes": 1} | changes)


def test_fingerprints_differ_in_hard_fields_only() -> None:
    other = fingerprint(num_cores=4, soft={"governor": "performance"})
    assert fingerprint().differences(other) == ["num_cores: 2 / 4"]


def measurement(samples: tuple[int, ...], rounds: tuple[int, ...]) -> Measurement:
    return Measurement(
        artifact_sha256="0",
        workload=Workload(),
        fingerprint=fingerprint(),
        samples_ns=samples,
        rounds=rounds,
        peak_memory_bytes=1,
        load_seconds=0.1,
        started="2026-01-01T00:00:00Z",
        status="ok",
    )


def test_statistics_are_derived_from_the_samples() -> None:
    found = measurement((1_000_000, 3_000_000, 2_000_000), (0, 0, 1))
    assert found.seconds("p50") == pytest.approx(2e-3)
    assert found.seconds("p90") == pytest.approx(2.8e-3)


@pytest.mark.parametrize(("samples", "rounds"), [((), ()), ((0,), (0,)), ((1, 2), (0,))])
def test_measurement_without_proper_samples_is_refused(samples: tuple[int, ...], rounds: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="sample"):
        measurement(samples, rounds)


@pytest.mark.parametrize("changes", [{"phase": "train"}, {"context": 0}, {"threads": 0}])
def test_impossible_workload_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"phase|at least 1"):
        Workload(**changes)


def test_workload_describes_its_configuration_in_words() -> None:
    workload = Workload(threads=2, switches={"kv_cache": "q8_0", "flash_attention": "off"})
    assert workload.describe() == "decode at context 256, f16, 2 threads, flash attention off, kv cache q8_0"


def test_a_forward_describes_its_batch_and_counts_images_a_second() -> None:
    workload = Workload(phase="forward", batch=8, precision="int8")
    assert workload.describe() == "forward of batch 8, int8, 1 thread"
    assert workload.per_second(0.02) == pytest.approx(400)


@pytest.mark.parametrize(("phase", "rate"), [("decode", 50), ("prefill", 50 * 128)])
def test_decoders_count_tokens_a_second(phase: Literal["decode", "prefill"], rate: float) -> None:
    assert Workload(phase=phase).per_second(0.02) == pytest.approx(rate)

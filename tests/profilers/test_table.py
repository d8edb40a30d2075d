"""Latency tables and the costs derived from them, with fabricated seconds."""

import json
import random
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from standins.fabricated import FINGERPRINT, tiny_llama

from dilap.core.errors import InvalidInput, Mismatch, Unsupported
from dilap.core.rules import Capabilities, spread
from dilap.core.shape import Experts, LayerWidths
from dilap.core.workload import Workload
from dilap.profilers.protocol import TABLE
from dilap.profilers.tables.entries import Probe, Role, TableEntry, runs_of
from dilap.profilers.tables.model import attention_work
from dilap.profilers.tables.probes import default_levels, list_probes, probe_architecture
from dilap.profilers.tables.table import LatencyTable, TableHeader

DENSE = LayerWidths(num_heads=6, num_kv_heads=3, num_channels=768)
ARCHITECTURE = replace(tiny_llama(*[DENSE] * 8), hidden_size=256, head_dim=32, vocab_size=1000)
WORKLOAD = Workload(threads=2)
HEADER = TableHeader(
    fingerprint=FINGERPRINT,
    workload=WORKLOAD,
    architecture=ARCHITECTURE,
    backend="llamacpp",
    protocol=TABLE,
    created="2026-01-01T00:00:00+00:00",
)
ATTENTION_LEVELS, FFN_LEVELS = default_levels(ARCHITECTURE, Capabilities(ffn_multiple=32))
FIXED = 5e-3


def attention_cost(layer: LayerWidths) -> float:
    return 1e-4 * (layer.num_heads > 0) + 5e-5 * layer.num_heads + 6e-5 * layer.num_kv_heads


def ffn_cost(layer: LayerWidths) -> float:
    return 2e-5 + 1e-6 * layer.num_channels


def true_seconds(widths: Sequence[LayerWidths]) -> float:
    return FIXED + sum(attention_cost(one) + ffn_cost(one) for one in widths if not one.is_empty)


def entry(role: Role, widths: Sequence[LayerWidths], *, drift: float = 1.0, noise: float = 0.0) -> TableEntry:
    draw = random.Random(str((role, runs_of(widths))))
    center = true_seconds(widths) * drift * (1 + noise * draw.uniform(-1, 1))
    return TableEntry(
        role=role,
        runs=runs_of(widths),
        samples_ns=tuple(round(center * 1e9 * (1 + 0.001 * (step - 7))) for step in range(15)),
        sentinel_ns=(round(true_seconds(ARCHITECTURE.layers) * drift * 1e9),) * 15,
        status="ok",
    )


def measured_table(*, noise: float = 0.0, drifting: bool = False, num_measured: int = 6) -> LatencyTable:
    probes = list_probes(
        ARCHITECTURE,
        measured=(spread(ATTENTION_LEVELS, num_measured), spread(FFN_LEVELS, num_measured)),
        levels=(ATTENTION_LEVELS, FFN_LEVELS),
        uniform=False,
        num_random=8,
        num_holdout=6,
        seed=0,
    )
    return LatencyTable(HEADER).with_entries(
        entry(probe.role, probe.widths, noise=noise, drift=1 + 0.1 * (index // 4) * drifting)
        for index, probe in enumerate(probes)
    )


STOCK = Capabilities(ffn_multiple=32, per_layer_widths=False, attention_removal=False, ffn_removal=False)


@pytest.mark.parametrize("capabilities", [Capabilities(ffn_multiple=32), STOCK], ids=["sublayers go", "equal widths"])
def test_heads_that_stay_or_go_together_cost_what_they_cost(capabilities: Capabilities) -> None:
    architecture = replace(ARCHITECTURE, family="olmo2", qk_norm="joint")
    levels = default_levels(architecture, capabilities)
    assert levels[0] == [(0, 0)] * capabilities.attention_removal + [(6, 3)]
    probes = list_probes(
        architecture,
        measured=levels,
        levels=levels,
        uniform=not capabilities.per_layer_widths,
        num_random=8,
        num_holdout=6,
        seed=0,
    )
    table = LatencyTable(replace(HEADER, architecture=architecture))
    model = table.with_entries(entry(probe.role, probe.widths) for probe in probes).model()
    for probe in probes:
        assert model.predict(probe.widths) == pytest.approx(true_seconds(probe.widths), rel=0.01)


def test_experts_are_probed_whole_and_survive_a_round_trip(tmp_path: Path) -> None:
    architecture = replace(ARCHITECTURE, experts=Experts(num_channels=96, num_active=2, normed=True))
    _, ffn = default_levels(architecture, STOCK)
    assert ffn == [2 * 96, 3 * 96, 4 * 96, 5 * 96, 6 * 96, 7 * 96, 8 * 96]
    table = LatencyTable(replace(HEADER, architecture=architecture))
    table.write(tmp_path / "t.jsonl")
    assert LatencyTable.read(tmp_path / "t.jsonl").header.architecture == architecture


def test_a_probe_outgrows_the_cache_with_the_experts_of_one_token() -> None:
    """The same token is timed again and again, and the others are never read."""
    dense = replace(ARCHITECTURE, layers=ARCHITECTURE.layers[:1] * 64)
    few = replace(dense, experts=Experts(num_channels=96, num_active=2, normed=True))
    found = [len(probe_architecture(one, WORKLOAD, cache_bytes=1 << 20).layers) for one in (dense, few)]
    assert found[0] < found[1] < 64


def test_a_table_survives_a_round_trip(tmp_path: Path) -> None:
    table = measured_table()
    table.write(tmp_path / "t.jsonl")
    assert LatencyTable.read(tmp_path / "t.jsonl") == table


def test_the_header_line_says_what_the_file_is(tmp_path: Path) -> None:
    LatencyTable(HEADER).write(tmp_path / "t.jsonl")
    assert (tmp_path / "t.jsonl").read_text().startswith('{"type": "LatencyTable", "version": 2')


def test_equal_layers_in_a_row_are_stored_as_one_run() -> None:
    assert runs_of([DENSE, DENSE, replace(DENSE, num_channels=0)]) == ((2, 6, 3, 768), (1, 6, 3, 0))


def test_widths_come_back_from_their_runs() -> None:
    widths = (DENSE, DENSE, replace(DENSE, num_channels=0), DENSE)
    assert entry("random", widths).widths == widths


def test_a_table_knows_which_probes_it_has() -> None:
    table = LatencyTable(HEADER).with_entries([entry("dense", ARCHITECTURE.layers)])
    assert Probe(role="dense", widths=ARCHITECTURE.layers) in table
    assert Probe(role="holdout", widths=ARCHITECTURE.layers) not in table


def test_a_cut_off_line_is_refused_by_its_number(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    measured_table().write(path)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:3]) + lines[3][:40])
    with pytest.raises(InvalidInput, match=r"t\.jsonl: line 4"):
        LatencyTable.read(path)


def test_a_damaged_line_is_refused_by_its_number(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    measured_table().write(path)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(lines[0] + lines[1].replace("samples_ns", "sample_ns") + "".join(lines[2:]))
    with pytest.raises(InvalidInput, match=r"t\.jsonl: line 2"):
        LatencyTable.read(path)


BAD_ENTRIES: dict[str, tuple[dict[str, object], str]] = {
    "estimated": ({"status": "estimated"}, "it is estimated"),
    "negative": ({"samples_ns": [-5] * 15}, "a sample takes between 1"),
    "zero": ({"sentinel_ns": [0] * 15}, "a sample takes between 1"),
    "endless": ({"samples_ns": [10**17] * 15}, "a sample takes between 1"),
    "not a number": ({"samples_ns": [float("nan")] * 15}, "NaN is not finite"),
    "infinite": ({"samples_ns": [float("inf")] * 15}, "Infinity is not finite"),
    "a billion layers": ({"runs": [[1_000_000_000, 6, 3, 768]]}, "it has 1000000000 layers, and the model 8"),
    "negative layers": ({"runs": [[-1, 6, 3, 768]]}, "at least one layer"),
    "no layers": ({"runs": []}, "at least one layer"),
    "more heads": ({"runs": [[8, 12, 3, 768]]}, "is not cut from"),
    "more KV heads": ({"runs": [[8, 6, 6, 768]]}, "is not cut from"),
    "more channels": ({"runs": [[8, 6, 3, 769]]}, "is not cut from"),
    "heads without KV heads": ({"runs": [[8, 6, 0, 768]]}, "heads without KV heads"),
    "another depth": ({"runs": [[7, 2, 1, 768]]}, "has 7 layers, and the dense one 8"),
    "a dense level": ({"runs": [[8, 6, 3, 768]]}, "has the model's own layers"),
    "a second dense probe": ({"role": "dense", "runs": [[7, 6, 3, 768]]}, "second dense probe"),
    "a deep shallow probe": ({"role": "depth", "runs": [[8, 6, 3, 768]]}, "shallow probe has 8 layers"),
}


@pytest.mark.parametrize("what", BAD_ENTRIES)
def test_an_entry_that_no_measurement_gives_is_refused_by_its_line(what: str, tmp_path: Path) -> None:
    changes, said = BAD_ENTRIES[what]
    path = tmp_path / "t.jsonl"
    measured_table().write(path)
    lines = path.read_text().splitlines()
    assert json.loads(lines[3])["role"] == "attention"
    lines[3] = json.dumps(json.loads(lines[3]) | changes)
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(InvalidInput, match=rf"t\.jsonl: line 4.*{re.escape(said)}"):
        LatencyTable.read(path)


def test_a_probe_that_is_there_twice_is_refused_by_its_line(tmp_path: Path) -> None:
    table = measured_table()
    replace(table, entries=(*table.entries, table.entries[5])).write(tmp_path / "t.jsonl")
    with pytest.raises(InvalidInput, match=f"line {len(table.entries) + 2}: its probe of role attention is .* twice"):
        LatencyTable.read(tmp_path / "t.jsonl")


@pytest.mark.parametrize(
    ("name", "value"), [("layers", []), ("layers", [{"num_heads": 0, "num_kv_heads": 0, "num_channels": 8}] * 2)]
)
def test_a_header_of_no_dense_model_is_refused(name: str, value: object, tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    measured_table().write(path)
    first, *others = path.read_text().splitlines(keepends=True)
    header = json.loads(first)
    header["architecture"][name] = value
    path.write_text(json.dumps(header) + "\n" + "".join(others))
    with pytest.raises(InvalidInput, match=r"line 1: .*a dense model"):
        LatencyTable.read(path)


def test_a_partner_of_another_model_is_refused(tmp_path: Path) -> None:
    measured_table().write(tmp_path / "t.jsonl")
    other = replace(HEADER, architecture=replace(ARCHITECTURE, hidden_size=128))
    LatencyTable(other).write(tmp_path / "t.2.jsonl")
    with pytest.raises(InvalidInput, match=r"t\.2\.jsonl: line 1 is of another model"):
        LatencyTable.read(tmp_path / "t.jsonl")


def slowed(one: TableEntry, **changes: Any) -> TableEntry:
    """Three times slower, as beside other load."""
    return replace(one, samples_ns=tuple(3 * sample for sample in one.samples_ns), **changes)


def test_what_was_measured_beside_other_load_is_left_out_and_said() -> None:
    table = measured_table()
    bad = table.entries[4]
    disturbed = table.with_entries([slowed(bad, status="contended")])
    without = replace(table, entries=tuple(one for one in table.entries if one.key != bad.key))
    assert len(disturbed.entries) == len(table.entries)
    assert disturbed.model().ffn == without.model().ffn
    assert disturbed.model().attention == without.model().attention
    assert disturbed.model().caveats == (
        f"1 of the latency table's {len(table.entries)} probes are left out, because other processes used the cores",
    )


def test_what_was_forced_is_used_and_said() -> None:
    table = measured_table()
    busy = replace(table.entries[-1], status="contended", forced=("it runs on battery",))
    model = table.with_entries([busy]).model()
    assert replace(model, caveats=()) == table.model()
    (said,) = model.caveats
    assert said.endswith("probes were measured in an unfit state (--force): it runs on battery")


def test_a_noisy_probe_is_used_and_said() -> None:
    table = measured_table()
    noisy = replace(table.entries[4], status="noisy", note="8% of the samples are outliers")
    (said,) = table.with_entries([noisy]).model().caveats
    assert "1 of" in said
    assert "are noisy (8% of the samples are outliers)" in said


def test_a_table_whose_dense_probe_is_disturbed_is_measured_on() -> None:
    table = measured_table()
    busy = table.with_entries([replace(table.entries[0], status="contended")])
    assert Probe(role="dense", widths=ARCHITECTURE.layers) not in busy
    with pytest.raises(InvalidInput, match="without other load on the cores"):
        busy.model()


def test_few_different_plans_leave_some_for_the_hold_out() -> None:
    few = replace(ARCHITECTURE, layers=(DENSE,) * 2)
    probes = list_probes(
        few,
        measured=([(6, 3)], [768]),
        levels=([(6, 3)], [384, 768]),
        uniform=True,
        num_random=8,
        num_holdout=6,
        seed=0,
    )
    assert [probe.role for probe in probes] == ["dense", "depth", "random", "holdout", "holdout"]


@pytest.mark.parametrize("content", ["", "[]\n", '{"type": "Plan"}\n', "\x00\n"])
def test_a_file_that_is_no_table_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "t.jsonl").write_text(content)
    with pytest.raises(InvalidInput, match="line 1"):
        LatencyTable.read(tmp_path / "t.jsonl")


def test_an_absent_table_names_the_command_that_makes_one(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="dilap-profile"):
        LatencyTable.read(tmp_path / "absent.jsonl")


def test_a_table_is_usable_where_it_was_measured() -> None:
    soft = replace(FINGERPRINT, soft={"kernel": "another"})
    LatencyTable(HEADER).require_usable(
        fingerprint=soft, workload=WORKLOAD, architecture=ARCHITECTURE, backend="llamacpp"
    )


def test_a_decode_table_does_not_care_about_the_prompt() -> None:
    LatencyTable(HEADER).require_usable(
        fingerprint=FINGERPRINT,
        workload=replace(WORKLOAD, prompt_tokens=7),
        architecture=ARCHITECTURE,
        backend="llamacpp",
    )


def test_a_table_for_something_else_names_every_field_that_differs() -> None:
    with pytest.raises(Mismatch) as caught:
        LatencyTable(HEADER).require_usable(
            fingerprint=replace(FINGERPRINT, runtime_version="2", processor="Other"),
            workload=replace(WORKLOAD, threads=1, context=512),
            architecture=replace(ARCHITECTURE, hidden_size=512, layers=(DENSE,)),
            backend="onnxruntime",
        )
    for words in (
        "runtime_version: 1 / 2",
        "processor: Test / Other",
        "workload threads: 2 / 1",
        "workload context: 256 / 512",
        "model hidden_size: 256 / 512",
        "model layers differ",
        "backend: llamacpp / onnxruntime",
    ):
        assert words in str(caught.value)


def test_the_fit_predicts_plans_it_has_not_seen() -> None:
    assert max(measured_table().model().holdout_errors()) < 0.01


def test_the_fit_finds_the_fixed_part() -> None:
    assert measured_table().model().fixed_seconds == pytest.approx(FIXED, rel=0.02)


def test_the_fit_finds_each_widths_cost() -> None:
    model = measured_table().model()
    assert model.ffn_seconds(768) == pytest.approx(7.88e-4, rel=0.03)
    assert model.ffn_seconds(384) == pytest.approx(4.04e-4, rel=0.03)
    assert model.attention_seconds(6, 3) == pytest.approx(5.8e-4, rel=0.03)


def test_drift_between_blocks_is_divided_out() -> None:
    assert max(measured_table(drifting=True).model().holdout_errors()) < 0.01


def test_a_slow_spell_that_outlasts_a_round_is_divided_out() -> None:
    table = measured_table()
    slow = [1 + index % 3 for index in range(len(table.entries))]  # most of every third block is three times slower
    spells = tuple(
        replace(
            one,
            samples_ns=tuple(sample * (factor if step < 10 else 1) for step, sample in enumerate(one.samples_ns)),
            sentinel_ns=tuple(sample * (factor if step < 10 else 1) for step, sample in enumerate(one.sentinel_ns)),
        )
        for one, factor in zip(table.entries, slow, strict=True)
    )
    quiet, model = table.model(), replace(table, entries=spells).model()
    ratio = model.predict(ARCHITECTURE.layers[:3]) / model.predict(ARCHITECTURE.layers)
    assert ratio == pytest.approx(quiet.predict(ARCHITECTURE.layers[:3]) / quiet.predict(ARCHITECTURE.layers), rel=0.01)


def test_noise_of_one_percent_leaves_the_prediction_within_two() -> None:
    assert max(measured_table(noise=0.01).model().holdout_errors()) < 0.02


def test_costs_never_fall_with_width_however_noisy_the_probes() -> None:
    model = measured_table(noise=0.2).model()
    costs = [model.ffn_seconds(width) for width in range(0, 1000, 16)]
    assert costs == sorted(costs)
    assert min(costs) >= 0


def test_the_fit_says_which_method_had_the_lower_cross_validated_error() -> None:
    model = measured_table(noise=0.02).model()
    assert model.method == min(model.cross_validation, key=lambda name: model.cross_validation[name])
    assert set(model.cross_validation) == {"slopes", "least squares"}


def test_holdout_plans_take_no_part_in_the_fit() -> None:
    table = measured_table(noise=0.02)
    kept = tuple(one for one in table.entries if one.role != "holdout")
    assert replace(table, entries=kept).model().attention == table.model().attention


def test_a_prediction_is_the_sum_of_its_parts() -> None:
    model = measured_table().model()
    expected = model.fixed_seconds + 2 * (model.attention_seconds(6, 3) + model.ffn_seconds(100))
    assert model.predict([replace(DENSE, num_channels=100)] * 2) == pytest.approx(expected)


def test_a_deleted_layer_costs_nothing() -> None:
    model = measured_table().model()
    empty = LayerWidths(num_heads=0, num_kv_heads=0, num_channels=0)
    assert model.predict([DENSE, empty]) == model.predict([DENSE])


def test_an_attention_level_below_the_narrowest_measured_is_rounded_up() -> None:
    model = measured_table(num_measured=2).model()  # none and dense
    assert model.attention_seconds(1, 1) == model.attention_seconds(6, 3)


def test_p90_is_never_faster_than_p50() -> None:
    table = measured_table()
    assert table.model("p90").predict(ARCHITECTURE.layers) >= table.model("p50").predict(ARCHITECTURE.layers)


def test_a_table_without_its_dense_probe_cannot_be_used_yet() -> None:
    with pytest.raises(InvalidInput, match="resume"):
        LatencyTable(HEADER).model()


def test_widths_that_are_not_measurably_faster_are_dropped() -> None:
    model = measured_table().model()
    _, ffn = ARCHITECTURE.blocks[:2]
    offered = [((channels,), "") for channels in (768, 767, 384, 383, 0)]
    assert [channels for (channels,), _ in model.cheaper(ffn, offered)] == [768, 384, 0]


def test_attention_levels_are_offered_from_the_slowest_down() -> None:
    attention = ARCHITECTURE.blocks[0]
    levels = measured_table().model().cheaper(attention, [(one, "") for one in Capabilities().levels(attention)])
    assert (levels[0], levels[-1]) == (((3, 2), ""), ((0, 0), ""))


def test_default_levels_combine_kv_groups_and_query_slots() -> None:
    assert ATTENTION_LEVELS == [(0, 0), (1, 1), (2, 1), (2, 2), (3, 3), (4, 2), (6, 3)]


def test_default_ffn_levels_are_twelfths_in_the_backends_multiple() -> None:
    assert list(range(0, 769, 64)) == FFN_LEVELS


def test_many_attention_levels_are_thinned_to_a_dozen_with_the_extremes_kept() -> None:
    wide = LayerWidths(num_heads=64, num_kv_heads=8, num_channels=768)
    levels, _ = default_levels(replace(ARCHITECTURE, layers=(wide,) * 8), Capabilities())
    assert len(levels) <= 13
    assert {(0, 0), (1, 1), (64, 8)} <= set(levels)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "groups", "slots"),
    [
        (32, 32, [1, 4, 7, 9, 12, 15, 18, 21, 24, 26, 29, 32], [1]),
        (32, 8, [1, 3, 6, 8], [1, 3, 4]),
        (64, 8, [1, 3, 6, 8], [1, 5, 8]),
        (16, 8, [1, 2, 4, 5, 7, 8], [1, 2]),
        (14, 2, [1, 2], [1, 2, 3, 5, 6, 7]),
        (9, 3, [1, 2, 3], [1, 2, 3]),
    ],
)
def test_levels_are_an_even_spread_of_each_axis(heads: int, kv_heads: int, groups: list[int], slots: list[int]) -> None:
    wide = LayerWidths(num_heads=heads, num_kv_heads=kv_heads, num_channels=768)
    levels, _ = default_levels(replace(ARCHITECTURE, layers=(wide,) * 8), Capabilities(attention_removal=False))
    assert set(levels) == {(group * slot, group) for group in groups for slot in slots}


def test_a_runtime_without_removal_is_offered_none() -> None:
    attention, ffn = default_levels(ARCHITECTURE, Capabilities(attention_removal=False, ffn_removal=False))
    assert ((0, 0) in attention, 0 in ffn) == (False, False)


def test_uniform_plans_lose_whole_layers_only() -> None:
    probes = list_probes(
        ARCHITECTURE,
        measured=([(6, 3)], [768]),
        levels=(ATTENTION_LEVELS, FFN_LEVELS),
        uniform=True,
        num_random=5,
        num_holdout=2,
        seed=0,
    )
    assert all(len(set(probe.widths)) == 1 and not probe.widths[0].is_empty for probe in probes)


def test_every_probe_keeps_attention_somewhere() -> None:
    assert all(any(layer.num_heads for layer in one.widths) for one in measured_table().entries)


def test_no_holdout_plan_is_used_for_the_fit() -> None:
    entries = measured_table().entries
    held_out = {one.runs for one in entries if one.role == "holdout"}
    assert held_out.isdisjoint(one.runs for one in entries if one.role != "holdout")


def test_a_probe_has_just_enough_layers_to_leave_the_cache() -> None:
    deep = replace(ARCHITECTURE, layers=(DENSE,) * 100)  # 1.5 MB a layer in f16
    assert 5 <= len(probe_architecture(deep, WORKLOAD, cache_bytes=1 << 20).layers) <= 7


def test_a_small_model_is_probed_with_all_its_layers() -> None:
    assert probe_architecture(ARCHITECTURE, WORKLOAD, cache_bytes=32 << 20) == ARCHITECTURE


def test_a_model_of_unequal_layers_cannot_have_a_table() -> None:
    uneven = replace(ARCHITECTURE, layers=(DENSE, replace(DENSE, num_channels=64)))
    with pytest.raises(Unsupported, match="equal widths"):
        default_levels(uneven, Capabilities())


@pytest.mark.parametrize(
    ("backend", "switches", "bits"),
    [
        ("llamacpp", {}, 16.0),
        ("llamacpp", {"kv_cache": "q8_0"}, 8.5),
        ("onnxruntime", {}, 32.0),
        ("executorch", {}, 32.0),
    ],
)
def test_costs_count_the_kv_cache_as_the_runtime_keeps_it(backend: str, switches: dict[str, str], bits: float) -> None:
    table = measured_table()
    header = replace(table.header, backend=backend, workload=replace(WORKLOAD, switches=switches))
    assert replace(table, header=header).model().cache_bits == bits


def test_a_wider_cache_weighs_kv_heads_more() -> None:
    one_kv_head, two = (LayerWidths(num_heads=4, num_kv_heads=count, num_channels=0) for count in (1, 2))
    cached = []
    for bits in (16.0, 32.0):
        work = attention_work(ARCHITECTURE, WORKLOAD, cache_bits=bits)
        cached.append(work(two) - work(one_kv_head))
    assert cached[1] - cached[0] == 2 * ARCHITECTURE.head_dim * 2 * WORKLOAD.context  # keys and values, 2 bytes more

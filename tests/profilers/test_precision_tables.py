"""Latency tables of several precisions and the spaces built from them, with fabricated seconds."""

import json
import random
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from standins.fabricated import FINGERPRINT, tiny_llama

from dilap.cli.costs import document, text
from dilap.core.costs import MixedCosts
from dilap.core.errors import InvalidInput, Mismatch
from dilap.core.groups import HEAD, Kept
from dilap.core.rules import Capabilities, spread
from dilap.core.shape import PRECISION_BITS, UNMIXED, LayerWidths, by_quality
from dilap.core.space import Space, plan_of
from dilap.core.workload import Workload
from dilap.job.bench import describe_table
from dilap.profilers.devices import device as devices
from dilap.profilers.protocol import TABLE
from dilap.profilers.tables.entries import Probe, TableEntry, run_precisions, runs_of
from dilap.profilers.tables.model import LatencyModel
from dilap.profilers.tables.probes import default_levels, list_probes, probe_architecture
from dilap.profilers.tables.roofline import roofline
from dilap.profilers.tables.table import LatencyTable, TableHeader
from dilap.search.layouts import Layout, build_space

DENSE = LayerWidths(num_heads=6, num_kv_heads=3, num_channels=768)
ARCHITECTURE = replace(tiny_llama(*[DENSE] * 16), hidden_size=256, head_dim=32, vocab_size=8000)
WORKLOAD = Workload(threads=2, precision="q8_0")
OTHERS = ("f16", "q5_0", "iq4_nl", "q4_0")
HEADER = TableHeader(
    fingerprint=FINGERPRINT,
    workload=WORKLOAD,
    architecture=ARCHITECTURE,
    backend="llamacpp",
    protocol=TABLE,
    created="2026-01-01T00:00:00+00:00",
    precisions=("q8_0", *OTHERS),
)
CAPABILITIES = Capabilities(ffn_multiple=32)
LEVELS = default_levels(ARCHITECTURE, CAPABILITIES)
SPEED = {"f16": 1.5, "": 1.0, "q5_0": 1.1, "iq4_nl": 0.75, "q4_0": 0.65}  # a device on which 5 bits are slower than 8
HEADS = {**SPEED, "q8_0": 0.9}  # a head of which nothing is said is in more bits than one in the workload's precision
ONE_PRECISION = Path(__file__).with_name("table-of-one-precision.jsonl")


def attention_cost(layer: LayerWidths, precision: str) -> float:
    cache_cost = 2e-5 * layer.num_kv_heads
    return cache_cost + SPEED[precision] * (3e-5 + 5e-5 * layer.num_heads) if layer.num_heads else 0.0


def ffn_cost(layer: LayerWidths, precision: str) -> float:
    return 2e-5 + SPEED[precision] * 1e-6 * layer.num_channels


def head_cost(precision: str) -> float:
    return 3e-3 * HEADS[precision]


def true_seconds(widths: Sequence[LayerWidths], precisions: Mapping[str, str] = UNMIXED) -> float:
    return (
        2e-3
        + head_cost(precisions.get("head", ""))
        + sum(
            attention_cost(layer, precisions.get(f"layers.{index}.attention", ""))
            + ffn_cost(layer, precisions.get(f"layers.{index}.ffn", ""))
            for index, layer in enumerate(widths)
            if not layer.is_empty
        )
    )


def entry(probe: Probe, *, noise: float = 0.0, seed: int = 0) -> TableEntry:
    draw = random.Random(f"{seed} {probe.key}")
    center = 1e9 * true_seconds(probe.widths, probe.precisions) * (1 + draw.gauss(0, noise))
    return TableEntry(
        role=probe.role,
        runs=runs_of(probe.widths, probe.precisions),
        precisions=run_precisions(probe.widths, probe.precisions),
        head=probe.precisions.get("head", ""),
        samples_ns=tuple(round(center * (1 + 0.001 * step)) for step in range(-7, 8)),
        sentinel_ns=(round(1e9 * true_seconds(ARCHITECTURE.layers)),) * 15,
        status="ok",
    )


def probes(*, others: Sequence[str] = OTHERS, uniform: bool = False, seed: int = 0) -> list[Probe]:
    return list_probes(
        ARCHITECTURE,
        measured=(spread(LEVELS[0], 6), spread(LEVELS[1], 6)),
        levels=LEVELS,
        others=dict.fromkeys(others, LEVELS),
        heads=HEADER.offered,
        uniform=uniform,
        num_random=12,
        num_holdout=12,
        seed=seed,
    )


@cache
def measured_table(*, noise: float = 0.0, seed: int = 0) -> LatencyTable:
    return LatencyTable(HEADER).with_entries(entry(probe, noise=noise, seed=seed) for probe in probes(seed=seed))


@cache
def measured_model() -> LatencyModel:
    return measured_table().model()


def space(layout: Layout = "free", *, offered: Sequence[str] = HEADER.offered) -> Space:
    found = dict.fromkeys(offered, CAPABILITIES)
    return build_space(measured_model(), ARCHITECTURE, found, layout=layout)


def test_five_precisions_take_few_probes() -> None:
    """At 15 seconds a probe, a table takes less than 20 minutes."""
    assert len(probes()) == 12 + 4 * 6 + 5 + 24


def test_random_plans_mix_all_precisions() -> None:
    drawn = [probe for probe in probes() if probe.role in ("random", "holdout")]
    found = {precision for probe in drawn for precision in probe.precisions.values()}
    heads = {probe.precisions.get("head", "") for probe in drawn}
    assert (found, heads) == ({*HEADER.offered}, {*HEADER.offered})
    assert max(len(set(probe.precisions.values())) for probe in drawn) == len(HEADER.offered)


@pytest.mark.parametrize("uniform", [False, True])
def test_no_probe_gives_a_precision_to_what_it_lacks(uniform: bool) -> None:
    for probe in probes(uniform=uniform):
        shape = replace(ARCHITECTURE, layers=probe.widths)
        assert {*probe.precisions} <= {*shape.parts}
        assert "" not in probe.precisions.values()


def test_equal_widths_are_widths_that_every_precision_has() -> None:
    others = {"q4_0": ([(2, 1), (6, 3)], [256, 768])}
    few = list_probes(
        ARCHITECTURE,
        measured=LEVELS,
        levels=LEVELS,
        others=others,
        heads=["q8_0", "q4_0"],
        uniform=True,
        num_random=8,
        num_holdout=6,
        seed=0,
    )
    drawn = [probe.widths for probe in few if probe.role in ("random", "holdout")]
    assert {one.num_channels for widths in drawn for one in widths} <= {256, 768}
    assert all(len(set(widths)) == 1 for widths in drawn)


def test_a_probe_outgrows_the_cache_in_the_smallest_precision() -> None:
    deep = replace(ARCHITECTURE, layers=(DENSE,) * 100)
    own, smaller = (
        len(probe_architecture(deep, WORKLOAD, cache_bytes=1 << 20, precisions=names).layers) for names in ((), OTHERS)
    )
    assert smaller / own == pytest.approx(PRECISION_BITS["q8_0"] / PRECISION_BITS["q4_0"], rel=0.1)


def test_a_mixed_table_survives_a_round_trip(tmp_path: Path) -> None:
    measured_table().write(tmp_path / "t.jsonl")
    assert LatencyTable.read(tmp_path / "t.jsonl") == measured_table()


def test_the_precisions_of_a_probe_come_back_from_its_entry() -> None:
    for probe in probes():
        assert (entry(probe).widths, entry(probe).named_precisions) == (probe.widths, probe.precisions)
        assert probe in measured_table()


def test_layers_of_equal_widths_and_precisions_are_stored_as_one_run() -> None:
    precisions = {"layers.1.ffn": "q4_0", "layers.2.ffn": "q4_0", "layers.3.attention": "f16"}
    assert runs_of([DENSE] * 4, precisions) == ((1, 6, 3, 768), (2, 6, 3, 768), (1, 6, 3, 768))
    assert run_precisions([DENSE] * 4, precisions) == (("", ""), ("", "q4_0"), ("f16", ""))
    assert run_precisions([DENSE] * 4, {}) == ()


def test_a_table_that_was_measured_without_a_lead_in_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "table.jsonl"
    header, *entries = ONE_PRECISION.read_text().split("\n")
    earlier = json.loads(header)
    del earlier["protocol"]["lead_in_seconds"]
    path.write_text("\n".join([json.dumps(earlier), *entries]))
    with pytest.raises(InvalidInput, match="it was measured by an earlier DiLAP"):
        LatencyTable.read(path)


def test_a_header_whose_protocol_is_none_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "table.jsonl"
    header, *entries = ONE_PRECISION.read_text().split("\n")
    path.write_text("\n".join([json.dumps({**json.loads(header), "protocol": 5}), *entries]))
    with pytest.raises(InvalidInput, match="line 1: damaged TableHeader"):
        LatencyTable.read(path)


def test_a_table_of_one_precision_says_what_it_said() -> None:
    """The numbers are those of the DiLAP that first read such a table."""
    table = LatencyTable.read(ONE_PRECISION)
    model = table.model()
    assert table.header.offered == ("f16",)
    assert model.fixed_seconds == pytest.approx(0.005173778, rel=1e-9)
    assert model.predict(table.header.architecture.layers) == pytest.approx(0.010433962, rel=1e-9)
    assert model.attention_seconds(2, 1) == pytest.approx(0.0003400684166666667, rel=1e-9)
    assert model.ffn_seconds(384) == pytest.approx(0.00034467483333333344, rel=1e-9)
    assert model.holdout_errors() == pytest.approx([0.019303086656676793, 0.01938056288585055], rel=1e-9)


BAD_ENTRIES: dict[str, tuple[dict[str, object], str]] = {
    "unknown": ({"precisions": [["q3", ""]]}, "unknown precision 'q3'"),
    "not offered": ({"role": "random", "precisions": [["int8", ""]]}, "it has a part in int8, which is none of the"),
    "of no run": ({"precisions": [["q4_0", ""], ["q4_0", ""]]}, "has 1 runs of layers, and precisions of 2"),
    "of a dense probe": ({"role": "dense"}, "dense does not have these precisions"),
    "no head": ({"head": ""}, "head does not have these precisions"),
    "a head and blocks": ({"precisions": [["q4_0", "f16"]]}, "head does not have these precisions"),
    "none": ({"role": "precision", "head": ""}, "precision does not have these precisions"),
    "half": ({"role": "precision", "head": "", "precisions": [["q4_0", ""]]}, "precision does not have these"),
    "two": ({"role": "precision", "head": "", "precisions": [["q4_0", "f16"]]}, "precision does not have these"),
    "of the other kind": ({"role": "ffn", "head": "", "precisions": [["q4_0", ""]]}, "ffn does not have these"),
    "shallow": ({"runs": [[7, 6, 3, 768]]}, "has 7 layers, and the dense one 16"),
}


@pytest.mark.parametrize("what", BAD_ENTRIES)
def test_precisions_that_no_measurement_gives_are_refused_by_their_line(what: str, tmp_path: Path) -> None:
    changes, said = BAD_ENTRIES[what]
    measured_table().write(tmp_path / "t.jsonl")
    lines = (tmp_path / "t.jsonl").read_text().splitlines()
    index = next(index for index, line in enumerate(lines) if json.loads(line).get("head") == "q5_0")
    lines[index] = json.dumps(json.loads(lines[index]) | changes)
    (tmp_path / "t.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(InvalidInput, match=rf"t\.jsonl: line {index + 1}.*{re.escape(said)}"):
        LatencyTable.read(tmp_path / "t.jsonl")


@pytest.mark.parametrize("names", [("q4_0",), ("q8_0", "q3")])
def test_a_header_of_impossible_precisions_is_refused(names: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="precision"):
        replace(HEADER, precisions=names)


def test_a_table_is_usable_for_some_of_its_precisions_alone() -> None:
    asked = {"fingerprint": FINGERPRINT, "workload": WORKLOAD, "architecture": ARCHITECTURE, "backend": "llamacpp"}
    measured_table().require_usable(**asked, precisions=("q4_0", "f16"))  # type: ignore[arg-type]
    with pytest.raises(Mismatch, match="precisions: f16, q8_0, q5_0, iq4_nl, q4_0 / q4_0, int8"):
        measured_table().require_usable(**asked, precisions=("q4_0", "int8"))  # type: ignore[arg-type]


@pytest.mark.parametrize("role", ["precision", "head"])
def test_a_table_without_a_probe_of_a_precision_cannot_be_used_yet(role: str) -> None:
    entries = (one for one in measured_table().entries if (one.role, *one.precisions_used) != (role, "iq4_nl"))
    with pytest.raises(InvalidInput, match=f"no {role} probe in iq4_nl yet"):
        replace(measured_table(), entries=tuple(entries)).model()


@pytest.mark.parametrize("precision", SPEED)
def test_the_fit_finds_the_costs_of_every_precision(precision: str) -> None:
    model = measured_model()
    assert model.attention_seconds(6, 3, precision) == pytest.approx(attention_cost(DENSE, precision), rel=0.02)
    for channels in (768, 384, 64):
        narrow = replace(DENSE, num_channels=channels)
        assert model.ffn_seconds(channels, precision) == pytest.approx(ffn_cost(narrow, precision), rel=0.05)


@pytest.mark.parametrize("precision", HEADS)
def test_the_fit_finds_the_cost_of_every_head(precision: str) -> None:
    more = head_cost(precision) - head_cost("q4_0")
    assert measured_model().block(HEAD, (), precision) == pytest.approx(more, abs=2e-5)


def test_the_fit_predicts_mixed_plans_it_has_not_seen() -> None:
    """Between three knots, attention is not quite linear in the bytes that it reads."""
    assert statistics.median(measured_model().holdout_errors()) < 0.005
    assert max(measured_model().holdout_errors()) < 0.02


def test_noise_of_two_percent_leaves_mixed_plans_within_three() -> None:
    errors = [error for seed in range(3) for error in measured_table(noise=0.02, seed=seed).model().holdout_errors()]
    assert statistics.median(errors) < 0.03
    assert max(errors) < 0.12


def test_costs_never_fall_with_width_in_any_precision_however_noisy_the_probes() -> None:
    model = measured_table(noise=0.2).model()
    for precision in SPEED:
        costs = [model.ffn_seconds(width, precision) for width in range(32, 1000, 16)]
        assert costs == sorted(costs)
        assert min(costs) >= 0


def test_the_workloads_own_precision_may_be_named() -> None:
    model = measured_model()
    assert model.ffn_seconds(384, "q8_0") == model.ffn_seconds(384)


def test_an_unmeasured_precision_is_refused_with_the_command_that_measures_it() -> None:
    with pytest.raises(InvalidInput, match="dilap-profile --precision q8_0,int4"):
        measured_model().ffn_seconds(384, "int4")


def test_errors_are_told_by_the_precision_of_most_sublayers() -> None:
    errors = measured_model().holdout_errors_by_precision()
    assert tuple(errors) == by_quality(errors)
    assert sum(map(len, errors.values())) == 12
    assert "mostly in q4_0" in describe_table(measured_table())
    assert "mostly" not in describe_table(LatencyTable.read(ONE_PRECISION))


def test_costs_are_shown_in_every_precision() -> None:
    model, old = measured_model(), LatencyTable.read(ONE_PRECISION).model()
    assert [line.split()[0] for line in text(model).splitlines()[2:8]] == ["precision", *HEADER.offered]
    assert set(document(model)["precisions"]) == {*OTHERS}
    assert "precision" not in text(old)
    assert "precisions" not in document(old)


def test_a_table_offers_its_precisions_by_quality() -> None:
    assert HEADER.offered == ("f16", "q8_0", "q5_0", "iq4_nl", "q4_0")
    assert HEADER.others == OTHERS


def test_the_first_level_is_the_full_width_in_the_reference_precision() -> None:
    for choice in space().choices:
        full = tuple(group.num_units for group in choice.block.groups)
        assert (choice.levels[0].counts, choice.levels[0].precision) == (full, "f16")


def test_levels_are_offered_by_falling_cost() -> None:
    for choice in space().choices:
        costs = [level.cost for level in choice.levels]
        assert costs == sorted(costs, reverse=True)


def test_a_precision_that_better_ones_beat_is_not_offered() -> None:
    """Five bits take longer than eight on this device."""
    found = {level.precision for choice in space().choices[:-1] for level in choice.levels if not level.is_removed}
    assert found == {"f16", "q8_0", "iq4_nl", "q4_0"}


def test_a_precision_that_is_no_faster_than_the_reference_is_not_offered() -> None:
    choices = space(offered=("q8_0", "f16")).choices
    assert {level.precision for one in choices for level in one.levels if not level.is_removed} == {"q8_0"}


def test_a_removed_block_is_one_level_without_a_precision() -> None:
    for choice in space().choices[1:-1]:
        removed = [level for level in choice.levels if level.is_removed]
        assert [level.precision for level in removed] == [""]


def test_the_head_is_chosen_last_by_name_and_never_removed() -> None:
    """The workload's own precision is named too, because a head of which nothing is said has more bits here."""
    last = space().choices[-1]
    assert last.block == HEAD
    assert [level.precision for level in last.levels] == ["f16", "q8_0", "iq4_nl", "q4_0"]
    assert not any(level.is_removed for level in last.levels)
    assert last.levels[-1].cost == 0


def test_with_one_precision_no_head_is_chosen() -> None:
    assert [choice.name for choice in space(offered=("q8_0",)).choices] == [one.name for one in ARCHITECTURE.blocks]


@pytest.mark.parametrize("layout", ["free", "portable", "uniform"])
def test_the_cost_of_a_config_is_what_is_predicted_for_its_plan(layout: Layout) -> None:
    built, draw = space(layout), random.Random(0)
    for _ in range(8):
        config = [draw.randrange(len(choice.levels) - 1) for choice in built.choices]
        if layout == "uniform":  # layers are removed whole
            config = [*config[:2] * len(ARCHITECTURE.layers), config[-1]]
            config[2:4] = (len(choice.levels) - 1 for choice in built.choices[2:4])
        elif any(layer.is_empty for layer in built.widths(config)):
            continue  # costs the 32 channels of zeros less than its levels
        predicted = measured_model().predict(built.widths(config), built.precisions(config))
        assert predicted == pytest.approx(built.cost(config))


def test_layers_of_a_uniform_layout_are_removed_whole() -> None:
    choices = space("uniform").choices
    assert [choice.levels[-1].is_removed for choice in choices] == [False] + [True] * 31 + [False]
    assert {level.cost for choice in choices for level in choice.levels if level.is_removed} == {0.0}


def test_a_plan_has_the_precisions_of_its_config() -> None:
    built = space()
    config = [choice.levels.index(choice.levels[-1]) if choice.block == HEAD else 0 for choice in built.choices]
    config[3] = next(k for k, level in enumerate(built.choices[3].levels) if level.precision == "")
    units: list[Kept] = [
        {group.name: range(group.num_units) for group in choice.block.groups} for choice in built.choices
    ]
    plan = plan_of(built, units, base="base", precisions=built.precisions(config))
    assert plan.precisions["head"] == "q4_0"
    assert "layers.1.ffn" not in plan.precisions
    assert plan.precisions["layers.15.attention"] == "f16"


def test_a_mix_offers_what_any_part_does_in_any_precision() -> None:
    """For a prompt, computing counts and not bytes: precisions save nothing, and the mix must not cost more."""
    model = measured_model()
    slower = dict.fromkeys(model.by_precision, model.by_precision[""]) | {"q4_0": model.by_precision["f16"]}
    mixed = MixedCosts(parts=((0.9, model), (0.1, replace(model, by_precision=slower))))
    names = dict.fromkeys(("f16", "", "iq4_nl", "q4_0"), CAPABILITIES)
    built = build_space(mixed, ARCHITECTURE, names, layout="free")
    config = [min(2, len(choice.levels) - 1) for choice in built.choices]
    assert mixed.predict(built.widths(config), built.precisions(config)) == pytest.approx(built.cost(config))
    assert {level.precision for level in built.choices[1].levels} == {*names}
    assert all(choice.levels[0].precision == "f16" for choice in built.choices)


PEAK = replace(devices.get("s23"), reach=(devices.Reach(share=1.0, operator_seconds=0.0),) * 2)


def test_a_roofline_reads_as_many_bytes_as_a_precision_has() -> None:
    device = replace(PEAK, bytes_per_second=1e9, flops_per_second=1e15)
    model = roofline(ARCHITECTURE, WORKLOAD, device, cache_bits=16.0, precisions=OTHERS)
    assert model.ffn_seconds(768, "q4_0") / model.ffn_seconds(768) == pytest.approx(4.5 / 8.5)
    weights = ARCHITECTURE.vocab_size * ARCHITECTURE.hidden_size
    assert model.block(HEAD, (), "f16") == pytest.approx(weights * (16 - 4.5) / 8 / 1e9)
    assert model.constant == pytest.approx(weights * 4.5 / 8 / 1e9)
    alone = roofline(ARCHITECTURE, WORKLOAD, device, cache_bits=16.0)
    assert model.predict(ARCHITECTURE.layers) == pytest.approx(alone.predict(ARCHITECTURE.layers))


def test_a_roofline_of_a_slow_processor_offers_no_precision() -> None:
    device = replace(PEAK, bytes_per_second=1e15, flops_per_second=1e9, quantised_gain=1.0)
    model = roofline(ARCHITECTURE, WORKLOAD, device, cache_bits=16.0, precisions=OTHERS)
    built = build_space(model, ARCHITECTURE, dict.fromkeys(("f16", "", "q4_0"), CAPABILITIES), layout="free")
    found = {level.precision for choice in built.choices for level in choice.levels if not level.is_removed}
    assert found == {"f16"}

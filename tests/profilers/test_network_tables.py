"""Latency tables of networks and the costs derived from them, with fabricated seconds."""

import itertools
import json
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from standins.fabricated import FINGERPRINT
from standins.network_tables import (
    DENSE,
    HEADER,
    NETWORK,
    WORKLOAD,
    in_reach,
    measured_table,
    out_of_reach,
    probes_of,
)
from standins.networks import shape

from dilap.core.costs import Costs, MixedCosts
from dilap.core.errors import InvalidInput, Mismatch
from dilap.core.groups import Group, Member
from dilap.core.measurement import Fingerprint, Measurement
from dilap.profilers.devices import device as devices
from dilap.profilers.protocol import Protocol
from dilap.profilers.tables.networks.estimate import network_roofline
from dilap.profilers.tables.networks.model import NetworkLatency
from dilap.profilers.tables.networks.probes import build_network_table, list_network_probes, widths_of
from dilap.profilers.tables.networks.table import NetworkTable
from dilap.profilers.tables.networks.works import amount, layer_works
from dilap.profilers.tables.roofline import estimated


@pytest.fixture(scope="module")
def model() -> NetworkLatency:
    return measured_table(out_of_reach, noise=0.01).model()


def levels() -> dict[str, list[int]]:
    return {"stem": [8, 12, 24], "expand": [0, 40, 96], "side": [5, 12], "joined": [8, 64]}


def test_a_prediction_is_the_constant_and_the_terms_of_blocks_and_pairs(model: NetworkLatency) -> None:
    blocks = {block.name: block for block in NETWORK.blocks}
    for combination in itertools.product(*levels().values()):
        counts = dict(zip(levels(), combination, strict=True))
        total = model.constant + sum(model.block(block, (counts[name],)) for name, block in blocks.items())
        total += sum(cost((counts[one],), (counts[two],)) for (one, two), cost in model.pairs.items())
        assert model.predict(counts) == pytest.approx(total, rel=1e-12)


def test_groups_that_meet_in_a_layer_are_the_pairs(model: NetworkLatency) -> None:
    assert set(model.pairs) == {("stem", "expand"), ("stem", "side"), ("stem", "joined"), ("side", "joined")}


def test_expected_seconds_are_a_quadratic_form_of_the_probabilities(model: NetworkLatency) -> None:
    """p'u + p'Wp is the mean over all combinations of independent levels."""
    draw = np.random.default_rng(0)
    chances = {name: draw.dirichlet(np.ones(len(widths))) for name, widths in levels().items()}
    expected = 0.0
    for choice in itertools.product(*(range(len(widths)) for widths in levels().values())):
        share = np.prod([chances[name][index] for name, index in zip(levels(), choice, strict=True)])
        counts = {name: levels()[name][index] for name, index in zip(levels(), choice, strict=True)}
        expected += float(share) * model.predict(counts)
    form = model.constant
    for block in NETWORK.blocks:
        costs = [model.block(block, (width,)) for width in levels()[block.name]]
        form += float(chances[block.name] @ costs)
    for (one, two), cost in model.pairs.items():
        table = [[cost((width,), (other,)) for other in levels()[two]] for width in levels()[one]]
        form += float(chances[one] @ np.array(table) @ chances[two])
    assert form == pytest.approx(expected, rel=1e-12)


def test_a_layer_within_one_group_is_no_pair_and_quadratic() -> None:
    (loop,) = [one for one in layer_works(NETWORK) if one.layer == "loop"]
    assert amount(loop.works["operations"], DENSE | {"joined": 32}) == 32 * 32 * 9 * 64


@pytest.mark.parametrize("counts", [{}, {"stem": 7, "side": 3, "joined": 11, "expand": 50}])
def test_the_operations_of_layers_are_those_of_the_network(counts: dict[str, int]) -> None:
    works = layer_works(NETWORK)
    total = sum(amount(one.works["operations"], DENSE | counts) for one in works)
    assert 2 * total == NETWORK.flops(DENSE | counts)


@pytest.mark.parametrize("name", ["regnet", "efficientnet", "unet", "convnext"])
def test_layers_of_every_kind_have_their_operations(name: str) -> None:
    """Grouped convolutions, squeeze and excitation, concatenated and transposed ones, and matrices."""
    network, draw = shape(name), random.Random(0)
    counts = {one.name: draw.randint(1, one.num_units) for one in network.groups}
    total = sum(amount(one.works["operations"], counts) for one in layer_works(network))
    assert 2 * total == network.flops(counts)


def test_a_whole_branch_costs_nothing_whatever_is_in_it() -> None:
    network = shape("efficientnet")
    gone = {name: 0 for branch in network.branches for name in branch.groups}
    inside = tuple(f"{path}." for branch in network.branches for path in branch.modules)
    for one in layer_works(network):
        is_left = any(amount(work, network.widths_at(gone)) for work in one.works.values())
        assert is_left != f"{one.layer}.weight".startswith(inside)


def test_costs_of_networks_are_mixed_like_all_others(model: NetworkLatency) -> None:
    other: Costs = network_roofline(NETWORK, WORKLOAD, DEVICE)
    mixed = MixedCosts(parts=((0.25, model), (0.75, other)))
    counts = {"stem": 8, "joined": 32}
    assert mixed.predict(counts) == pytest.approx(0.25 * model.predict(counts) + 0.75 * other.predict(counts))
    assert mixed.pairs["stem", "side"]((8,), (4,)) > 0.25 * model.pairs["stem", "side"]((8,), (4,))


def test_a_removed_branch_costs_nothing(model: NetworkLatency) -> None:
    seconds = model.layer_seconds({"expand": 0})
    assert seconds["expand"] == seconds["project"] == 0
    kept = model.layer_seconds({})
    assert kept["expand"] > 0
    assert kept["project"] > 0


def test_channels_are_rounded_up_to_what_a_kernel_fills() -> None:
    (stem, *_) = layer_works(NETWORK, multiple=16)
    assert amount(stem.works["writes"], DENSE | {"stem": 9}) == amount(stem.works["writes"], DENSE | {"stem": 16})


def test_the_fit_recovers_the_speeds_of_a_device_that_it_describes() -> None:
    found = measured_table().model()
    assert found.method.startswith("multiples of 8 channels")
    assert max(found.holdout_errors()) < 0.005


@pytest.mark.parametrize(("noise", "median", "worst"), [(0.0, 0.02, 0.06), (0.01, 0.03, 0.08), (0.02, 0.04, 0.1)])
def test_a_device_that_no_model_describes_is_predicted(noise: float, median: float, worst: float) -> None:
    """The hold-out plans have the noise too."""
    errors = sorted(measured_table(out_of_reach, noise=noise).model().holdout_errors())
    assert errors[len(errors) // 2] < median
    assert errors[-1] < worst


def test_a_probe_that_is_known_badly_weighs_little() -> None:
    table = measured_table()
    bad = table.entries[6]
    wide = tuple(round(1.3 * one * (1 + 0.4 * (-1) ** index)) for index, one in enumerate(bad.samples_ns))
    assert max(table.with_entries([replace(bad, samples_ns=wide)]).model().holdout_errors()) < 0.01


def test_drift_between_blocks_is_divided_out() -> None:
    assert max(measured_table(drifting=True).model().holdout_errors()) < 0.005


def test_costs_never_fall_with_a_width_however_noisy_the_probes() -> None:
    found, draw = measured_table(out_of_reach, noise=0.2).model(), random.Random(0)
    for _ in range(50):
        counts = {one.name: draw.randint(1, one.num_units) for one in NETWORK.groups}
        name = draw.choice(list(counts))
        wider = counts | {name: draw.randint(counts[name], DENSE[name])}
        assert found.predict(wider) >= found.predict(counts) >= 0


def test_holdout_plans_take_no_part_in_the_fit() -> None:
    table = measured_table(noise=0.02)
    kept = tuple(one for one in table.entries if one.role != "holdout")
    assert replace(table, entries=kept).model().terms == table.model().terms


def test_p90_is_the_median_times_the_tail() -> None:
    table = measured_table()
    assert table.model("p90").predict({}) == pytest.approx(1.006 * table.model().predict({}), rel=0.01)


def test_only_widths_that_are_measurably_faster_are_offered(model: NetworkLatency) -> None:
    block = NETWORK.blocks[1]
    settings = [((width,), "") for width in range(97)]
    found = [counts[0] for (counts, _) in model.cheaper(block, settings)]
    assert found[0] == 96
    assert found == sorted(found, reverse=True)
    assert 1 < len(found) < 20  # the kernel fills 16


def test_another_precision_is_not_known(model: NetworkLatency) -> None:
    assert model.predict({}, {"stem": "f32"}) == model.predict({})
    with pytest.raises(InvalidInput, match="nothing is known of the latency of the network in int8"):
        model.predict({}, {"stem": "int8"})


def test_the_same_arguments_give_the_same_probes() -> None:
    assert probes_of() == probes_of()
    assert probes_of() != probes_of(seed=1)


def test_probes_have_multiples_of_channels_and_are_there_once() -> None:
    probes = probes_of()
    assert [probe.role for probe in probes[:5]] == ["dense", "even", "even", "even", "random"]
    assert len({probe.counts for probe in probes}) == len(probes) == 1 + 3 + 24 + 12
    assert {probe.counts[0] for probe in probes} == {8, 16, 24}
    assert any(probe.counts[1] == 0 for probe in probes)


def test_few_different_plans_leave_some_for_the_hold_out() -> None:
    few = replace(NETWORK, groups=NETWORK.groups[:1], branches=())
    roles = [probe.role for probe in list_network_probes(few, multiple=4, num_random=24, num_holdout=12, seed=0)]
    assert roles.count("holdout") >= 1


def test_units_of_several_channels_fill_kernels_together() -> None:
    eights = Group(name="g", num_units=6, members=(Member(tensor="t", axis=0, grid=(6, 4)),))
    assert widths_of(eights, 8) == [2, 4, 6]


def test_a_table_survives_a_round_trip(tmp_path: Path) -> None:
    table = measured_table()
    table.write(tmp_path / "t.jsonl")
    assert NetworkTable.read(tmp_path / "t.jsonl") == table


BAD_ENTRIES: dict[str, tuple[dict[str, object], str]] = {
    "negative": ({"samples_ns": [-5] * 15}, "a sample takes between 1"),
    "estimated": ({"status": "estimated"}, "it is estimated"),
    "a group less": ({"counts": [24, 96, 12]}, "it has 3 groups, and the network 4"),
    "more units": ({"counts": [24, 97, 12, 64]}, "it has 97 units of expand, and the network 96"),
    "negative units": ({"counts": [24, -1, 12, 64]}, "it has -1 units of expand"),
    "no units": ({"counts": [0, 96, 12, 64]}, "stem keeps no unit"),
    "all units": ({"counts": [24, 96, 12, 64]}, "a probe of role even has all units"),
    "another dense one": ({"role": "dense"}, "a probe of role dense lacks all units"),
    "an unknown role": ({"role": "depth"}, "'depth' is none of"),
}


@pytest.mark.parametrize("what", BAD_ENTRIES)
def test_an_entry_that_no_measurement_gives_is_refused_by_its_line(what: str, tmp_path: Path) -> None:
    changes, said = BAD_ENTRIES[what]
    path = tmp_path / "t.jsonl"
    measured_table().write(path)
    lines = path.read_text().splitlines()
    lines[3] = json.dumps(json.loads(lines[3]) | changes)
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(InvalidInput, match=rf"t\.jsonl: line 4.*{re.escape(said)}"):
        NetworkTable.read(path)


BAD_NETWORKS: dict[str, tuple[dict[str, object], str]] = {
    "no layers": ({"layers": []}, "no groups whose widths could differ, or no layers"),
    "no groups": ({"groups": [], "branches": []}, "no groups whose widths could differ"),
    "no stride": ({"layers": [{"name": "stem", "kind": "transposed", "stride": [0, 0]}]}, "a stride and a number of"),
    "no size": ({"layers": [{"name": "stem", "kind": "linear", "output_sizes": [[1 << 40]]}]}, "a layer gives sizes"),
}


@pytest.mark.parametrize("what", BAD_NETWORKS)
def test_a_header_of_no_network_is_refused(what: str, tmp_path: Path) -> None:
    changes, said = BAD_NETWORKS[what]
    path = tmp_path / "t.jsonl"
    measured_table().write(path)
    header = json.loads(path.read_text().splitlines()[0])
    path.write_text(json.dumps(header | {"network": header["network"] | changes}) + "\n")
    with pytest.raises(InvalidInput, match=f"line 1: .*{said}"):
        NetworkTable.read(path)


@pytest.mark.parametrize("kind", ["LatencyTable", "Plan"])
def test_another_document_is_no_table_of_a_network(kind: str, tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text(json.dumps({"type": kind, "version": 1}) + "\n")
    with pytest.raises(InvalidInput, match="line 1 is not the header of a latency table"):
        NetworkTable.read(tmp_path / "t.jsonl")


def test_a_later_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    measured_table().write(path)
    first, *others = path.read_text().splitlines(keepends=True)
    path.write_text(json.dumps(json.loads(first) | {"version": 2}) + "\n" + "".join(others))
    with pytest.raises(InvalidInput, match=r"line 1: .* has version 2"):
        NetworkTable.read(path)


def test_a_table_for_something_else_names_every_field_that_differs() -> None:
    with pytest.raises(Mismatch) as caught:
        NetworkTable(HEADER).require_usable(
            fingerprint=replace(FINGERPRINT, runtime_version="2"),
            workload=replace(WORKLOAD, precision="int8", batch=2, context=1),
            network=replace(NETWORK, input_size=(3, 64, 64)),
            backend="executorch",
        )
    assert str(caught.value).startswith(
        "the latency table was measured for something else (table / here): backend: onnxruntime / executorch;"
        " runtime_version: 1 / 2; workload batch: 1 / 2; workload precision: f32 / int8; network input_size differ;"
    )


def test_what_was_measured_beside_other_load_is_left_out_and_said() -> None:
    table = measured_table()
    bad = replace(table.entries[6], status="contended", samples_ns=(10**9,) * 15)
    found = table.with_entries([bad]).model()
    assert max(found.holdout_errors()) < 0.005
    assert found.caveats == ("1 of the latency table's 40 probes are left out, because other processes used the cores",)


def test_a_table_without_its_dense_probe_asks_for_it() -> None:
    with pytest.raises(InvalidInput, match="the latency table has no dense probe yet"):
        replace(measured_table(), entries=measured_table().entries[1:]).model()


class FakeProfiler:
    """A file's number is its latency in nanoseconds; after `killed_after` blocks the power goes off."""

    backend = "onnxruntime"

    def __init__(self, *, killed_after: int = 99) -> None:
        self.killed_after = killed_after
        self.measured: list[str] = []
        self.blocks = 0

    def fingerprint(self) -> Fingerprint:
        return FINGERPRINT

    def measure(
        self, cases: Sequence[object], protocol: Protocol, *, progress: Callable[[str], None] | None = None
    ) -> list[Measurement]:
        if self.blocks == self.killed_after:
            raise KeyboardInterrupt
        self.blocks += 1
        texts = [case.path.read_text() for case in cases]  # type: ignore[attr-defined]
        self.measured += texts[1:]
        return [
            Measurement(
                artifact_sha256="",
                workload=WORKLOAD,
                fingerprint=FINGERPRINT,
                samples_ns=(int(text.split()[0]),) * 15,
                rounds=tuple(range(15)),
                peak_memory_bytes=1,
                load_seconds=0.1,
                started="",
                status="ok",
            )
            for text in texts
        ]


def write_probe(counts: Mapping[str, int], folder: Path) -> Path:
    folder.mkdir()
    path = folder / "model.onnx"
    path.write_text(f"{round(1e9 * in_reach(counts))} {dict(counts)}")
    return path


def build(path: Path, profiler: FakeProfiler) -> NetworkTable:
    return build_network_table(
        NETWORK,
        profiler=profiler,  # type: ignore[arg-type]
        write_probe=write_probe,
        workload=WORKLOAD,
        path=path,
        num_random=8,
        num_holdout=4,
    )


def test_a_table_is_measured_and_kept(tmp_path: Path) -> None:
    table = build(tmp_path / "t.jsonl", FakeProfiler())
    assert NetworkTable.read(tmp_path / "t.jsonl") == table
    assert [entry.role for entry in table.entries].count("holdout") == 4
    assert sorted(one.name for one in tmp_path.iterdir()) == [".t.jsonl.lock", "t.jsonl"]
    assert max(table.model().holdout_errors()) < 0.02


def test_a_killed_table_goes_on_with_the_probes_that_it_lacks(tmp_path: Path) -> None:
    killed, second = FakeProfiler(killed_after=2), FakeProfiler()
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "t.jsonl", killed)
    build(tmp_path / "t.jsonl", second)
    whole = FakeProfiler()
    build(tmp_path / "other.jsonl", whole)
    assert killed.measured + second.measured == whole.measured
    assert NetworkTable.read(tmp_path / "t.jsonl").entries == NetworkTable.read(tmp_path / "other.jsonl").entries


def test_a_table_of_another_network_is_not_continued(tmp_path: Path) -> None:
    other = replace(HEADER, network=replace(NETWORK, input_size=(3, 64, 64)))
    NetworkTable(other).write(tmp_path / "t.jsonl")
    with pytest.raises(Mismatch, match="network input_size differ"):
        build(tmp_path / "t.jsonl", FakeProfiler())


PEAK = devices.Reach(share=1.0, operator_seconds=0.0)
DEVICE = replace(devices.get("s23"), bytes_per_second=1e9, flops_per_second=1e9, reach=(PEAK, PEAK))


def test_every_layer_takes_a_while_to_start() -> None:
    found, peak = (
        network_roofline(NETWORK, WORKLOAD, DEVICE, reach=one) for one in (replace(PEAK, operator_seconds=1.0), PEAK)
    )
    assert found.predict({}) - peak.predict({}) == pytest.approx(len(NETWORK.layers))


def test_an_estimate_is_bound_by_what_it_computes_on_a_slow_processor() -> None:
    found = network_roofline(NETWORK, WORKLOAD, replace(DEVICE, bytes_per_second=1e15))
    assert found.predict({"stem": 8}) == pytest.approx(NETWORK.flops(DENSE | {"stem": 8}) / 1e9)


def test_an_estimate_is_bound_by_what_it_moves_where_memory_is_slow() -> None:
    found = network_roofline(NETWORK, WORKLOAD, replace(DEVICE, flops_per_second=1e15))
    assert found.layer_seconds({})["head"] == pytest.approx(4 * (64 + 7 + 64 * 7) / 1e9)


def test_an_estimate_stands_for_a_measurement_and_says_so() -> None:
    found = network_roofline(NETWORK, WORKLOAD, DEVICE)
    measurement = estimated([found] * 3, DENSE, device=DEVICE, backend="onnxruntime", artifact_sha256="")
    assert measurement.status == "estimated"
    assert measurement.seconds() == pytest.approx(found.predict({}), rel=1e-4)


def test_a_device_without_published_numbers_is_not_estimated() -> None:
    with pytest.raises(InvalidInput, match="no bandwidth and compute are published"):
        network_roofline(NETWORK, WORKLOAD, replace(DEVICE, bytes_per_second=None))

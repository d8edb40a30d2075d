"""Measurements, speed-ups and table building; the last tests use the real agent and the real llama.cpp."""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from threading import Event
from typing import Any

import pytest
from filelock import FileLock
from standins.fabricated import FINGERPRINT, TINY_LAYER, tiny_llama

from dilap import backends, export
from dilap.core import codec
from dilap.core.artifact import Artifact
from dilap.core.errors import LinkLost, Mismatch
from dilap.core.measurement import Fingerprint, Interval, Measurement
from dilap.core.shape import UNMIXED, Architecture
from dilap.core.workload import Budget, Workload
from dilap.profilers.devices import device as devices
from dilap.profilers.profiler import Case, Profiler, budget_share, is_shown, speedup
from dilap.profilers.protocol import Protocol
from dilap.profilers.tables import probes
from dilap.profilers.tables.measuring import Progress
from dilap.profilers.tables.table import LatencyTable

WORKLOAD = Workload(precision="f32", context=16)
QUICK = Protocol(
    lead_in_seconds=0.0, warm_up_seconds=0.0, warm_up_cap_seconds=0.0, max_seconds=0.0, back_off_seconds=0.0
)
ARCHITECTURE = tiny_llama(*[TINY_LAYER] * 4)


def measurement(samples_ns: Sequence[int], *, first_round: int = 0) -> Measurement:
    return Measurement(
        artifact_sha256="0" * 64,
        workload=WORKLOAD,
        fingerprint=FINGERPRINT,
        samples_ns=tuple(samples_ns),
        rounds=tuple(first_round + index // 3 for index in range(len(samples_ns))),
        peak_memory_bytes=1,
        load_seconds=0.1,
        started="2026-01-01T00:00:00+00:00",
        status="ok",
    )


def test_a_speedup_is_paired_by_round() -> None:
    # the machine gets twice as slow half way, in both
    slowness = [1] * 15 + [2] * 15
    dense, pruned = (measurement([base * factor for factor in slowness]) for base in (1400, 1000))
    found = speedup(dense, pruned)
    assert (found.value, found.low, found.high) == pytest.approx((1.4, 1.4, 1.4))


def test_rounds_that_only_one_has_are_left_out() -> None:
    dense = measurement([2000] * 6 + [9000] * 3)
    assert speedup(dense, measurement([1000] * 6)).value == pytest.approx(2)


def test_measurements_from_different_runs_have_no_speedup() -> None:
    with pytest.raises(Mismatch, match="share no round"):
        speedup(measurement([1000] * 3), measurement([1000] * 3, first_round=7))


def test_measurements_of_two_workloads_have_no_speedup() -> None:
    other = replace(measurement([1000] * 3), workload=replace(WORKLOAD, threads=2))
    with pytest.raises(Mismatch, match="2 threads"):
        speedup(measurement([1000] * 3), other)


def test_measurements_of_two_devices_have_no_speedup() -> None:
    other = replace(measurement([1000] * 3), fingerprint=replace(FINGERPRINT, processor="Other"))
    with pytest.raises(Mismatch, match="processor"):
        speedup(measurement([1000] * 3), other)


@pytest.mark.parametrize(("low", "high", "shown"), [(1.01, 1.2, True), (0.99, 1.2, False), (0.8, 0.9, True)])
def test_a_speedup_is_shown_only_if_its_interval_excludes_one(low: float, high: float, shown: bool) -> None:
    assert is_shown(Interval(value=(low + high) / 2, low=low, high=high)) is shown


class FakeExporter:
    """A probe's file says its widths; each part in another precision counts one less."""

    def export_probe(
        self,
        architecture: Architecture,
        *,
        precision: str,
        precisions: Mapping[str, str] = UNMIXED,
        seed: int,
        out: Path,
    ) -> Artifact:
        out.mkdir()
        widths = sum(one.num_heads + one.num_channels for one in architecture.layers)
        (out / "model.gguf").write_text(str(widths - len(precisions)))
        artifact = Artifact(
            path="model.gguf",
            format="gguf",
            backend="llamacpp",
            precision=precision,
            plan_digest="",
            architecture=architecture,
            sha256="",
            num_bytes=0,
            sqnr_db=None,
        )
        codec.write_json(out / "artifact.json", codec.encode(artifact))
        return artifact


class FakeProfiler:
    """A file's number is its latency in microseconds; `killed_after` blocks the power goes off."""

    backend = "llamacpp"
    killed_after = 99
    blocks: list[int]
    waits_for: Event | None = None

    def fingerprint(self) -> Fingerprint:
        return FINGERPRINT

    def measure(
        self, cases: Sequence[Case], protocol: Protocol, *, progress: Callable[[str], None] | None = None
    ) -> list[Measurement]:
        if len(self.blocks) == self.killed_after:
            raise KeyboardInterrupt
        if self.waits_for is not None:
            assert self.waits_for.wait(timeout=30)
        self.blocks.append(len(cases))
        return [measurement([1000 * (100 + int(case.path.read_text()))] * 15) for case in cases]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeProfiler:
    profiler = FakeProfiler()
    profiler.blocks = []
    monkeypatch.setattr(sys.modules[__name__], "make_profiler", lambda _: profiler)
    monkeypatch.setattr(export, "get", lambda name: FakeExporter())
    return profiler


def make_profiler(backend: str = "llamacpp") -> Profiler:
    return Profiler(devices.get("host_cpu"), backend=backend)


def build(
    path: Path,
    *,
    backend: str = "llamacpp",
    workload: Workload = WORKLOAD,
    others: Sequence[str] = (),
    protocol: Protocol = QUICK,
    helpers: Sequence[Any] = (),
    progress: Progress | None = None,
) -> LatencyTable:
    capabilities = backends.get(backend).capabilities(ARCHITECTURE, precision="f32")
    attention, ffn = probes.default_levels(ARCHITECTURE, capabilities)
    return probes.build_table(
        ARCHITECTURE,
        profiler=make_profiler(backend),
        helpers=helpers,
        workload=workload,
        path=path,
        attention_levels=attention,
        ffn_levels=ffn,
        others=dict.fromkeys(others, (attention, ffn)),
        num_random=3,
        num_holdout=2,
        protocol=protocol,
        progress=progress,
    )


def test_the_file_holds_the_table_that_is_returned(fake: FakeProfiler, tmp_path: Path) -> None:
    assert build(tmp_path / "t.jsonl") == LatencyTable.read(tmp_path / "t.jsonl")


def test_the_dense_probe_is_in_every_block_and_one_entry(fake: FakeProfiler, tmp_path: Path) -> None:
    table = build(tmp_path / "t.jsonl")
    dense = [entry for entry in table.entries if entry.role == "dense"]
    assert len(dense) == 1
    assert {entry.sentinel_ns for entry in table.entries} == {dense[0].samples_ns}
    assert sum(fake.blocks) == len(table.entries) - 1 + len(fake.blocks)


def test_no_probe_file_is_left_behind(fake: FakeProfiler, tmp_path: Path) -> None:
    build(tmp_path / "t.jsonl")
    assert {path.name for path in tmp_path.iterdir()} == {"t.jsonl", ".t.jsonl.lock"}  # a lock's file has to stay


def test_probes_are_written_and_kept_in_their_precisions(fake: FakeProfiler, tmp_path: Path) -> None:
    table = build(tmp_path / "t.jsonl", others=["q8_0", "f16"])
    assert table == LatencyTable.read(tmp_path / "t.jsonl")
    assert table.header.offered == ("f32", "f16", "q8_0")
    dense = median(table.entries[0].samples_ns)
    faster = {one.head: dense - median(one.samples_ns) for one in table.entries if one.role == "head"}
    assert faster == {"f32": 1000, "f16": 1000, "q8_0": 1000}
    fake.blocks.clear()
    assert build(tmp_path / "t.jsonl", others=["q8_0", "f16"]) == table
    assert fake.blocks == []


def test_a_table_goes_on_in_its_own_precisions_only(fake: FakeProfiler, tmp_path: Path) -> None:
    build(tmp_path / "t.jsonl", others=["q8_0"])
    with pytest.raises(Mismatch, match=r"of the precisions f32, q8_0, and f32 is asked for"):
        build(tmp_path / "t.jsonl")
    with pytest.raises(Mismatch, match=r"precisions: f32, q8_0 / f32, f16"):
        build(tmp_path / "t.jsonl", others=["f16"])


def test_a_killed_table_goes_on_where_it_stopped(fake: FakeProfiler, tmp_path: Path) -> None:
    whole = build(tmp_path / "whole.jsonl")
    fake.killed_after = len(fake.blocks) + 2
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "t.jsonl")
    num_blocks = len(fake.blocks) - 2
    fake.killed_after = 99
    fake.blocks.clear()
    assert build(tmp_path / "t.jsonl").entries == whole.entries
    assert len(fake.blocks) == num_blocks - 2


def test_a_complete_table_is_not_measured_again(fake: FakeProfiler, tmp_path: Path) -> None:
    build(tmp_path / "t.jsonl")
    fake.blocks.clear()
    build(tmp_path / "t.jsonl")
    assert fake.blocks == []


class BusyProfiler(FakeProfiler):
    """Other processes use the cores during the second block, or always."""

    def __init__(self, *, always: bool = False) -> None:
        self.blocks, self._always = [], always

    def measure(
        self, cases: Sequence[Case], protocol: Protocol, *, progress: Callable[[str], None] | None = None
    ) -> list[Measurement]:
        found = super().measure(cases, protocol, progress=progress)
        busy = self._always or len(self.blocks) == 2
        return [replace(one, status="contended" if busy else "ok") for one in found]


@pytest.mark.usefixtures("fake")
def test_probes_that_other_load_spoiled_are_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "make_profiler", lambda _: BusyProfiler())
    table = build(tmp_path / "t.jsonl")
    assert {entry.status for entry in table.entries} == {"ok"}
    assert LatencyTable.read(tmp_path / "t.jsonl") == table


def test_load_that_stays_is_left_to_the_next_command(
    fake: FakeProfiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    busy = BusyProfiler(always=True)
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules[__name__], "make_profiler", lambda _: busy)
        table = build(tmp_path / "t.jsonl")
    assert {entry.status for entry in table.entries} == {"contended"}
    assert len({entry.key for entry in table.entries}) == len(table.entries)
    assert build(tmp_path / "t.jsonl").model().caveats == ()
    assert fake.blocks


def test_a_table_that_another_process_measures_is_waited_for(fake: FakeProfiler, tmp_path: Path) -> None:
    other = FileLock(tmp_path / ".t.jsonl.lock")
    other.acquire()
    told: list[str] = []

    def progress(_done: int, _total: int, text: str) -> None:
        told.append(text)
        other.release()

    table = build(tmp_path / "t.jsonl", progress=progress)
    assert told[0] == "another process measures this table: waiting for it"
    assert table == LatencyTable.read(tmp_path / "t.jsonl")


def test_a_table_is_not_continued_for_another_workload(fake: FakeProfiler, tmp_path: Path) -> None:
    build(tmp_path / "t.jsonl")
    with pytest.raises(Mismatch, match="threads: 1 / 2"):
        build(tmp_path / "t.jsonl", workload=replace(WORKLOAD, threads=2))


class SecondProfiler(FakeProfiler):
    """Another device of the kind, twice as slow."""

    def __init__(self, first: FakeProfiler) -> None:
        self.blocks = []
        self.has_measured = first.waits_for = Event()

    def fingerprint(self) -> Fingerprint:
        return replace(FINGERPRINT, serial_sha256="second")

    def measure(
        self, cases: Sequence[Case], protocol: Protocol, *, progress: Callable[[str], None] | None = None
    ) -> list[Measurement]:
        self.has_measured.set()
        if len(self.blocks) == self.killed_after:
            raise LinkLost("pulled out")
        return [
            replace(one, fingerprint=self.fingerprint(), samples_ns=tuple(2 * ns for ns in one.samples_ns))
            for one in super().measure(cases, protocol, progress=progress)
        ]


def test_two_devices_share_the_probes(fake: FakeProfiler, tmp_path: Path) -> None:
    alone = build(tmp_path / "alone.jsonl")
    table = build(tmp_path / "t.jsonl", helpers=[SecondProfiler(fake)])
    (partner,) = table.partners
    assert partner.entries
    assert len(table.entries) + len(partner.entries) == len(alone.entries)


def test_no_entry_of_one_device_is_in_the_table_of_another(fake: FakeProfiler, tmp_path: Path) -> None:
    table = build(tmp_path / "t.jsonl", helpers=[SecondProfiler(fake)])
    (partner,) = table.partners
    assert partner.header.fingerprint.serial_sha256 == "second"
    assert {min(entry.sentinel_ns) / min(table.entries[0].sentinel_ns) for entry in partner.entries} == {2.0}
    assert {entry.role for entry in partner.entries} <= {"attention", "ffn", "random"}


def test_a_table_of_two_devices_predicts_as_one_of_the_first(fake: FakeProfiler, tmp_path: Path) -> None:
    alone = build(tmp_path / "alone.jsonl").model()
    shared = build(tmp_path / "t.jsonl", helpers=[SecondProfiler(fake)]).model()
    widths = (replace(TINY_LAYER, num_channels=32),) * 4
    assert shared.predict(widths) == pytest.approx(alone.predict(widths), rel=1e-6)


def test_a_shared_table_is_read_back_whole(fake: FakeProfiler, tmp_path: Path) -> None:
    assert build(tmp_path / "t.jsonl", helpers=[SecondProfiler(fake)]) == LatencyTable.read(tmp_path / "t.jsonl")


def test_a_lost_helper_leaves_its_probes_to_the_first_device(fake: FakeProfiler, tmp_path: Path) -> None:
    alone = build(tmp_path / "alone.jsonl")
    helper = SecondProfiler(fake)
    helper.killed_after = 0
    table = build(tmp_path / "t.jsonl", helpers=[helper])
    assert {entry.runs for entry in table.entries} == {entry.runs for entry in alone.entries}


def test_a_device_of_another_kind_does_not_help(fake: FakeProfiler, tmp_path: Path) -> None:
    helper = SecondProfiler(fake)
    helper.fingerprint = lambda: replace(FINGERPRINT, processor="Another")  # type: ignore[method-assign]
    with pytest.raises(Mismatch, match="device 2 is not of the first one's kind: processor"):
        build(tmp_path / "t.jsonl", helpers=[helper])


needs_llamacpp = pytest.mark.skipif(
    backends.get("llamacpp").unavailable() is not None, reason=str(backends.get("llamacpp").unavailable())
)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[Case]:
    folder = tmp_path_factory.mktemp("pair")
    cases = []
    for name, num_layers in (("dense", 4), ("pruned", 1)):
        shape = replace(ARCHITECTURE, layers=ARCHITECTURE.layers[:num_layers])
        artifact = export.get("llamacpp").export_probe(shape, precision="f32", seed=0, out=folder / name)
        cases.append(Case(path=folder / name / artifact.path, workload=WORKLOAD))
    return cases


@needs_llamacpp
def test_rounds_are_numbered_across_fresh_starts(pair: list[Case]) -> None:
    profiler = Profiler(devices.get("host_cpu"), backend="llamacpp")
    dense, pruned = profiler.measure(pair, replace(QUICK, fresh_starts=2))
    assert sorted(set(dense.rounds)) == sorted(set(pruned.rounds)) == [0, 1]


@needs_llamacpp
def test_a_measurement_knows_what_was_measured(pair: list[Case]) -> None:
    (one,) = Profiler(devices.get("host_cpu"), backend="llamacpp").measure(pair[:1], QUICK)
    assert (one.artifact_sha256, one.workload) == (codec.file_sha256(pair[0].path), WORKLOAD)
    assert (one.fingerprint.runtime, one.load_seconds > 0) == ("llamacpp", True)


@needs_llamacpp
def test_progress_is_told_round_by_round(pair: list[Case]) -> None:
    told: list[str] = []
    Profiler(devices.get("host_cpu"), backend="llamacpp").measure(pair[:1], QUICK, progress=told.append)
    assert told == ["round 1: 0 of 1 settled"]


@pytest.mark.parametrize(("backend", "others"), [("llamacpp", ["f16"]), ("onnxruntime", [])])
def test_a_tiny_table_is_measured_by_the_real_runtime(backend: str, others: list[str], tmp_path: Path) -> None:
    if reason := backends.get(backend).unavailable():
        pytest.skip(reason)
    # whatever else runs beside the tests
    protocol = replace(QUICK, contention_share=1e9)
    table = build(tmp_path / "t.jsonl", backend=backend, others=others, protocol=protocol)
    roles = {"dense", "depth", "attention", "ffn", "random", "holdout"} | ({"precision", "head"} if others else set())
    assert {entry.role for entry in table.entries} == roles
    assert len(table.model().holdout_errors()) == 2
    assert json.loads((tmp_path / "t.jsonl").read_text().splitlines()[0])["backend"] == backend


# The machine slows down to half after the first two rounds; the pruned model always takes 0.7 of the dense one.
DRIFTING = [100, 100, 100, 100, 100, 100, 200, 200, 200]


def test_a_relative_budget_is_judged_round_by_round() -> None:
    dense, pruned = measurement(DRIFTING), measurement([7 * one // 10 for one in DRIFTING[:3] + DRIFTING[6:]])
    assert budget_share(Budget(fraction=0.7), dense, replace(pruned, rounds=(0, 0, 0, 2, 2, 2))).value == pytest.approx(
        1
    )


def test_an_absolute_budget_is_judged_on_the_median() -> None:
    dense, pruned = measurement([100] * 9), measurement([80] * 9)
    assert budget_share(Budget(seconds=1e-7), dense, pruned).value == pytest.approx(0.8)


def test_a_p90_budget_is_judged_on_the_p90() -> None:
    dense, pruned = measurement([100] * 9), measurement([50] * 7 + [90] * 2)
    share = budget_share(Budget(fraction=1.0, statistic="p90"), dense, pruned)
    assert share.value == pytest.approx(0.9)

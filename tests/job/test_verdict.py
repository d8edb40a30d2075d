"""A verdict says no more than the interval: the words for it, and the room that the search leaves for it."""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain, repeat
from pathlib import Path

import pytest
from standins.fabricated import FINGERPRINT, TINY_LAYER, tiny_llama
from standins.fake_job import FakeBench, prune_tiny

from dilap.core.codec import read_json, write_json
from dilap.core.measurement import Interval, Measurement
from dilap.core.shape import Architecture
from dilap.core.workload import Budget, Workload
from dilap.job.common_stages import AIM
from dilap.job.result import read_result, table
from dilap.job.verdict import percent, verdict, words
from dilap.profilers.profiler import Case, budget_share
from dilap.report.report import Report
from dilap.search.limit import CostLimit


def around(value: float, half: float) -> Interval:
    return Interval(value=value, low=value - half, high=value + half)


@pytest.mark.parametrize(
    ("share", "expected"),
    [
        (around(0.98, 0.01), "kept"),
        (around(0.99, 0.01), "kept"),
        (around(0.995, 0.01), "uncertain"),
        (around(1.005, 0.01), "uncertain"),
        (around(1.02, 0.01), "missed"),
        (around(1.0, 0.0), "kept"),
        (around(1.001, 0.0), "missed"),
    ],
)
def test_only_a_whole_interval_decides(share: Interval, expected: str) -> None:
    assert verdict(share, ["ok", "noisy"]) == expected


@pytest.mark.parametrize("value", [0.5, 1.5])
def test_nothing_is_claimed_from_a_contended_measurement(value: float) -> None:
    share = around(value, 0.01)
    found = verdict(share, ["ok", "contended"])
    assert (found, words(found, share)) == ("uncertain", "uncertain, the device was busy or slowed down")


def test_an_estimate_stays_one() -> None:
    assert verdict(around(0.5, 0.0), ["estimated", "estimated"]) == "estimated"


def test_what_is_uncertain_says_on_which_side_it_is() -> None:
    assert words("uncertain", around(0.995, 0.01)) == "kept, within the noise"
    assert words("uncertain", around(1.005, 0.01)) == "missed, within the noise"


def test_a_share_is_shown_with_its_interval() -> None:
    assert percent(around(0.975, 0.01)) == "97.5% [96.5%, 98.5%]"
    assert percent(around(0.975, 0.0)) == "97.5%"


def of_starts(one: Measurement, levels: Sequence[float]) -> Measurement:
    """The same latency in fresh starts of these levels, two rounds each."""
    middle, numbers = one.seconds() * 1e9, range(2 * len(levels))
    return replace(
        one,
        samples_ns=tuple(round(middle * levels[number // 2]) for number in numbers),
        rounds=tuple(numbers),
        first_rounds=tuple(numbers[::2]),
    )


@pytest.mark.usefixtures("fake_device")
def test_a_job_whose_interval_crosses_its_budget_ends_uncertain_everywhere(
    checkpoint: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = FakeBench.measure_cases

    def noisy(self: FakeBench, cases: Sequence[Case], *, final: bool = False) -> list[Measurement]:
        first, *others = measure(self, cases, final=final)
        return [of_starts(first, [1.0] * 8), *(of_starts(one, [0.9, 1.1] * 4) for one in others)]

    monkeypatch.setattr(FakeBench, "measure_cases", noisy)
    result = prune_tiny(checkpoint, corpus, tmp_path / "run")
    assert result.status == "uncertain"
    assert ": kept, within the noise, " in table(result)
    stored = read_json(tmp_path / "run" / "result.json")
    assert stored["status"] == "uncertain"
    assert stored["budget_interval"]["low"] <= 1 < stored["budget_interval"]["high"]
    assert "70% (kept, within the noise)" in Report.of([tmp_path / "run"]).markdown()


@pytest.mark.usefixtures("fake_device")
def test_a_job_beside_other_load_claims_nothing(
    checkpoint: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = FakeBench.measure_cases

    def busy(self: FakeBench, cases: Sequence[Case], *, final: bool = False) -> list[Measurement]:
        return [replace(one, status="contended") for one in measure(self, cases, final=final)]

    monkeypatch.setattr(FakeBench, "measure_cases", busy)
    result = prune_tiny(checkpoint, corpus, tmp_path / "run")
    assert (result.status, result.verdict) == ("uncertain", "uncertain, the device was busy or slowed down")
    assert not read_json(tmp_path / "run" / "result.json")["speedup_shown"]


def slowing(monkeypatch: pytest.MonkeyPatch, factors: Iterator[float], *, pruned: float) -> list[float]:
    """Multiply the seconds of final measurements by the next factor; the pruned model's also by `pruned`."""
    measure, seen = FakeBench.measure_cases, []

    def slowed(self: FakeBench, cases: Sequence[Case], *, final: bool = False) -> list[Measurement]:
        found = measure(self, cases, final=final)
        if not final:
            return found
        seen.append(next(factors))
        relative = [pruned if seen[-1] > 1 and number % 2 else 1.0 for number in range(len(found))]
        return [of_starts(one, [seen[-1] * share] * 8) for one, share in zip(found, relative, strict=True)]

    monkeypatch.setattr(FakeBench, "measure_cases", slowed)
    return seen


@pytest.mark.usefixtures("fake_device")
def test_a_device_that_stays_slower_than_before_claims_and_corrects_nothing(
    checkpoint: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = prune_tiny(checkpoint, corpus, tmp_path / "undisturbed")
    seen = slowing(monkeypatch, repeat(1.24), pruned=0.92)
    result = prune_tiny(checkpoint, corpus, tmp_path / "run")
    assert (result.status, result.speedup_shown) == ("uncertain", False)
    assert result.plan_digest == undisturbed.plan_digest
    assert len(seen) == 6  # three times for the plan, three times for the claim
    assert any("the device is slower than before: the dense model took " in note for note in result.all_notes)


@pytest.mark.usefixtures("fake_device")
def test_a_device_that_was_slower_for_a_while_is_measured_again(
    checkpoint: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = slowing(monkeypatch, chain([1.24, 1.24], repeat(1.0)), pruned=0.92)
    assert prune_tiny(checkpoint, corpus, tmp_path / "run").status == "kept"
    assert seen[:3] == [1.24, 1.24, 1.0]


@pytest.mark.usefixtures("fake_device")
def test_a_device_whose_starts_differ_is_not_slower(
    checkpoint: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    levels = [0.95, 1.2, 1.0, 1.15, 0.97, 1.18, 1.02, 1.1]
    measure = FakeBench.measure_cases

    def uneven(self: FakeBench, cases: Sequence[Case], *, final: bool = False) -> list[Measurement]:
        found = measure(self, cases, final=final)
        return [of_starts(one, levels) for one in found] if final else found

    monkeypatch.setattr(FakeBench, "measure_cases", uneven)
    assert prune_tiny(checkpoint, corpus, tmp_path / "run").status == "kept"


@pytest.mark.usefixtures("fake_device")
def test_results_of_earlier_versions_are_read(checkpoint: Path, corpus: Path, tmp_path: Path) -> None:
    assert prune_tiny(checkpoint, corpus, tmp_path / "run").status == "kept"
    path = tmp_path / "run" / "result.json"
    old = read_json(path)
    del old["budget_interval"]
    for side in ("dense", "pruned"):
        del old[side]["measurement"]["first_rounds"]
    write_json(path, old)
    result = read_result(tmp_path / "run")
    assert "kept, " + f"{result.budget_used:.1%} of it used" in table(result)


def wide(num_channels: int) -> Architecture:
    return tiny_llama(replace(TINY_LAYER, num_channels=num_channels))


def measured_share(true: float, draw: random.Random) -> Interval:
    """What eight fresh starts say of a share of the budget, their paired ratios differing by 0.9 %."""
    dense = Measurement(
        artifact_sha256="0" * 64,
        workload=Workload(),
        fingerprint=FINGERPRINT,
        samples_ns=(1_000_000_000,),
        rounds=(0,),
        peak_memory_bytes=1,
        load_seconds=0.1,
        started="",
        status="ok",
    )
    pruned = of_starts(dense, [true * (1 + draw.gauss(0, 0.009)) for _ in range(8)])
    return budget_share(Budget(fraction=1.0), of_starts(dense, [1.0] * 8), pruned)


def test_a_search_leaves_room_for_the_proof_and_gives_little_away() -> None:
    """100 whole jobs with tables that are off by 1.5 %."""
    draw, budget, num_kept = random.Random(0), 100_000, 0
    for _ in range(100):
        factor = (1 + draw.gauss(0, 0.015)) / budget

        def measure(architecture: Architecture, _: Mapping[str, str], factor: float = factor) -> Interval:
            return measured_share(factor * architecture.layers[0].num_channels, draw)

        target = CostLimit(limit=AIM * budget, predict=lambda *_: 0.0, error=0.015, measure=measure, aim=AIM)
        used = factor * target.meet(int, cost=float, architecture=wide)
        assert 0.93 <= used <= 1.0
        num_kept += verdict(measured_share(used, draw), ["ok"]) == "kept"
    assert num_kept >= 95

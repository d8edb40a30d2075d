"""The measuring loop under a virtual clock with scripted noise."""

import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
from standins.fabricated import FINGERPRINT

from dilap.core.measurement import Measurement
from dilap.core.workload import Workload
from dilap.profilers.profiler import is_shown, speedup
from dilap.profilers.protocol import Protocol, Trace, collect, judge

MS = 1_000_000
QUICK = Protocol(warm_up_seconds=0.0, samples_per_turn=3)
QUICK_SAMPLES = 3 * QUICK.min_rounds


WILD = [1 + (37 * step % 101) / 200 for step in range(101)]  # evenly spread over 1 to 1.5


class ScriptedBench:
    """Cases of fixed cost on a machine whose slowness and other load are functions of the time."""

    def __init__(
        self,
        costs_ms: Sequence[float],
        *,
        slowness: Callable[[float], float] = lambda now: 1.0,
        load: Callable[[float], float] = lambda now: 0.0,
        hot: Callable[[float], bool] = lambda now: False,
        spike_every: int = 0,
    ) -> None:
        self.costs_ms, self.slowness, self.load, self.spike_every = costs_ms, slowness, load, spike_every
        self.hot = hot
        self.clock = 0.0
        self.num_samples = 0
        self.calls: list[int] = []
        self.sleeps: list[float] = []

    def sample(self, case: int, count: int) -> list[int]:
        self.calls.append(case)
        samples = []
        for _ in range(count):
            self.num_samples += 1
            spike = 5 if self.spike_every and self.num_samples % self.spike_every == 0 else 1
            # a ripple of 0.2 %, so that no interval has width 0
            ripple = 1 + 0.002 * (self.num_samples % 5 - 2) / 2
            milliseconds = self.costs_ms[case] * self.slowness(self.clock) * spike * ripple
            self.clock += milliseconds / 1000
            samples.append(round(milliseconds * MS))
        return samples

    def other_load(self) -> float:
        return self.load(self.clock)

    def throttles(self) -> bool:
        return self.hot(self.clock)

    def now(self) -> float:
        return self.clock

    def sleep(self, seconds: float) -> None:
        self.sleeps.append(seconds)
        self.clock += seconds


def ramp(now: float) -> float:
    """2 % slower every second."""
    return 1 + 0.02 * now


def estimated_ratio(first: Sequence[int], second: Sequence[int]) -> float:
    return statistics.median(first) / statistics.median(second)


def test_interleaving_keeps_a_ratio_right_while_the_machine_drifts() -> None:
    long = replace(QUICK, min_rounds=20, drift_tolerance=1.0)
    dense, pruned = collect(ScriptedBench([30.0, 20.0], slowness=ramp), 2, long)
    assert estimated_ratio(dense.samples_ns, pruned.samples_ns) == pytest.approx(1.5, rel=0.01)


def test_measuring_one_after_the_other_gets_the_same_ratio_wrong() -> None:
    long = replace(QUICK, min_rounds=20, drift_tolerance=1.0)
    bench = ScriptedBench([30.0, 20.0], slowness=ramp)
    (dense,) = collect(bench, 1, long)
    bench.costs_ms = [20.0]
    (pruned,) = collect(bench, 1, long)
    assert abs(estimated_ratio(dense.samples_ns, pruned.samples_ns) / 1.5 - 1) > 0.02


MACHINES: dict[str, Callable[[float], float]] = {
    "drift ramp": ramp,
    "clock that drops and stays low": lambda now: 1.0 if now < 2.0 else 1.3,
    "clock between two states": lambda now: 1.0 if now % 4.2 < 2.1 else 1.25,
    "spell of spikes": lambda now: 4.0 if 0.3 < now < 6.0 else 1.0,
}
PATIENT = replace(QUICK, min_rounds=20, drift_tolerance=100.0, max_rounds=20)  # it takes what comes


def measured(trace: Trace) -> Measurement:
    return Measurement(
        artifact_sha256="0" * 64,
        workload=Workload(),
        fingerprint=FINGERPRINT,
        samples_ns=trace.samples_ns,
        rounds=trace.rounds,
        peak_memory_bytes=1,
        load_seconds=0.1,
        started="",
        status=trace.status,
    )


@pytest.mark.parametrize("name", MACHINES)
def test_an_interleaved_speedup_is_right_within_a_percent(name: str) -> None:
    dense, pruned = collect(ScriptedBench([30.0, 20.0], slowness=MACHINES[name]), 2, PATIENT)
    assert speedup(measured(dense), measured(pruned)).value == pytest.approx(1.5, rel=0.01)


@pytest.mark.parametrize("name", MACHINES)
def test_a_sequential_speedup_is_off_by_more(name: str) -> None:
    bench = ScriptedBench([30.0], slowness=MACHINES[name])
    (dense,) = collect(bench, 1, PATIENT)
    bench.costs_ms = [20.0]
    (pruned,) = collect(bench, 1, PATIENT)
    assert abs(estimated_ratio(dense.samples_ns, pruned.samples_ns) / 1.5 - 1) > 0.02


def test_a_claim_inside_the_noise_is_not_shown() -> None:
    draw = random.Random(0)
    dense, pruned = collect(ScriptedBench([10.02, 10.0], slowness=lambda _: draw.uniform(1, 1.5)), 2, PATIENT)
    assert not is_shown(speedup(measured(dense), measured(pruned)))


def test_a_claim_outside_the_noise_is_shown() -> None:
    states = iter(WILD * 1000)
    dense, pruned = collect(ScriptedBench([20.0, 10.0], slowness=lambda _: next(states)), 2, PATIENT)
    assert is_shown(speedup(measured(dense), measured(pruned)))


def test_a_round_in_which_the_device_throttled_is_repeated_after_a_rest() -> None:
    bench = ScriptedBench([10.0], hot=lambda now: 0.15 < now < 0.8)
    (trace,) = collect(bench, 1, QUICK)
    assert bench.sleeps == [1.0]
    assert (len(trace.dropped_ns), trace.status) == (3, "ok")


def test_a_device_that_keeps_throttling_is_never_ok() -> None:
    bench = ScriptedBench([10.0], hot=lambda now: True)
    (trace,) = collect(bench, 1, QUICK)
    assert (trace.status, "throttled" in trace.note) == ("noisy", True)


def test_spikes_do_not_move_the_median() -> None:
    (trace,) = collect(ScriptedBench([10.0], spike_every=25), 1, QUICK)
    assert statistics.median(trace.samples_ns) == pytest.approx(10 * MS, rel=0.002)


def test_many_spikes_are_reported_as_noise() -> None:
    status, note = judge(collect(ScriptedBench([10.0], spike_every=7), 1, QUICK), QUICK)
    assert (status, "outliers" in note) == ("noisy", True)


def test_a_quiet_case_stops_at_the_least_number_of_samples() -> None:
    (trace,) = collect(ScriptedBench([10.0]), 1, QUICK)
    assert (len(trace.samples_ns), trace.status) == (QUICK_SAMPLES, "ok")


def test_a_noisy_case_stops_at_the_largest_number_of_samples() -> None:
    states = iter(WILD * 100)
    (trace,) = collect(ScriptedBench([10.0], slowness=lambda _: next(states)), 1, QUICK)
    assert len(trace.samples_ns) == 3 * QUICK.max_rounds


def test_the_wall_clock_ends_a_measurement_that_cannot_settle() -> None:
    states = iter(WILD * 100)
    bench = ScriptedBench([100.0], slowness=lambda _: next(states))
    collect(bench, 1, replace(QUICK, max_seconds=3.0, warm_up_cap_seconds=0.0))
    assert bench.clock < 6.0


def test_a_measurement_that_ran_out_of_time_is_not_ok() -> None:
    (trace,) = collect(ScriptedBench([500.0]), 1, replace(QUICK, max_seconds=3.0))
    assert (trace.status, "time ran out" in trace.note) == ("noisy", True)


def test_warm_up_lasts_until_two_windows_agree() -> None:
    bench = ScriptedBench([10.0], slowness=lambda now: 3.0 if now < 1.0 else 1.0)
    (trace,) = collect(bench, 1, Protocol(warm_up_seconds=0.5))
    assert max(trace.samples_ns) < 31 * MS


def test_a_slow_spell_is_slept_over_and_its_round_dropped() -> None:
    bench = ScriptedBench([10.0], slowness=lambda now: 1.3 if 0.185 < now < 0.8 else 1.0)
    (trace,) = collect(bench, 1, QUICK)
    assert bench.sleeps == [1.0]
    assert max(trace.samples_ns) < 11 * MS
    assert min(trace.dropped_ns) > 11 * MS


def test_back_off_doubles_while_the_drift_lasts() -> None:
    bench = ScriptedBench([10.0], slowness=lambda now: 1.0 if now < 0.185 else 1.3)
    collect(bench, 1, replace(QUICK, max_back_offs=4))
    assert bench.sleeps == [1.0, 2.0, 4.0, 8.0]


def test_a_device_that_is_slow_after_a_rest_is_warmed_up_again() -> None:
    bench = ScriptedBench([10.0])
    plain, loads = bench.sample, iter([0.0, 0.0, 0.0, 0.0, 0.0, 0.8] + [0.0] * 100)

    def sample(case: int, count: int) -> list[int]:
        cold = bench.calls[-1:] == [-1]
        return [round(value * (1.2 if cold else 1.0)) for value in plain(case, count)]

    def sleep(seconds: float) -> None:
        bench.sleeps.append(seconds)
        bench.calls.append(-1)

    bench.sample, bench.sleep, bench.load = sample, sleep, lambda _: next(loads)  # type: ignore[method-assign]
    collect(bench, 1, replace(QUICK, min_rounds=10))
    assert bench.sleeps == [1.0]  # for the other load, and none for drift


@pytest.mark.parametrize(("speed", "status"), [(0.7, "ok"), (1.3, "noisy")])
def test_a_machine_that_changed_its_speed_is_measured_at_the_new_one(speed: float, status: str) -> None:
    bench = ScriptedBench([10.0, 20.0], slowness=lambda now: 1.0 if now < 0.6 else speed)
    first, second = collect(bench, 2, QUICK)
    assert first.samples_ns == pytest.approx([10 * speed * MS] * QUICK_SAMPLES, rel=0.003)
    assert second.samples_ns == pytest.approx([20 * speed * MS] * QUICK_SAMPLES, rel=0.003)
    assert (first.status, "slower" in first.note) == (status, speed > 1)


def test_cases_share_their_rounds_when_time_runs_out_while_measuring_starts_over() -> None:
    bench = ScriptedBench([10.0, 10.0, 10.0], slowness=lambda now: 1.0 if now < 0.8 else 1.3)
    plain, states = bench.sample, iter([1.0, 1.01, 1.04, 0.97, 1.02, 0.99] * 1000)

    def sample(case: int, count: int) -> list[int]:
        return [round(value * (next(states) if case == 2 else 1)) for value in plain(case, count)]

    bench.sample = sample  # type: ignore[method-assign]
    sentinel, settled, restless = collect(bench, 3, replace(QUICK, target_half_width=0.004, max_seconds=0.32))
    assert max(settled.samples_ns) < 11 * MS < 13 * MS < max(restless.samples_ns)  # settled before, and not asked since
    assert {*settled.rounds} <= {*restless.rounds} == {*sentinel.rounds}
    assert (sentinel.status, "good round" in sentinel.note) == ("noisy", True)


def test_a_contended_round_is_repeated() -> None:
    loads = iter([0.0, 0.0, 0.8] + [0.0] * 100)  # the first answer is about the warm-up
    bench = ScriptedBench([10.0], load=lambda _: next(loads))
    (trace,) = collect(bench, 1, QUICK)
    assert (len(trace.dropped_ns), trace.rounds[:6], trace.status) == (3, (0, 0, 0, 2, 2, 2), "ok")


def test_contention_that_never_clears_is_measured_and_flagged() -> None:
    bench = ScriptedBench([10.0], load=lambda _: 0.9)
    (trace,) = collect(bench, 1, QUICK)
    assert len(bench.sleeps) == QUICK.max_repeats
    assert len(trace.samples_ns) == QUICK_SAMPLES
    assert (trace.status, "fewer threads" in trace.note) == ("contended", True)


def test_a_pair_is_measured_in_abba_order() -> None:
    bench = ScriptedBench([10.0, 20.0])
    collect(bench, 2, QUICK)
    assert bench.calls[4:12] == [0, 1, 1, 0, 0, 1, 1, 0]


def test_cases_measured_together_share_all_rounds_in_an_order_turned_round_each_time() -> None:
    draw = random.Random(0)
    bench = ScriptedBench([10.0, 20.0, 11.0, 22.0])
    plain = bench.sample

    def sample(case: int, count: int) -> list[int]:
        return [round(value * (draw.uniform(1, 1.1) if case == 2 else 1)) for value in plain(case, count)]

    bench.sample = sample  # type: ignore[method-assign]
    traces = collect(bench, 4, replace(QUICK, together=True))
    assert bench.calls[8:16] == [0, 1, 2, 3, 3, 2, 1, 0]
    assert {one.rounds for one in traces} == {traces[2].rounds}
    assert len(traces[2].samples_ns) > QUICK_SAMPLES


def test_a_median_that_is_not_known_well_enough_is_noisy() -> None:
    samples = [round(10 * MS * state) for state in WILD]
    trace = Trace(samples_ns=tuple(samples), rounds=(0,) * 101, dropped_ns=(), status="ok", note="")
    assert judge([trace], QUICK) == ("noisy", "the median is known to 4.00% only, 1.00% was asked")


def test_fresh_starts_that_disagree_are_noisy() -> None:
    starts = [collect(ScriptedBench([cost]), 1, QUICK)[0] for cost in (10.0, 10.5)]
    status, note = judge(starts, QUICK, half_width=0.03)
    assert (status, note) == ("noisy", "fresh starts disagree: together the median is known to 3.0% only")


def test_the_worst_start_speaks_for_all() -> None:
    benches = ScriptedBench([10.0]), ScriptedBench([10.0], load=lambda _: 0.9)
    starts = [collect(bench, 1, QUICK)[0] for bench in benches]
    assert judge(starts, QUICK, half_width=0.0)[0] == "contended"


def test_rounds_of_many_cases_are_shuffled_the_same_way_for_one_seed() -> None:
    orders = []
    for _ in range(2):
        bench = ScriptedBench([10.0, 11.0, 12.0, 13.0])
        collect(bench, 4, QUICK)
        orders.append(bench.calls[8:])
    assert orders[0] == orders[1]
    assert orders[0][:4] != orders[0][4:8]


def test_the_sentinel_stays_open_until_the_last_case_is_settled() -> None:
    states = iter([1.0, 1.01, 1.04, 0.97, 1.02, 0.99] * 1000)
    bench = ScriptedBench([10.0, 10.0, 10.0])
    plain = bench.sample

    def sample(case: int, count: int) -> list[int]:
        return [round(value * (next(states) if case == 2 else 1)) for value in plain(case, count)]

    bench.sample = sample  # type: ignore[method-assign]
    sentinel, quiet, restless = collect(bench, 3, replace(QUICK, target_half_width=0.004))
    assert len(quiet.samples_ns) < len(restless.samples_ns) == len(sentinel.samples_ns)


def test_rounds_are_numbered_on_from_the_previous_start() -> None:
    (trace,) = collect(ScriptedBench([10.0]), 1, QUICK, first_round=40)
    assert (trace.rounds[0], trace.rounds[-1]) == (40, 44)

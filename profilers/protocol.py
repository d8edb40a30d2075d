"""How a measurement is taken: a `Protocol` of numbers, and the loop that follows it.

A *case* is one model under one workload. Cases are measured in turns, in *rounds* of some samples of each, so that all
of them meet the same machine. The *sentinel* is the case that tells whether the machine drifts. A *fresh start* is a
measurement in a new process.

The loop knows only a `Bench`, and no clock or process, so that tests can drive it with scripted noise.
"""

import math
import random
import statistics
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from dilap.core.measurement import Status, median_interval


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """The numbers that a measurement follows: warm-up, rounds of some samples of every open case, a rule to stop.

    A case is settled when half the width of its median's 95 % interval, relative to the median, is at most
    `target_half_width`. In its turn a case is run untimed for `lead_in_seconds`, until the caches hold what they hold
    in use, and then timed as often as fits into `turn_seconds`, but 3 times at least and `samples_per_turn` times at
    most. A round is dropped and repeated when the sentinel left its running median by more than `drift_tolerance` or
    the device throttled, or when other processes used more than `contention_share` of a core meanwhile. Drift and
    throttling are followed by a rest, twice as long every time, and a short warm-up. A machine that still drifts after
    `max_back_offs` rests in a row has changed its speed, and measuring starts over. Cases that are measured `together`,
    to be compared with one another, share all rounds; two cases always do.
    """

    target_half_width: float = 0.01
    min_rounds: int = 5
    max_rounds: int = 66
    max_seconds: float = 10.0
    lead_in_seconds: float = 0.5
    turn_seconds: float = 0.25
    samples_per_turn: int = 10
    warm_up_samples: int = 5
    warm_up_seconds: float = 0.5
    warm_up_cap_seconds: float = 5.0
    warm_up_tolerance: float = 0.02
    drift_tolerance: float = 0.03
    back_off_seconds: float = 1.0
    max_back_offs: int = 2
    contention_share: float = 0.05
    contention_pause_seconds: float = 1.0
    max_repeats: int = 10
    fresh_starts: int = 1
    together: bool = False
    seed: int = 0

    @property
    def rest_seconds(self) -> float:
        """Seconds of one whole series of rests; so much may be rested in addition to `max_seconds`."""
        return float(self.back_off_seconds * (2**self.max_back_offs - 1))

    @property
    def of_one_start(self) -> "Protocol":
        """The protocol for one of the fresh starts, such that all of them together reach the target."""
        return replace(
            self,
            target_half_width=self.target_half_width * math.sqrt(self.fresh_starts),
            max_rounds=max(self.min_rounds, self.max_rounds // self.fresh_starts),
            max_seconds=self.max_seconds / self.fresh_starts,
        )


_LEAST_SAMPLES = 3  # of one turn, so that its median is not an outlier
# Why there is a lead-in: whoever generates a text runs one model on and on. On a processor with 480 MB of cache a file
# of 107 MB took 10.8 ms a token right after another model's turn, 9 ms after 0.1 s and 7.5 ms after 0.5 s, as alone; a
# pruned one of 93 MB took 6.5 ms and 3.5 ms. Their ratio over fresh starts was 0.41 to 0.48 after 0.2 s, and 0.453 to
# 0.456 after 0.5 s.
TABLE = Protocol()
# Why 8 starts: the interval is computed from what differs between them (intervals.py). By Student's t, half its width
# is 2.48 standard deviations of the starts with 3 of them, 0.84 with 8 and 0.72 with 10: 2.3 %, 0.8 % and 0.7 %
# of a paired ratio on the machine named there. A start has at least 3 rounds, and takes at most 5 s a case.
FINAL = Protocol(target_half_width=0.005, min_rounds=3, max_rounds=264, max_seconds=40.0, fresh_starts=8, together=True)


class Bench(typing.Protocol):
    """What the loop measures with: samples, a clock, and signs of trouble."""

    def sample(self, case: int, count: int) -> Sequence[int]:
        """Time a case `count` times and return the nanoseconds."""

    def other_load(self) -> float:
        """Return how many cores other processes used while we sampled since the last call."""

    def throttles(self) -> bool:
        """Return whether the device says that it slowed itself down since the last call."""

    def now(self) -> float:
        """Return the seconds of a clock that only moves forward."""

    def sleep(self, seconds: float) -> None:
        """Let the machine rest."""


@dataclass(frozen=True, kw_only=True)
class Trace:
    """What the loop recorded of one case; `status` and `note` tell what happened meanwhile."""

    samples_ns: tuple[int, ...]
    rounds: tuple[int, ...]
    dropped_ns: tuple[int, ...]
    status: Status
    note: str


OnRound = Callable[[int, int], None]  # the round, the number of cases that are settled


def collect(
    bench: Bench,
    num_cases: int,
    protocol: Protocol,
    *,
    sentinel: int = 0,
    first_round: int = 0,
    on_round: OnRound | None = None,
) -> list[Trace]:
    """Measure all cases, interleaved, and return a trace of each.

    Cases that are measured together go on until all are settled, and their order is reversed after each round (ABBA),
    so that a drift affects all alike.
    """
    run = _Run(bench, num_cases, protocol, sentinel=sentinel, first_round=first_round)
    for case in range(num_cases):
        run.warm_up_(case)
    bench.other_load()  # what happened during warm-up is no reason to drop a round
    deadline = bench.now() + protocol.max_seconds * num_cases
    while cases := run.order():
        run.round_(cases)
        if on_round is not None:
            on_round(run.round_number, num_cases - len(run.unsettled()))
        if bench.now() - min(run.rested_seconds, protocol.rest_seconds) >= deadline:
            break
    return run.traces()


class _Run:
    """The state of one `collect`."""

    def __init__(self, bench: Bench, num_cases: int, protocol: Protocol, *, sentinel: int, first_round: int) -> None:
        self._bench, self._protocol, self._sentinel = bench, protocol, sentinel
        self._kept: list[list[tuple[int, int]]] = [[] for _ in range(num_cases)]  # (round, nanoseconds)
        self._dropped: list[list[tuple[int, int]]] = [[] for _ in range(num_cases)]
        self._num_samples = [_LEAST_SAMPLES] * num_cases  # of one turn
        self._unsettled_warm_ups: set[int] = set()
        self._sentinel_medians: list[float] = []
        self._strays: list[float] = []  # the sentinel's medians in the drifting rounds since the last good one
        self._shuffle = random.Random(protocol.seed + first_round)
        self._repeats = 0  # contended rounds in a row
        self._contended = False
        self._became_slower = False
        self._incomplete = False
        self.rested_seconds = 0.0
        self.round_number = first_round

    def warm_up_(self, case: int) -> None:
        protocol, start = self._protocol, self._bench.now()
        size = protocol.warm_up_samples
        windows = [statistics.median(self._bench.sample(case, size))]
        while True:
            windows.append(statistics.median(self._bench.sample(case, size)))
            elapsed = self._bench.now() - start
            fitting = int(protocol.turn_seconds * 1e9 / windows[-1])
            self._num_samples[case] = max(_LEAST_SAMPLES, min(fitting, protocol.samples_per_turn))
            settled = abs(windows[-1] / windows[-2] - 1) < protocol.warm_up_tolerance
            if settled and elapsed >= protocol.warm_up_seconds:
                return
            if elapsed >= protocol.warm_up_cap_seconds:
                self._unsettled_warm_ups.add(case)
                return

    def unsettled(self) -> list[int]:
        """Return the cases that still need samples."""
        return [case for case in range(len(self._kept)) if not self._is_settled(case)]

    def _is_settled(self, case: int) -> bool:
        count = self._num_rounds(case)
        if count < self._protocol.min_rounds:
            return False
        return count >= self._protocol.max_rounds or self._half_width(case) <= self._protocol.target_half_width

    def _num_rounds(self, case: int) -> int:
        return len({number for number, _ in self._kept[case]})

    def _half_width(self, case: int) -> float:
        return median_interval([sample for _, sample in self._kept[case]]).half_width

    def order(self) -> list[int]:
        """Return the cases of the next round in their order; none when all are settled."""
        cases = self.unsettled()
        if not cases:
            return []
        if self._protocol.together or len(self._kept) == 2:
            everyone = list(range(len(self._kept)))
            return everyone if self.round_number % 2 == 0 else everyone[::-1]
        cases = sorted({self._sentinel, *cases})
        self._shuffle.shuffle(cases)
        return cases

    def round_(self, cases: Sequence[int]) -> None:
        taken = {case: self._bench.sample(case, self._num_samples[case]) for case in cases}
        pause = self._pause(statistics.median(taken[self._sentinel]))
        for case, samples in taken.items():
            store = self._kept if pause == 0 else self._dropped
            store[case].extend((self.round_number, sample) for sample in samples)
        if pause:
            self._rest_(pause, cases)
        self.round_number += 1

    def _rest_(self, seconds: float, cases: Sequence[int]) -> None:
        """Sleep, and warm up again, because the first samples after a rest are slow."""
        # After a second of rest they took 15 % longer, which looked like drift and led to the next rest.
        self._bench.sleep(seconds)
        self.rested_seconds += seconds
        for case in cases:
            self._bench.sample(case, self._protocol.warm_up_samples)
        self._bench.other_load()  # what happened meanwhile is no reason to drop a round

    def _pause(self, sentinel_median: float) -> float:
        """Return how many seconds to rest because the round just taken is dropped; 0 to keep it."""
        protocol = self._protocol
        if self._bench.other_load() > protocol.contention_share:
            if self._repeats < protocol.max_repeats:
                self._repeats += 1
                return protocol.contention_pause_seconds
            self._contended = True  # it does not clear: measure on, and say so; resting would not help
            return 0.0
        self._repeats = 0
        throttles = self._bench.throttles()
        if throttles or self._drifts(sentinel_median):
            self._strays.append(sentinel_median)
            if len(self._strays) > protocol.max_back_offs:
                self._start_over_(throttles=throttles)
                return 0.0
            return float(protocol.back_off_seconds * 2 ** (len(self._strays) - 1))
        self._strays.clear()
        self._sentinel_medians.append(sentinel_median)
        return 0.0

    def _start_over_(self, *, throttles: bool) -> None:
        self._became_slower = throttles or statistics.median(self._strays) > statistics.median(self._sentinel_medians)
        for kept, dropped in zip(self._kept, self._dropped, strict=True):
            dropped.extend(kept)
            kept.clear()
        self._sentinel_medians, self._strays = self._strays, []

    def _drifts(self, sentinel_median: float) -> bool:
        history = self._sentinel_medians
        if len(history) < 3:
            return False
        middle = statistics.median(history)
        # three sigmas of the sentinel's own rounds: on a noisy machine 3 % happens without any drift
        noise = 3 * 1.4826 * statistics.median(abs(value - middle) for value in history)
        return abs(sentinel_median - middle) > max(self._protocol.drift_tolerance * middle, noise)

    def traces(self) -> list[Trace]:
        if not all(self._kept):  # time ran out: flagged numbers are better than none
            self._incomplete = True
            self._contended = self._contended or self._repeats > 0
            self._keep_all_()
        return [self._trace(case) for case in range(len(self._kept))]

    def _keep_all_(self) -> None:
        """Keep the dropped rounds too, those of every case, so that the cases still share rounds."""
        for kept, dropped in zip(self._kept, self._dropped, strict=True):
            kept[:] = sorted(dropped + kept, key=lambda taken: taken[0])
            dropped.clear()

    def _trace(self, case: int) -> Trace:
        kept, dropped = self._kept[case], self._dropped[case]
        status, note = self._course(case)
        return Trace(
            samples_ns=tuple(sample for _, sample in kept),
            rounds=tuple(number for number, _ in kept),
            dropped_ns=tuple(sample for _, sample in dropped),
            status=status,
            note=note,
        )

    def _course(self, case: int) -> tuple[Status, str]:
        """Return the status of a case, and what happened meanwhile that a reader must know."""
        if self._contended:
            return "contended", "other processes kept using the cores; stop them, or use fewer threads, and repeat"
        protocol, count = self._protocol, self._num_rounds(case)
        complaints = (
            (self._incomplete, "time ran out before every case had a good round; let the device cool and repeat"),
            (self._became_slower, "the device throttled or became slower, and stayed so; let it cool and repeat"),
            (count < protocol.min_rounds, f"time ran out after {count} of at least {protocol.min_rounds} rounds"),
            (case in self._unsettled_warm_ups, f"not settled after {protocol.warm_up_cap_seconds:g} s of warm-up"),
        )
        for applies, note in complaints:
            if applies:
                return "noisy", note
        return "ok", ""


def judge(traces: Sequence[Trace], protocol: Protocol, *, half_width: float | None = None) -> tuple[Status, str]:
    """Return the status and note of a case from the traces of all its fresh starts.

    They tell the worst that happened in a start, or else whether there are too many outliers or too wide an interval.
    `half_width` is that of the interval over the starts, or None with one start: its samples are then taken as
    independent, as in the loop.
    """
    for status in ("contended", "noisy"):
        for trace in traces:
            if trace.status == status:
                return trace.status, trace.note
    count = sum(len(trace.samples_ns) for trace in traces)
    share = sum(outlier_share(trace.samples_ns) * len(trace.samples_ns) for trace in traces) / count
    if share > 0.05:
        return "noisy", f"{share:.0%} of the samples are outliers; look for periodic work on the device"
    target = protocol.target_half_width
    if half_width is None:
        width = median_interval(traces[0].samples_ns).half_width
        if width > target:
            return "noisy", f"the median is known to {width:.2%} only, {target:.2%} was asked"
    elif half_width > 2 * target:
        return "noisy", f"fresh starts disagree: together the median is known to {half_width:.1%} only"
    return "ok", ""


def outlier_share(samples: Sequence[float]) -> float:
    """Return the share of samples that are more than five robust sigmas above the median."""
    middle = statistics.median(samples)
    sigma = 1.4826 * statistics.median(abs(sample - middle) for sample in samples)
    return sum(sample > middle + 5 * sigma for sample in samples) / len(samples)

"""The one interface that measures, for latency tables and for final claims alike."""

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

from dilap.core.artifact import Artifact
from dilap.core.codec import decode, file_sha256, read_json
from dilap.core.errors import Mismatch
from dilap.core.measurement import DeviceState, Fingerprint, Interval, Measurement
from dilap.core.workload import Budget, Statistic, Workload
from dilap.profilers import intervals
from dilap.profilers.devices.device import Device
from dilap.profilers.devices.preflight import WAIT_SECONDS, require_fit, settled_state
from dilap.profilers.instruments.agent import InstrumentBench, Loaded
from dilap.profilers.protocol import OnRound, Protocol, Trace, collect, judge

Progress = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class MemoryTaken:
    """Memory that a model takes while it runs; None where the device does not show it."""

    average_bytes: int | None
    peak_bytes: int | None


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model file under a workload."""

    path: Path
    workload: Workload


class Profiler:
    """Measures with one runtime on one device; every `measure` starts the agent afresh.

    It refuses a device in an unfit state, unless told to `force` it; then the measurements say so.
    """

    def __init__(self, device: Device, *, backend: str, force: bool = False) -> None:
        self._device, self._force = device, force
        self.backend = backend
        self._fingerprint: Fingerprint | None = None

    def fingerprint(self) -> Fingerprint:
        """Return the fingerprint of the device and its runtime; the device is asked only once."""
        if self._fingerprint is None:
            with closing(self._device.open(self.backend)) as instrument:
                self._fingerprint = instrument.fingerprint
        return self._fingerprint

    def measure(
        self, cases: Sequence[Case], protocol: Protocol, *, progress: Progress | None = None
    ) -> list[Measurement]:
        """Measure all cases interleaved, the first one as the sentinel for drift, and return one Measurement per case.

        Raises Unfit where the device is in an unfit state, and Mismatch where it changes between two starts.
        """
        contents = [_content(case.path) for case in cases]
        started = datetime.now(timezone.utc).isoformat(timespec="seconds")
        starts: list[_Start] = []
        for number in range(protocol.fresh_starts):
            prefix = f"start {number + 1} of {protocol.fresh_starts}, " if protocol.fresh_starts > 1 else ""
            first_round = 1 + max((max(trace.rounds) for one in starts for trace in one.traces), default=-1)

            def on_round(round_number: int, num_settled: int, prefix: str = prefix) -> None:
                if progress is not None:
                    progress(f"{prefix}round {round_number}: {num_settled} of {len(cases)} settled")

            starts.append(
                self._measure_once(
                    cases, contents, protocol, first_round=first_round, on_round=on_round, progress=progress
                )
            )
            if differences := starts[0].fingerprint.differences(starts[-1].fingerprint):
                raise Mismatch(f"the device changed between two starts: {'; '.join(differences)}")
        found = [
            _measurement(
                starts,
                index,
                artifact_sha256=contents[index].sha256,
                workload=case.workload,
                started=started,
                protocol=protocol,
            )
            for index, case in enumerate(cases)
        ]
        return [self._overridden(one) for one in found] if self._force else found

    @staticmethod
    def _overridden(measurement: Measurement) -> Measurement:
        """Mark other load that came during the measurement as forced, like load that was there before it."""
        if measurement.status != "contended":
            return measurement
        return dataclasses.replace(measurement, forced=(*measurement.forced, "other processes kept using the cores"))

    def memory(self, case: Case, *, runs: int = 50) -> MemoryTaken:
        """Return the memory that a model adds to a process of its own.

        A Measurement's peak is another number: its process holds other models, whose freed memory is used again.
        """
        with closing(self._device.open(self.backend)) as instrument:
            loaded = instrument.load(case.path, workload=case.workload, **asdict(_content(case.path)))
            average = instrument.average_memory(loaded.handle, runs)
        return MemoryTaken(
            average_bytes=average or None, peak_bytes=max(loaded.peak_memory_bytes, average or 0) or None
        )

    def try_once(self, case: Case) -> None:
        """Load a model and run it once, untimed. Raises what the runtime refuses, and Crashed where it dies."""
        with closing(self._device.open(self.backend)) as instrument:
            instrument.load(case.path, workload=case.workload, **asdict(_content(case.path)))

    def divergence(self, path: Path, workload: Workload, other: Workload, tokens: Sequence[int]) -> float | None:
        """Return the mean KL, in nats per token, of a model under `other` from the same model under `workload`.

        It is None where the device does not show logits.
        """
        content = asdict(_content(path))
        with closing(self._device.open(self.backend)) as instrument:
            plain, changed = (instrument.load(path, workload=one, **content).handle for one in (workload, other))
            return instrument.divergence(plain, changed, tokens)

    def _measure_once(
        self,
        cases: Sequence[Case],
        contents: Sequence["_Content"],
        protocol: Protocol,
        *,
        first_round: int,
        on_round: OnRound,
        progress: Progress | None,
    ) -> "_Start":
        with closing(self._device.open(self.backend)) as instrument:
            threads = cases[0].workload.threads
            before = settled_state(
                instrument.state,
                self._device,
                threads=threads,
                seconds=0 if self._force else WAIT_SECONDS,
                tell=progress,
            )
            forced = require_fit(before, self._device, threads=threads, force=self._force)
            loaded = [
                instrument.load(case.path, workload=case.workload, **asdict(content))
                for case, content in zip(cases, contents, strict=True)
            ]
            handles = [one.handle for one in loaded]
            bench = InstrumentBench(instrument, handles, lead_in_seconds=protocol.lead_in_seconds)
            traces = collect(bench, len(cases), protocol.of_one_start, first_round=first_round, on_round=on_round)
            return _Start(
                first_round=first_round,
                loaded=loaded,
                traces=traces,
                host_seconds=[bench.host_seconds(case) for case in range(len(cases))],
                fingerprint=instrument.fingerprint,
                states=(before, instrument.state()),
                forced=forced,
            )


@dataclass(frozen=True, kw_only=True)
class _Content:
    """The SHA-256 that a model's file must have wherever it is loaded, and those of the files beside it."""

    sha256: str
    companions: dict[str, str]


def _content(path: Path) -> _Content:
    """Return the SHA-256 of the file as it is now, and those of its companions as its sidecar, if any, says."""
    sidecar = path.with_name("artifact.json")
    companions: dict[str, str] = {}
    if sidecar.exists():
        artifact = decode(Artifact, read_json(sidecar), source=str(sidecar))
        companions = artifact.companions if artifact.path == path.name else {}
    return _Content(sha256=file_sha256(path), companions=companions)


@dataclass(frozen=True, kw_only=True)
class _Start:
    """One fresh process's results, case by case."""

    first_round: int
    loaded: list[Loaded]
    traces: list[Trace]
    host_seconds: list[float | None]
    fingerprint: Fingerprint
    states: tuple[DeviceState, ...]
    forced: tuple[str, ...]


def _measurement(
    starts: Sequence[_Start],
    case: int,
    *,
    artifact_sha256: str,
    workload: Workload,
    started: str,
    protocol: Protocol,
) -> Measurement:
    loaded = [start.loaded[case] for start in starts]
    traces = [start.traces[case] for start in starts]
    samples = tuple(sample for trace in traces for sample in trace.samples_ns)
    host_seconds = [start.host_seconds[case] for start in starts]
    found = Measurement(
        artifact_sha256=artifact_sha256,
        workload=workload,
        fingerprint=starts[0].fingerprint,
        samples_ns=samples,
        rounds=tuple(number for trace in traces for number in trace.rounds),
        peak_memory_bytes=max(one.peak_memory_bytes for one in loaded),
        load_seconds=statistics.median(one.load_seconds for one in loaded),
        started=started,
        status="ok",
        dropped_ns=tuple(sample for trace in traces for sample in trace.dropped_ns),
        host_seconds=statistics.median(known) if (known := [one for one in host_seconds if one is not None]) else None,
        states=tuple(state for start in starts for state in start.states),
        forced=tuple(dict.fromkeys(reason for start in starts for reason in start.forced)),
        first_rounds=tuple(start.first_round for start in starts),
    )
    half_width = intervals.latency(found).half_width if len(starts) > 1 else None
    status, note = judge(traces, protocol, half_width=half_width)
    return dataclasses.replace(found, status=status, note=note)


def speedup(dense: Measurement, pruned: Measurement, statistic: Statistic = "p50") -> Interval:
    """Return how many times faster `pruned` is than `dense`, paired by rounds.

    Raises Mismatch for measurements that were not taken together.
    """
    if dense.workload != pruned.workload:
        raise Mismatch(f"speed-up between two workloads: {dense.workload.describe()} / {pruned.workload.describe()}")
    if differences := dense.fingerprint.differences(pruned.fingerprint):
        raise Mismatch(f"speed-up between two devices: {'; '.join(differences)}")
    if not set(dense.rounds) & set(pruned.rounds):
        raise Mismatch("the two measurements share no round: measure both with one call of Profiler.measure")
    return intervals.ratio(dense, pruned, statistic)


def budget_share(budget: Budget, dense: Measurement, pruned: Measurement) -> Interval:
    """Return the share of the budget that `pruned` uses; above 1, the budget is not kept."""
    if budget.fraction is not None:
        # The paired ratio, because the machine's drift cancels in it: on one shared machine the medians of the same run
        # said 70.1 % of dense where the rounds said 67.7 %.
        found = speedup(dense, pruned, budget.statistic)
        value, low, high = (1 / (one * budget.fraction) for one in (found.value, found.high, found.low))
    else:
        seconds = intervals.latency(pruned, budget.statistic)
        limit = budget.limit_seconds(dense_seconds=0.0)
        value, low, high = (one / limit for one in (seconds.value, seconds.low, seconds.high))
    return Interval(value=value, low=low, high=high)


def is_shown(interval: Interval) -> bool:
    """Return whether the interval of a speed-up excludes 1."""
    return not interval.low <= 1 <= interval.high


def round_medians(measurement: Measurement) -> dict[int, float]:
    """Return the median of every round, in nanoseconds."""
    return {number: statistics.median(taken) for number, taken in intervals.samples_by_round(measurement).items()}

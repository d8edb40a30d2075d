"""The one interface that measures, for latency tables and for final claims alike."""

import dataclasses
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

import numpy as np

from dilap.codec import decode, file_sha256, read_json
from dilap.errors import Mismatch
from dilap.profilers.client import AgentBench, AgentClient, Loaded
from dilap.profilers.devices import Device
from dilap.profilers.protocol import OnRound, Protocol, Trace, collect, outlier_share
from dilap.types import Artifact, Budget, Fingerprint, Interval, Measurement, Status, Workload, median_interval

Progress = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model file under a workload."""

    path: Path
    workload: Workload


class Profiler:
    """Measures with one runtime on one device; every `measure` starts the agent afresh."""

    def __init__(self, device: Device, *, backend: str) -> None:
        self._device, self._backend = device, backend

    def fingerprint(self) -> Fingerprint:
        with AgentClient(self._device.connect(), backend=self._backend, device=self._device.name) as agent:
            return agent.fingerprint

    def measure(
        self, cases: Sequence[Case], protocol: Protocol, *, progress: Progress | None = None
    ) -> list[Measurement]:
        """Measure all cases interleaved, the first being the sentinel for drift; one Measurement a case."""
        contents = [_content(case.path) for case in cases]
        started = datetime.now(timezone.utc).isoformat(timespec="seconds")
        starts: list[_Start] = []
        for number in range(protocol.fresh_starts):
            prefix = f"start {number + 1} of {protocol.fresh_starts}, " if protocol.fresh_starts > 1 else ""
            first_round = 1 + max((max(trace.rounds) for one in starts for trace in one.traces), default=-1)

            def on_round(round_number: int, num_settled: int, prefix: str = prefix) -> None:
                if progress is not None:
                    progress(f"{prefix}round {round_number}: {num_settled} of {len(cases)} settled")

            starts.append(self._measure_once(cases, contents, protocol, first_round=first_round, on_round=on_round))
            if differences := starts[0].fingerprint.differences(starts[-1].fingerprint):
                raise Mismatch(f"the device changed between two starts: {'; '.join(differences)}")
        return [
            _measurement(
                [(start.loaded[index], start.traces[index]) for start in starts],
                artifact_sha256=contents[index].sha256,
                workload=case.workload,
                fingerprint=starts[0].fingerprint,
                started=started,
                protocol=protocol,
            )
            for index, case in enumerate(cases)
        ]

    def average_memory(self, case: Case, *, runs: int = 50) -> int:
        """Bytes that a model adds to a fresh process while it runs, on average; its peak is in a Measurement."""
        content, transport = asdict(_content(case.path)), self._device.connect()
        with AgentClient(transport, backend=self._backend, device=self._device.name) as agent:
            loaded = agent.load(transport.push(case.path, **content), workload=case.workload, **content)
            return int(agent.call("watch_memory", handle=loaded.handle, n=runs)["average_bytes"])

    def _measure_once(
        self,
        cases: Sequence[Case],
        contents: Sequence["_Content"],
        protocol: Protocol,
        *,
        first_round: int,
        on_round: OnRound,
    ) -> "_Start":
        transport = self._device.connect()
        with AgentClient(transport, backend=self._backend, device=self._device.name) as agent:
            loaded = []
            for case, content in zip(cases, contents, strict=True):
                files = asdict(content)
                loaded.append(agent.load(transport.push(case.path, **files), workload=case.workload, **files))
            bench = AgentBench(agent, [one.handle for one in loaded])
            share = _share_of_one_start(protocol)
            traces = collect(bench, len(cases), share, first_round=first_round, on_round=on_round)
            return _Start(loaded=loaded, traces=traces, fingerprint=agent.fingerprint)


@dataclass(frozen=True, kw_only=True)
class _Content:
    """What a model's files must hold wherever they are loaded."""

    sha256: str
    companions: dict[str, str]


def _content(path: Path) -> _Content:
    """Of the file as it is now, and of those beside it as its sidecar, where it has one, says."""
    sidecar = path.with_name("artifact.json")
    companions: dict[str, str] = {}
    if sidecar.exists():
        artifact = decode(Artifact, read_json(sidecar), source=str(sidecar))
        companions = artifact.companions if artifact.path == path.name else {}
    return _Content(sha256=file_sha256(path), companions=companions)


@dataclass(frozen=True, kw_only=True)
class _Start:
    """One fresh process's results, case by case."""

    loaded: list[Loaded]
    traces: list[Trace]
    fingerprint: Fingerprint


def _share_of_one_start(protocol: Protocol) -> Protocol:
    """The effort of one of several starts, so that all of them together reach the protocol's target."""
    starts = protocol.fresh_starts
    return dataclasses.replace(
        protocol,
        target_half_width=protocol.target_half_width * math.sqrt(starts),
        max_samples=max(protocol.min_samples, protocol.max_samples // starts),
        max_seconds=protocol.max_seconds / starts,
    )


def _measurement(
    parts: Sequence[tuple[Loaded, Trace]],
    *,
    artifact_sha256: str,
    workload: Workload,
    fingerprint: Fingerprint,
    started: str,
    protocol: Protocol,
) -> Measurement:
    traces = [trace for _, trace in parts]
    samples = tuple(sample for trace in traces for sample in trace.samples_ns)
    status, note = _pooled_status(traces, samples, protocol)
    return Measurement(
        artifact_sha256=artifact_sha256,
        workload=workload,
        fingerprint=fingerprint,
        samples_ns=samples,
        rounds=tuple(number for trace in traces for number in trace.rounds),
        peak_memory_bytes=max(loaded.peak_memory_bytes for loaded, _ in parts),
        load_seconds=statistics.median(loaded.load_seconds for loaded, _ in parts),
        started=started,
        status=status,
        note=note,
        dropped_ns=tuple(sample for trace in traces for sample in trace.dropped_ns),
    )


def _pooled_status(traces: Sequence[Trace], samples: Sequence[int], protocol: Protocol) -> tuple[Status, str]:
    """The worst start's status, and whether the starts agree with one another."""
    for status in ("contended", "noisy"):
        for trace in traces:
            if trace.status == status:
                return trace.status, trace.note
    width = median_interval(samples).half_width
    if len(traces) > 1 and (width > 2 * protocol.target_half_width or outlier_share(samples) > 0.05):
        return "noisy", f"fresh starts disagree: together the median is known to {width:.1%} only"
    return "ok", ""


def speedup(dense: Measurement, pruned: Measurement, *, seed: int = 0) -> Interval:
    """How many times faster `pruned` is: the median over rounds of paired ratios.

    The interval comes from 2000 bootstrap samples of rounds, not of samples, which are correlated within one.
    Raises Mismatch for measurements that were not taken together.
    """
    if dense.workload != pruned.workload:
        raise Mismatch(f"speed-up between two workloads: {dense.workload.describe()} / {pruned.workload.describe()}")
    if differences := dense.fingerprint.differences(pruned.fingerprint):
        raise Mismatch(f"speed-up between two devices: {'; '.join(differences)}")
    by_round = [round_medians(measurement) for measurement in (dense, pruned)]
    shared = sorted(set(by_round[0]) & set(by_round[1]))
    if not shared:
        raise Mismatch("the two measurements share no round: measure both with one call of Profiler.measure")
    ratios = np.array([by_round[0][number] / by_round[1][number] for number in shared])
    draws = np.random.default_rng(seed).integers(len(ratios), size=(2000, len(ratios)))
    low, high = np.quantile(np.median(ratios[draws], axis=1), [0.025, 0.975])
    return Interval(value=float(np.median(ratios)), low=float(low), high=float(high))


def budget_share(budget: Budget, dense: Measurement, pruned: Measurement) -> float:
    """The share of the budget that `pruned` uses.

    A budget relative to the dense median is judged on the paired ratio, from which the day's drift cancels; on one
    shared machine the medians of the same run said 70.1 % of dense where the rounds said 67.7 %.
    """
    if budget.fraction is not None and budget.statistic == "p50":
        return 1 / (speedup(dense, pruned).value * budget.fraction)
    limit = budget.limit_seconds(dense_seconds=dense.seconds(budget.statistic))
    return pruned.seconds(budget.statistic) / limit


def is_shown(interval: Interval) -> bool:
    """Whether the interval of a speed-up excludes 1."""
    return not interval.low <= 1 <= interval.high


def round_medians(measurement: Measurement) -> dict[int, float]:
    """Nanoseconds by round."""
    rounds: dict[int, list[int]] = {}
    for number, sample in zip(measurement.rounds, measurement.samples_ns, strict=True):
        rounds.setdefault(number, []).append(sample)
    return {number: statistics.median(samples) for number, samples in rounds.items()}

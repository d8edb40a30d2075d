"""Measurements of latency: the samples, the device they come from, and the state that it was in."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal

from dilap.core.workload import FRACTIONS, Statistic, Workload

Status = Literal["ok", "noisy", "contended", "estimated"]


@dataclass(frozen=True, kw_only=True)
class Fingerprint:
    """The device and runtime on which a number was measured.

    A latency table is used only where all fields agree; those in `soft` may differ.
    """

    device: str
    machine: str
    processor: str
    num_cores: int
    memory_bytes: int
    last_level_cache_bytes: int
    power_mode: str
    runtime: str
    runtime_version: str
    runtime_build: str
    serial_sha256: str = ""
    soft: dict[str, str] = field(default_factory=dict)

    def differences(self, other: "Fingerprint") -> list[str]:
        """Return the fields that differ, `soft` left out, as `field: mine / theirs`."""
        mine, theirs = asdict(self), asdict(other)
        return [f"{key}: {mine[key]} / {theirs[key]}" for key in mine if key != "soft" and mine[key] != theirs[key]]


@dataclass(frozen=True, kw_only=True)
class DeviceState:
    """What a device reported about itself at one moment; None, empty or "unknown" where it reports nothing.

    `clocks_khz` and `temperatures_celsius` use the kernel's names; `pinned_khz` has the clocks that are held at one
    value. `throttle_events` is a counter that only rises (over-current on a Jetson, thermal throttling on x86).
    `thermal_status` is Android's, from 0 (none) to 6 (shutdown). `emulated` says that Python is built for another kind
    of processor and runs in an emulator.
    """

    power_mode: str = "unknown"
    governor: str = "unknown"
    num_cores: int | None = None
    affinity: str = "unknown"
    clocks_khz: dict[str, int] = field(default_factory=dict)
    pinned_khz: dict[str, int] = field(default_factory=dict)
    temperatures_celsius: dict[str, float] = field(default_factory=dict)
    throttle_events: int | None = None
    thermal_status: int | None = None
    ac_power: bool | None = None
    battery_percent: float | None = None
    load: float | None = None
    emulated: bool | None = None

    @property
    def hottest_celsius(self) -> float | None:
        return max(self.temperatures_celsius.values(), default=None)

    def slow_clocks(self, pinned_khz: Mapping[str, int]) -> list[str]:
        """Return the clocks below 97 % of what they are pinned to: the device throttles them."""
        return [name for name, khz in pinned_khz.items() if self.clocks_khz.get(name, khz) < 0.97 * khz]


@dataclass(frozen=True, kw_only=True)
class Interval:
    """An estimate with its 95 % confidence interval."""

    value: float
    low: float
    high: float

    def __post_init__(self) -> None:
        if self.low > self.high:
            raise ValueError(f"an interval from {self.low} to {self.high}")

    @property
    def half_width(self) -> float:
        """Half the interval's width, as a share of the value."""
        return (self.high - self.low) / 2 / self.value


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Raw samples of one artifact under one workload; statistics are computed from them when they are read.

    `rounds` gives the round of every sample: in a round all artifacts are measured in turn, so that the samples of two
    measurements can be paired. `status` is `ok`, `noisy` (too many outliers or a wide interval), `contended` (other
    load on the cores, or a device that ran slower than before) or `estimated` (nothing was measured; a model of the
    device gave the number). `dropped_ns` keeps the samples of rounds that were left out because of drift or other load.
    `host_seconds` is the median time of a run as the host saw it, launch and wait included, where the samples are a
    GPU's own times. `states` are the device's, before and after every fresh start; `forced` says what made it unfit and
    was overridden. `peak_memory_bytes` is None for an estimate, whose `range_ns` says what it may be at best and at
    worst. `first_rounds` are the first rounds of the fresh starts; measurements of earlier versions have none and are
    read as those of one start.
    """

    artifact_sha256: str
    workload: Workload
    fingerprint: Fingerprint
    samples_ns: tuple[int, ...]
    rounds: tuple[int, ...]
    peak_memory_bytes: int | None
    load_seconds: float
    started: str
    status: Status
    note: str = ""
    dropped_ns: tuple[int, ...] = ()
    host_seconds: float | None = None
    states: tuple[DeviceState, ...] = ()
    forced: tuple[str, ...] = ()
    first_rounds: tuple[int, ...] = ()
    range_ns: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.range_ns is not None and not 0 < self.range_ns[0] <= self.range_ns[1]:
            raise ValueError(f"an estimate lies between two times, got {self.range_ns}")
        if not self.samples_ns or min((*self.samples_ns, *self.dropped_ns)) <= 0:
            raise ValueError("a measurement needs samples, all positive")
        if min(self.rounds, default=0) < 0 or min(self.peak_memory_bytes or 0, self.load_seconds) < 0:
            raise ValueError("a measurement has no negative rounds, bytes or seconds")
        if len(self.rounds) != len(self.samples_ns):
            raise ValueError("every sample needs its round")

    @property
    def words(self) -> str:
        """Words to show with the number: the status, and `forced` where the device was unfit; `ok` if all is well."""
        status = "" if self.status == "ok" else self.status
        return ", ".join(filter(None, [status, "forced" if self.forced else ""])) or "ok"

    @property
    def mark(self) -> str:
        """Remark to put behind the number, like ` (noisy)`; empty where all is well."""
        return "" if self.words == "ok" else f" ({self.words})"

    @property
    def caveats(self) -> tuple[str, ...]:
        """Sentences, with the reasons, that a reader has to know about the measurement."""
        reason = f": {self.note}" if self.note else ""
        status = () if self.status == "ok" else (f"measurement is {self.status}{reason}",)
        if self.status == "estimated":
            status = (f"latency is estimated{reason}",)
        if not self.forced:
            return status
        return (*status, f"measurement was taken in an unfit state (--force): {'; '.join(self.forced)}")

    def seconds(self, statistic: Statistic = "p50") -> float:
        return quantile(self.samples_ns, FRACTIONS[statistic]) / 1e9


def median_interval(values: Sequence[float]) -> Interval:
    """Return the median with its 95 % interval from order statistics, which assumes no distribution.

    The interval is right only for independent values; intervals of results come from `dilap.profilers.intervals`.
    """
    ordered = sorted(values)
    count = len(ordered)
    spread = 1.96 * math.sqrt(count) / 2  # normal approximation to the binomial of ranks
    low = max(0, math.floor((count - 1) / 2 - spread))
    high = min(count - 1, math.ceil((count - 1) / 2 + spread))
    return Interval(value=statistics.median(ordered), low=ordered[low], high=ordered[high])


def quantile(values: Sequence[float], fraction: float) -> float:
    """Return the quantile at `fraction` (0 to 1), interpolated linearly."""
    ordered = sorted(values)
    position = fraction * (len(ordered) - 1)
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)

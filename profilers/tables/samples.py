"""What every latency table has, whatever it is of: raw samples of probes, and the dense probe beside each of them."""

import abc
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from dilap.core.measurement import Interval, Status, median_interval, quantile
from dilap.core.workload import Statistic

_LONGEST_NS = 10**13  # three hours for one token, one prompt or one image: what is longer is no sample


@dataclass(frozen=True, kw_only=True)
class Samples(abc.ABC):
    """A measured probe: how long its runs took.

    `sentinel_ns` has, for every sample, the dense probe's median in the same round; `forced` says what made the device
    unfit and was overridden.
    """

    samples_ns: tuple[int, ...]
    sentinel_ns: tuple[int, ...]
    status: Status
    note: str = ""
    forced: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.samples_ns or len(self.sentinel_ns) != len(self.samples_ns):
            raise ValueError("an entry needs samples, and the sentinel of each")
        if not all(0 < one <= _LONGEST_NS for one in (*self.samples_ns, *self.sentinel_ns)):
            raise ValueError(f"a sample takes between 1 and {_LONGEST_NS} nanoseconds, and one here does not")
        if self.status == "estimated":
            raise ValueError("it is estimated, and a latency table holds what was measured")

    @property
    @abc.abstractmethod
    def key(self) -> tuple[object, ...]:
        """What tells the probe from others; its role, which says what it is for, comes first."""

    @property
    def is_fitted(self) -> bool:
        """Whether costs are fitted to it: not if other processes used the cores meanwhile, unless overridden."""
        return self.status != "contended" or bool(self.forced)

    @property
    def ratio(self) -> Interval:
        """How many times as long as the dense probe it took.

        Ratios are taken within rounds, because other load that outlasts a round slows the probe and the dense one
        alike.
        """
        ratios = [sample / sentinel for sample, sentinel in zip(self.samples_ns, self.sentinel_ns, strict=True)]
        return median_interval(ratios)


def sentinel_seconds(entries: Sequence[Samples]) -> float:
    """Return the median seconds of the dense probe beside all of the entries."""
    return statistics.median(statistics.median(entry.sentinel_ns) for entry in entries) / 1e9


def dense_seconds(entries: Sequence[Samples], statistic: Statistic) -> float:
    """Return the seconds of the dense probe.

    What p90 adds to the median belongs to the machine and not to a width, so it is one factor: the entries' median.
    """
    seconds = sentinel_seconds(entries)
    if statistic == "p90":
        seconds *= statistics.median(
            quantile(entry.samples_ns, 0.9) / statistics.median(entry.samples_ns) for entry in entries
        )
    return seconds


def caveats_of(entries: Sequence[Samples]) -> tuple[str, ...]:
    """Return what a reader of costs must know of how the entries were measured."""
    found: list[str] = []
    for title, chosen in (
        ("left out, because other processes used the cores", [one for one in entries if not one.is_fitted]),
        ("noisy", [one for one in entries if one.status == "noisy"]),
    ):
        notes = [one.note for one in chosen if one.note and one.status == "noisy"]
        if chosen:
            example = f" ({notes[0]})" if notes else ""
            found.append(f"{len(chosen)} of the latency table's {len(entries)} probes are {title}{example}")
    if forced := [one for one in entries if one.forced]:
        reasons = "; ".join(dict.fromkeys(reason for one in forced for reason in one.forced))
        title = "measured in an unfit state (--force)"
        found.append(f"{len(forced)} of the latency table's {len(entries)} probes were {title}: {reasons}")
    return tuple(found)

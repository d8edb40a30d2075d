"""95 % confidence intervals of what was measured, from what differs between its independent parts.

The samples of one process are not independent, and neither are their rounds. Every start also has a level of its own.
So the parts are the fresh starts, each of which counts once, however many samples it has; Student's t makes up for
their small number. A measurement with one start is divided into blocks of rounds instead: its intervals are about this
start alone, and do not know how far its level is from that of others.
"""

# Seen on a two-core virtual machine (SmolLM2-135M, llama.cpp, f16, decode at context 256, dense and with narrower FFNs,
# 10 fresh starts of 50 rounds): ranks of samples in a row are correlated by 0.4 to 0.8, of the medians of rounds in a
# row by 0.2 to 0.9, of their paired ratios by 0.0 to 0.3. Medians of starts differ by 6.7 % (standard deviation; 5.9 %
# beyond the noise inside them), their paired ratios by 0.9 % (0.7 %).

import math
import statistics
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from dilap.core.measurement import Interval, quantile
from dilap.core.workload import FRACTIONS, Statistic

_BLOCKS = 8  # blocks of rounds in a row, where there is one start; as many as a final measurement has starts
_NORMAL = statistics.NormalDist()


class Sampled(Protocol):
    """What an interval is computed from: samples, the round of each, and the first round of every fresh start."""

    @property
    def samples_ns(self) -> Sequence[int]: ...
    @property
    def rounds(self) -> Sequence[int]: ...
    @property
    def first_rounds(self) -> Sequence[int]: ...


def latency(measurement: Sampled, statistic: Statistic = "p50") -> Interval:
    """Return the latency in seconds, by Woodruff's method for quantiles of clustered samples.

    The share of samples below the quantile differs between the parts, and so has an interval; the quantiles at the two
    ends of that interval are the bounds. They are never narrower than those of two other intervals: that of as many
    independent samples; and that of the same quantile of normal numbers, as many as there are parts and spread like the
    parts' medians. The latter is needed because 8 starts have no sample beyond their own highest level.
    """
    samples, fraction = measurement.samples_ns, FRACTIONS[statistic]
    value = quantile(samples, fraction)
    parts = _grouped(samples, _parts(measurement.rounds, measurement.first_rounds))
    below = [sum(one <= value for one in part) / len(part) for part in parts]
    error = math.sqrt(fraction * (1 - fraction))
    half = max(_half_width(below), 1.96 * error / math.sqrt(len(samples)))
    low, high = (quantile(samples, min(1.0, max(0.0, fraction + side * half))) for side in (-1, 1))
    density = _NORMAL.pdf(_NORMAL.inv_cdf(fraction))
    levels = math.exp(error / density * _half_width([math.log(statistics.median(part)) for part in parts]))
    return Interval(value=value / 1e9, low=min(low, value / levels) / 1e9, high=max(high, value * levels) / 1e9)


def ratio(first: Sampled, second: Sampled, statistic: Statistic = "p50") -> Interval:
    """Return `first`'s latency divided by `second`'s, for two measurements that share rounds.

    For p50 the ratio of a part is paired: it is the median, over the part's rounds, of the ratio of the two medians in
    a round. For p90 it is the ratio of the quantiles of all the part's samples. The ratios of several starts are joined
    by their geometric mean.
    """
    by_round = [samples_by_round(one) for one in (first, second)]
    shared = sorted(by_round[0].keys() & by_round[1].keys())
    parts = _grouped(shared, _parts(shared, first.first_rounds))
    logs = [_log_ratio(by_round, part, statistic) for part in parts]
    is_one_start = _num_starts(shared, first.first_rounds) == 1
    middle = _log_ratio(by_round, shared, statistic) if is_one_start else statistics.fmean(logs)
    half = _half_width(logs)
    return Interval(value=math.exp(middle), low=math.exp(middle - half), high=math.exp(middle + half))


def samples_by_round(measurement: Sampled) -> dict[int, list[int]]:
    """Return the samples of every round, in nanoseconds."""
    found: dict[int, list[int]] = {}
    for number, sample in zip(measurement.rounds, measurement.samples_ns, strict=True):
        found.setdefault(number, []).append(sample)
    return found


def _log_ratio(by_round: Sequence[Mapping[int, list[int]]], rounds: Sequence[int], statistic: Statistic) -> float:
    first, second = by_round
    if statistic == "p50":
        medians = ((statistics.median(first[number]), statistics.median(second[number])) for number in rounds)
        return statistics.median(math.log(one / other) for one, other in medians)
    one, other = (quantile([ns for number in rounds for ns in taken[number]], 0.9) for taken in by_round)
    return math.log(one / other)


def _num_starts(rounds: Iterable[int], first_rounds: Sequence[int]) -> int:
    return len({bisect_right(first_rounds, number) for number in rounds})


def _parts(rounds: Sequence[int], first_rounds: Sequence[int]) -> list[int]:
    """Return the part that each round belongs to: its start, or a block of rounds where all are of one start."""
    if _num_starts(rounds, first_rounds) > 1:
        return [bisect_right(first_rounds, number) for number in rounds]
    distinct = sorted(set(rounds))
    blocks = min(_BLOCKS, len(distinct))
    block_of = {number: index * blocks // len(distinct) for index, number in enumerate(distinct)}
    return [block_of[number] for number in rounds]


def _grouped(values: Sequence[int], labels: Sequence[int]) -> list[list[int]]:
    groups: dict[int, list[int]] = {}
    for value, label in zip(values, labels, strict=True):
        groups.setdefault(label, []).append(value)
    return [groups[label] for label in sorted(groups)]


def _half_width(values: Sequence[float]) -> float:
    """Return half the 95 % interval of the mean of independent values; 0 for one value, which tells nothing of it."""
    if len(values) < 2:
        return 0.0
    from scipy.special import stdtrit  # noqa: PLC0415 - it imports half of numpy, for which no --help should wait

    return float(stdtrit(len(values) - 1, 0.975) * statistics.stdev(values) / math.sqrt(len(values)))


def share(value: float, *, count: int) -> Interval:
    """Return the share `value` of `count` independent cases with its interval, Wilson's, which holds for few cases."""
    z = _NORMAL.inv_cdf(0.975)
    scale = 1 + z**2 / count
    center = (value + z**2 / (2 * count)) / scale
    half = z / scale * math.sqrt(value * (1 - value) / count + (z / (2 * count)) ** 2)
    return Interval(value=value, low=max(0.0, min(value, center - half)), high=min(1.0, max(value, center + half)))

"""The fastest configuration of a runtime on a device: its switches and threads, tried on the model before it is pruned.

A runtime's defaults are not the fastest everywhere: llama.cpp's flash attention makes a token slower on some CPUs. A
latency that was measured in one configuration says nothing of another, so the search, the table and the proof all use
the one that is found here, and the artifact says how to run it that way.
"""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from dilap.backends import Backend
from dilap.core.errors import InvalidInput, Unsupported
from dilap.core.measurement import Interval, Measurement
from dilap.core.workload import Workload
from dilap.profilers.profiler import speedup

# A configuration has to gain at least this much over the one that it replaces: less is not worth leaving a default.
LEAST_GAIN = 0.01
# How far, in nats of KL per token, a lossy switch such as a quantised KV cache may move the model's predictions. For
# comparison: q8_0 weights move those of SmolLM2-135M by 0.005.
MAX_DIVERGENCE = 0.001
_NUM_TOKENS = 64  # tokens on which a lossy switch is judged
# Added to the interval where two workloads were not measured side by side, because a machine is faster at some times
# than at others: starts of one model differ by up to 2 %.
_DAY = 0.03


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A configuration that was tried. `speedup` is relative to the best one known at that time: above 1 is faster.

    `refused` says why it could not be used; it is empty where it could.
    """

    workload: Workload
    seconds: float | None = None
    speedup: Interval | None = None
    refused: str = ""


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """The result of the search: the `workload` in the fastest configuration that was found, and what was tried.

    `plain` is the same workload in the runtime's defaults.
    """

    workload: Workload
    plain: Workload
    trials: tuple[Trial, ...] = ()

    @property
    def is_plain(self) -> bool:
        return self.workload == self.plain


class World(Protocol):
    """What the search needs: one model on one device, timed and compared in several configurations."""

    def compare(self, base: Workload, others: Sequence[Workload]) -> list[tuple[float, Interval]]:
        """Return for each of `others` its seconds, and how many times faster than `base` it is."""

    def divergence(self, base: Workload, other: Workload) -> float | None:
        """Return the mean KL, in nats per token, of the model under `other` from that under `base`; None if unknown.

        Raises Unsupported or InvalidInput where the runtime refuses the configuration.
        """


def thread_counts(most: int) -> tuple[int, ...]:
    """Return how many threads to try: `most`, one fewer, which leaves a core to the system, and half as many."""
    return tuple(dict.fromkeys(count for count in (most, most - 1, most // 2) if count >= 1))


def find_fastest(
    plain: Workload,
    *,
    backend: Backend,
    threads: Sequence[int],
    world: World,
    switches: Mapping[str, tuple[str, ...]] | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> Configuration:
    """Start from the plain defaults and take the change that gains most, until none gains LEAST_GAIN or more.

    `switches` are those that are tried, all of the backend's by default.

    Every round measures the best configuration known and all that differ from it in one switch, or in the number of
    threads; what was clearly slower in one round is not tried again.
    """
    switches = backend.switches() if switches is None else switches
    best, trials, slower = plain, [], set[tuple[str, str]]()
    tried = [plain]
    while True:
        changes = [one for one in _changes(best, switches, threads) if one[0] not in slower and one[1] not in tried]
        tried += [workload for _, workload in changes]
        refused = {index: _refusal(plain, workload, backend, world) for index, (_, workload) in enumerate(changes)}
        trials += [Trial(workload=changes[index][1], refused=reason) for index, reason in refused.items() if reason]
        changes = [change for index, change in enumerate(changes) if not refused[index]]
        if not changes:
            break
        found = world.compare(best, [workload for _, workload in changes])
        winner, most = best, 1 + LEAST_GAIN
        for (name, workload), (seconds, gain) in zip(changes, found, strict=True):
            trials.append(Trial(workload=workload, seconds=seconds, speedup=gain))
            tell(f"{workload.configuration}: {gain.value:.3f} times as fast as {best.configuration}")
            if gain.high < 1:
                slower.add(name)
            if gain.low > 1 and gain.value >= most:
                winner, most = workload, gain.value
        if winner == best:
            break
        best = winner
    return Configuration(workload=best, plain=plain, trials=tuple(trials))


def _changes(
    base: Workload, switches: Mapping[str, tuple[str, ...]], threads: Sequence[int]
) -> Iterator[tuple[tuple[str, str], Workload]]:
    """Yield every configuration that differs from `base` in one setting, with the name and value of that setting."""
    for name, (default, *others) in switches.items():
        for value in (default, *others):
            if value != base.switches.get(name, default):
                rest = {key: setting for key, setting in base.switches.items() if key != name}
                changed = rest if value == default else {**rest, name: value}
                yield (name, value), replace(base, switches=dict(sorted(changed.items())))
    for count in threads:
        if count != base.threads:
            yield ("threads", str(count)), replace(base, threads=count)


def _refusal(plain: Workload, workload: Workload, backend: Backend, world: World) -> str:
    """Return why a configuration cannot be used: the runtime refuses it, or the model changes too much; else empty."""
    if not any(name in workload.switches for name in backend.lossy_switches):
        return ""
    try:
        divergence = world.divergence(plain, workload)
    except (InvalidInput, Unsupported) as error:
        return str(error)
    if divergence is None:
        return "it changes what the model computes, and how much cannot be seen on this device"
    if divergence > MAX_DIVERGENCE:
        return f"it changes the model by {divergence:.4f} nats a token, more than {MAX_DIVERGENCE:g}"
    return ""


@dataclass(frozen=True, kw_only=True)
class MeasuredWorld:
    """A `World` that measures: `measure` times workloads of one model side by side, `diverge` compares two of them.

    By default it is not known how far two of them are apart, as of a model that reads no tokens.
    """

    backend: Backend
    measure: Callable[[Sequence[Workload]], list[Measurement]]
    diverge: Callable[[Workload, Workload, Sequence[int]], float | None] = lambda *_: None
    vocab_size: int = 1

    def compare(self, base: Workload, others: Sequence[Workload]) -> list[tuple[float, Interval]]:
        together = [one for one in others if one.threads == base.threads or not self.backend.shares_threads]
        found: dict[int, tuple[float, Interval]] = {}
        if together:
            first, *rest = self.measure([base, *together])
            for workload, measurement in zip(together, rest, strict=True):
                same_work = replace(measurement, workload=first.workload)  # only its configuration differs
                found[others.index(workload)] = (measurement.seconds(), speedup(first, same_work))
        for index, workload in enumerate(others):
            if workload not in together:
                found[index] = self._apart(base, workload)
        return [found[index] for index in range(len(others))]

    def _apart(self, base: Workload, other: Workload) -> tuple[float, Interval]:
        """Compare two workloads that one process cannot hold: one after the other, and again in the reverse order."""
        order = (base, other, other, base)
        seconds = [self.measure([workload])[0].seconds() for workload in order]
        ratios = sorted((seconds[0] / seconds[1], seconds[3] / seconds[2]))
        value = sum(ratios) / 2
        gain = Interval(value=value, low=ratios[0] * (1 - _DAY), high=ratios[1] * (1 + _DAY))
        return min(seconds[1:3]), gain

    def divergence(self, base: Workload, other: Workload) -> float | None:
        draw = random.Random(0)
        return self.diverge(base, other, [draw.randrange(self.vocab_size) for _ in range(_NUM_TOKENS)])

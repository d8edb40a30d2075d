"""Measure probes and write them into latency tables, on one device or on several of the same kind at once.

Probes are measured in blocks of a few, each block together with the dense probe. A table is written after every block,
so that an interrupted measurement goes on where it stopped.
"""

import shutil
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from dilap.core.codec import scratch_folder
from dilap.core.errors import LinkLost, Mismatch
from dilap.core.measurement import Measurement
from dilap.profilers.profiler import Case, Profiler, round_medians
from dilap.profilers.tables.record import AnyEntry, AnyTable, Header

Progress = Callable[[int, int, str], None]  # probes done, probes in all, what is going on
_BLOCK = 4  # probes measured together, beside the dense one: about 1.3 GB of mapped files for 135M parameters in f16
# How often to repeat the probes beside which other processes used the cores. Other load that lasts longer than a table
# takes is left to the next command.
_REPEATS = 1
_OF_FIRST_DEVICE = ("dense", "depth", "holdout")  # what helpers do not measure; see `fill`
_exporting = threading.Lock()  # one probe is written at a time: exporters share caches, and memory


class Probe(Protocol):
    """A model to measure; `key` tells it from others."""

    @property
    def role(self) -> str: ...
    @property
    def key(self) -> tuple[object, ...]: ...


AnyProbe = TypeVar("AnyProbe", bound=Probe)


@dataclass(frozen=True, kw_only=True)
class ProbeKind(Generic[AnyProbe, AnyEntry]):
    """How probes of one kind of model are written and kept.

    `dense` is the sentinel. `write` makes a probe's folder, which is not there yet, and returns the model's file in it;
    `entry` is given a probe, its measurement, and for every sample the sentinel's median in the same round.
    """

    dense: AnyProbe
    write: Callable[[AnyProbe, Path], Path]
    entry: Callable[[AnyProbe, Measurement, tuple[int, ...]], AnyEntry]


@dataclass(kw_only=True)
class Share(Generic[AnyTable]):
    """One device's share of the work: its profiler, its table, which grows, and the table's file."""

    profiler: Profiler
    table: AnyTable
    path: Path


def fill(
    shares: Sequence[Share[AnyTable]],
    probes: Sequence[AnyProbe],
    *,
    kind: ProbeKind[AnyProbe, Any],
    progress: Progress | None,
) -> AnyTable:
    """Measure the probes that no table has yet; return the first device's table with the others as its partners.

    Probes beside which other processes used the cores are measured once more. The other devices are helpers. The first
    device measures the dense, depth and hold-out probes itself: the first two say what its seconds are, the hold-out
    probes whether the helpers' measurements are true for it. A helper whose link is lost leaves its block to the
    others.
    """
    for _ in range(1 + _REPEATS):
        whole = _whole(shares)
        if not (missing := [probe for probe in probes if probe not in whole]):
            break
        _measure(shares, _Queue(missing, len(probes), progress), kind)
    return _whole(shares)


def _whole(shares: Sequence[Share[AnyTable]]) -> AnyTable:
    """Return the first device's table with the helpers' tables as its partners."""
    main, *helpers = (share.table for share in shares)
    return replace(main, partners=tuple(helpers))


def _measure(shares: Sequence[Share[Any]], queue: "_Queue[Any]", kind: ProbeKind[Any, Any]) -> None:
    """Measure all probes in the queue, on all devices at once."""
    main, *helpers = shares
    with ThreadPoolExecutor(max(1, len(helpers))) as pool:
        futures = [pool.submit(_work, share, queue, kind, is_helper=True) for share in helpers]
        try:
            _work(main, queue, kind, is_helper=False)
        except BaseException:
            queue.close()  # the helpers end with their blocks
            raise
        for future in futures:
            future.result()
    _work(main, queue, kind, is_helper=False)  # what a lost helper gave back


class _Queue(Generic[AnyProbe]):
    """The probes that no device has taken yet. The threads of all devices share it."""

    def __init__(self, missing: Sequence[AnyProbe], total: int, progress: Progress | None) -> None:
        self._missing, self._total, self._progress = list(missing), total, progress
        self._done = total - len(missing)
        self._lock = threading.Lock()

    def take(self, *, is_helper: bool) -> list[AnyProbe]:
        """Return the next probes to measure; the dense one comes in addition, as it is in every block anyway."""
        with self._lock:
            free = [probe for probe in self._missing if not is_helper or probe.role not in _OF_FIRST_DEVICE]
            block = free[: _BLOCK + 1] if free and free[0].role == "dense" else free[:_BLOCK]
            self._missing = [probe for probe in self._missing if probe not in block]
            return block

    def give_back(self, block: Sequence[AnyProbe]) -> None:
        """Put a block back that could not be measured."""
        with self._lock:
            self._missing = [*block, *self._missing]

    def close(self) -> None:
        """Drop the probes that are left, so that all devices stop after their blocks."""
        with self._lock:
            self._missing.clear()

    def tell(self, text: str, *, measured: int = 0) -> None:
        """Report progress, after `measured` more probes."""
        with self._lock:
            self._done += measured
            if self._progress is not None:
                self._progress(self._done, self._total, text)


def _work(share: Share[Any], queue: _Queue[Any], kind: ProbeKind[Any, Any], *, is_helper: bool) -> None:
    """Measure blocks on one device until none are left, and write its table after each."""
    with scratch_folder(share.path) as folder:
        bench = _ProbeBench(share.profiler, share.table.header, kind, folder)
        while block := queue.take(is_helper=is_helper):
            try:
                entries = bench.measure(block, queue.tell)
            except LinkLost as error:
                queue.give_back(block)
                if not is_helper:
                    raise
                queue.tell(f"one device less: {error}")
                return
            share.table = share.table.with_entries(entries)
            share.table.write(share.path)
            queue.tell("measured", measured=len(block))


@dataclass(frozen=True)
class _ProbeBench(Generic[AnyProbe]):
    """Writes the files of a block of probes, measures them together with the dense probe, and removes them."""

    profiler: Profiler
    header: Header
    kind: ProbeKind[AnyProbe, Any]
    folder: Path
    written: dict[str, Path] = field(default_factory=dict)

    def measure(self, block: Sequence[AnyProbe], tell: Callable[[str], None]) -> list[Any]:
        """Measure a block; return one entry per probe. Raises Mismatch where the device is not the table's any more."""
        dense = self._write(self.kind.dense, "dense", tell)
        others = [probe for probe in block if probe.role != "dense"]
        try:
            paths = [self._write(probe, str(index), tell) for index, probe in enumerate(others)]
            cases = [Case(path=path, workload=self.header.workload) for path in (dense, *paths)]
            sentinel, *measurements = self.profiler.measure(cases, self.header.protocol, progress=tell)
        finally:
            for index in range(len(others)):
                shutil.rmtree(self.folder / str(index), ignore_errors=True)
                self.written.pop(str(index), None)
        if differences := self.header.fingerprint.differences(sentinel.fingerprint):
            raise Mismatch(f"the device changed while its table was measured: {'; '.join(differences)}")
        medians = round_medians(sentinel)
        dense_probes = [probe for probe in block if probe.role == "dense"]
        pairs = zip([*dense_probes, *others], [sentinel] * len(dense_probes) + measurements, strict=True)
        return [
            self.kind.entry(probe, measurement, tuple(round(medians[number]) for number in measurement.rounds))
            for probe, measurement in pairs
        ]

    def _write(self, probe: AnyProbe, name: str, tell: Callable[[str], None]) -> Path:
        if name not in self.written:  # only the dense probe stays from block to block
            tell(f"writing probe {name}")
            with _exporting:
                self.written[name] = self.kind.write(probe, self.folder / name)
        return self.written[name]

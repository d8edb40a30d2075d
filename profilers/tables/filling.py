"""Measure probes into tables: block by block, on one device or on several of a kind at once."""

import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from dilap import export
from dilap.core.artifact import Artifact
from dilap.core.codec import decode, read_json, scratch_folder
from dilap.core.errors import LinkLost, Mismatch
from dilap.core.measurement import Measurement
from dilap.core.shape import Architecture, LayerWidths
from dilap.profilers.profiler import Case, Profiler, round_medians
from dilap.profilers.tables.table import LatencyTable, Role, TableEntry, TableHeader, runs_of

Progress = Callable[[int, int, str], None]  # probes done, probes in all, what is going on
_BLOCK = 4  # probes measured together, beside the dense one: about 1.3 GB of mapped files for 135M parameters in f16
_REPEATS = 1  # a spell of other load is over by the end of a table; what outlasts it is left to the next command
_exporting = threading.Lock()  # the exporters share caches, and memory


@dataclass(frozen=True, kw_only=True)
class Probe:
    """A model to measure, and what its entry is for."""

    role: Role
    widths: tuple[LayerWidths, ...]


@dataclass(kw_only=True)
class Share:
    """What one device measures: its table, which grows, and the file of it."""

    profiler: Profiler
    table: LatencyTable
    path: Path


def fill(
    shares: Sequence[Share],
    probes: Sequence[Probe],
    *,
    architecture: Architecture,
    progress: Progress | None,
) -> LatencyTable:
    """Measure the probes that no share has yet, those beside which other processes used the cores once more; the first
    device's table, with the others' beside it.

    The first device measures the dense, the shallow and the held-out probes itself: they say what its seconds are, and
    whether its kind's are its own. A helper whose link is lost leaves its block to the others.
    """
    for _ in range(1 + _REPEATS):
        whole = _whole(shares)
        if not (missing := [probe for probe in probes if (probe.role, probe.widths) not in whole]):
            break
        _measure(shares, _Queue(missing, len(probes), progress), architecture)
    return _whole(shares)


def _whole(shares: Sequence[Share]) -> LatencyTable:
    main, *helpers = (share.table for share in shares)
    return replace(main, partners=tuple(helpers))


def _measure(shares: Sequence[Share], queue: "_Queue", architecture: Architecture) -> None:
    """All that is in the queue, on all devices at once."""
    main, *helpers = shares
    with ThreadPoolExecutor(max(1, len(helpers))) as pool:
        futures = [pool.submit(_work, share, queue, architecture, is_helper=True) for share in helpers]
        try:
            _work(main, queue, architecture, is_helper=False)
        except BaseException:
            queue.close()  # the helpers end with their blocks
            raise
        for future in futures:
            future.result()
    _work(main, queue, architecture, is_helper=False)  # what a lost helper gave back


class _Queue:
    """The probes that nobody measures yet."""

    def __init__(self, missing: Sequence[Probe], total: int, progress: Progress | None) -> None:
        self._missing, self._total, self._progress = list(missing), total, progress
        self._done = total - len(missing)
        self._lock = threading.Lock()

    def take(self, *, is_helper: bool) -> list[Probe]:
        """The next block; the dense probe is in every block anyway."""
        with self._lock:
            free = [probe for probe in self._missing if not is_helper or probe.role in ("attention", "ffn", "random")]
            block = free[: _BLOCK + 1] if free and free[0].role == "dense" else free[:_BLOCK]
            self._missing = [probe for probe in self._missing if probe not in block]
            return block

    def give_back(self, block: Sequence[Probe]) -> None:
        with self._lock:
            self._missing = [*block, *self._missing]

    def close(self) -> None:
        """Nothing more is to be measured."""
        with self._lock:
            self._missing.clear()

    def tell(self, text: str, *, measured: int = 0) -> None:
        with self._lock:
            self._done += measured
            if self._progress is not None:
                self._progress(self._done, self._total, text)


def _work(share: Share, queue: _Queue, architecture: Architecture, *, is_helper: bool) -> None:
    """Measure blocks until there are none, writing the table after each."""
    with scratch_folder(share.path) as folder:
        bench = _ProbeBench(share.profiler, share.table.header, architecture, folder)
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
class _ProbeBench:
    """Writes a block of probes, measures it beside the dense one, and removes it."""

    profiler: Profiler
    header: TableHeader
    architecture: Architecture
    folder: Path

    def measure(self, block: Sequence[Probe], tell: Callable[[str], None]) -> list[TableEntry]:
        """One entry a probe. Raises Mismatch where the device is no longer the one that the table is of."""
        dense = self._write(self.architecture.layers, "dense", tell)
        others = [probe for probe in block if probe.role != "dense"]
        try:
            paths = [self._write(probe.widths, str(index), tell) for index, probe in enumerate(others)]
            cases = [Case(path=path, workload=self.header.workload) for path in (dense, *paths)]
            sentinel, *measurements = self.profiler.measure(cases, self.header.protocol, progress=tell)
        finally:
            for index in range(len(others)):
                shutil.rmtree(self.folder / str(index), ignore_errors=True)
        if differences := self.header.fingerprint.differences(sentinel.fingerprint):
            raise Mismatch(f"the device changed while its table was measured: {'; '.join(differences)}")
        medians = round_medians(sentinel)
        dense_probes = [probe for probe in block if probe.role == "dense"]
        pairs = zip([*dense_probes, *others], [sentinel] * len(dense_probes) + measurements, strict=True)
        return [_entry(probe, measurement, medians) for probe, measurement in pairs]

    def _write(self, widths: tuple[LayerWidths, ...], name: str, tell: Callable[[str], None]) -> Path:
        out = self.folder / name
        if not out.exists():  # only the dense one stays
            tell(f"writing probe {name}")
            with _exporting:
                export.get(self.header.backend).export_probe(
                    replace(self.architecture, layers=widths),
                    precision=self.header.workload.precision,
                    seed=0,
                    out=out,
                )
        sidecar = out / "artifact.json"
        return out / decode(Artifact, read_json(sidecar), source=str(sidecar)).path


def _entry(probe: Probe, measurement: Measurement, sentinels: Mapping[int, float]) -> TableEntry:
    return TableEntry(
        role=probe.role,
        runs=runs_of(probe.widths),
        samples_ns=measurement.samples_ns,
        sentinel_ns=tuple(round(sentinels[number]) for number in measurement.rounds),
        status=measurement.status,
        note=measurement.note,
        forced=measurement.forced,
    )

"""Measure probes and write them into latency tables, on one device or on several of the same kind at once.

Probes are measured in blocks of a few, each block together with the dense probe. A table is written after every block,
so that an interrupted measurement goes on where it stopped.
"""

import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from dilap import backends, export
from dilap.core.artifact import Artifact
from dilap.core.codec import decode, read_json, scratch_folder
from dilap.core.errors import LinkLost, Mismatch
from dilap.core.measurement import Measurement
from dilap.core.shape import Architecture
from dilap.profilers.profiler import Case, Profiler, round_medians
from dilap.profilers.tables.entries import Probe, TableEntry, run_precisions, runs_of
from dilap.profilers.tables.table import LatencyTable, TableHeader

Progress = Callable[[int, int, str], None]  # probes done, probes in all, what is going on
_BLOCK = 4  # probes measured together, beside the dense one: about 1.3 GB of mapped files for 135M parameters in f16
# How often to repeat the probes beside which other processes used the cores. Other load that lasts longer than a table
# takes is left to the next command.
_REPEATS = 1
_OF_FIRST_DEVICE = ("dense", "depth", "holdout")  # what helpers do not measure; see `fill`
_exporting = threading.Lock()  # one probe is written at a time: exporters share caches, and memory


@dataclass(kw_only=True)
class Share:
    """One device's share of the work: its profiler, its table, which grows, and the table's file."""

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
        _measure(shares, _Queue(missing, len(probes), progress), architecture)
    return _whole(shares)


def _whole(shares: Sequence[Share]) -> LatencyTable:
    """Return the first device's table with the helpers' tables as its partners."""
    main, *helpers = (share.table for share in shares)
    return replace(main, partners=tuple(helpers))


def _measure(shares: Sequence[Share], queue: "_Queue", architecture: Architecture) -> None:
    """Measure all probes in the queue, on all devices at once."""
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
    """The probes that no device has taken yet. The threads of all devices share it."""

    def __init__(self, missing: Sequence[Probe], total: int, progress: Progress | None) -> None:
        self._missing, self._total, self._progress = list(missing), total, progress
        self._done = total - len(missing)
        self._lock = threading.Lock()

    def take(self, *, is_helper: bool) -> list[Probe]:
        """Return the next probes to measure; the dense one comes in addition, as it is in every block anyway."""
        with self._lock:
            free = [probe for probe in self._missing if not is_helper or probe.role not in _OF_FIRST_DEVICE]
            block = free[: _BLOCK + 1] if free and free[0].role == "dense" else free[:_BLOCK]
            self._missing = [probe for probe in self._missing if probe not in block]
            return block

    def give_back(self, block: Sequence[Probe]) -> None:
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


def _work(share: Share, queue: _Queue, architecture: Architecture, *, is_helper: bool) -> None:
    """Measure blocks on one device until none are left, and write its table after each."""
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
    """Writes the files of a block of probes, measures them together with the dense probe, and removes them."""

    profiler: Profiler
    header: TableHeader
    architecture: Architecture
    folder: Path

    def measure(self, block: Sequence[Probe], tell: Callable[[str], None]) -> list[TableEntry]:
        """Measure a block; return one entry per probe. Raises Mismatch where the device is not the table's any more."""
        dense = self._write(Probe(role="dense", widths=self.architecture.layers), "dense", tell)
        others = [probe for probe in block if probe.role != "dense"]
        try:
            paths = [self._write(probe, str(index), tell) for index, probe in enumerate(others)]
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

    def _write(self, probe: Probe, name: str, tell: Callable[[str], None]) -> Path:
        out = self.folder / name
        if not out.exists():  # only the dense probe stays from block to block
            tell(f"writing probe {name}")
            with _exporting:
                export.get(self.header.backend).export_probe(
                    replace(self.architecture, layers=probe.widths),
                    precision=self.header.workload.precision,
                    precisions=self._named(probe),
                    seed=0,
                    out=out,
                )
        sidecar = out / "artifact.json"
        return out / decode(Artifact, read_json(sidecar), source=str(sidecar)).path

    def _named(self, probe: Probe) -> Mapping[str, str]:
        """Return the probe's precisions; where the runtime reads the head from the embedding, for that too."""
        backend, precision = backends.get(self.header.backend), self.header.workload.precision
        if "head" not in probe.precisions or not self.architecture.tied_embeddings:
            return probe.precisions
        if backend.capabilities(self.architecture, precision=precision).untied_precisions:
            return probe.precisions
        return {**probe.precisions, "embedding": probe.precisions["head"]}


def _entry(probe: Probe, measurement: Measurement, sentinels: Mapping[int, float]) -> TableEntry:
    return TableEntry(
        role=probe.role,
        runs=runs_of(probe.widths, probe.precisions),
        precisions=run_precisions(probe.widths, probe.precisions),
        head=probe.precisions.get("head", ""),
        samples_ns=measurement.samples_ns,
        sentinel_ns=tuple(round(sentinels[number]) for number in measurement.rounds),
        status=measurement.status,
        note=measurement.note,
        forced=measurement.forced,
    )

"""Go on with the tables of several devices where they were left, while no other process measures them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from dilap.core.errors import Mismatch
from dilap.profilers.profiler import Profiler
from dilap.profilers.tables.measuring import Progress, Share
from dilap.profilers.tables.record import AnyTable, partner_path


@contextmanager
def alone(path: Path, progress: Progress | None) -> Iterator[None]:
    """Wait until no other process measures the same table, and keep others waiting meanwhile.

    Two processes would spoil each other's samples and remove each other's probes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if progress is not None:
            progress(0, 0, "another process measures this table: waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def shares_of(
    profilers: Sequence[Profiler],
    path: Path,
    *,
    start: Callable[[Profiler, str], AnyTable],
    resume: Callable[[Path, Any], AnyTable],
) -> list[Share[AnyTable]]:
    """Return every device's table as far as it was measured. Raises Mismatch for devices that are not of one kind.

    `start` makes an empty table for a device, at a time in words; `resume` reads one from a file, and raises Mismatch
    where its header is for something else than a given one.
    """
    shares: list[Share[AnyTable]] = []
    for number, profiler in enumerate(profilers, start=1):
        empty = start(profiler, datetime.now(timezone.utc).isoformat(timespec="seconds"))
        own = path if number == 1 else partner_path(path, number)
        table = resume(own, empty.header) if own.exists() else empty
        shares.append(Share(profiler=profiler, table=replace(table, partners=()), path=own))
        fingerprint, first = empty.header.fingerprint, shares[0].table.header.fingerprint
        if differences := first.differences(replace(fingerprint, serial_sha256=first.serial_sha256)):
            raise Mismatch(f"device {number} is not of the first one's kind: {'; '.join(differences)}")
    return shares

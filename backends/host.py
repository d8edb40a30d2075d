"""What the standard library alone can find out about the machine that this code runs on.

Everything is read from Linux's /proc and /sys. Where they are absent (Windows, macOS), a field is 0, empty or
`unknown`, and `BusyClock` returns None, so that a caller can say what it could not see.
"""

import hashlib
import os
import platform
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dilap.backends import sensors, windows
from dilap.backends.sensors import text
from dilap.core.errors import InvalidInput
from dilap.core.measurement import Fingerprint

if TYPE_CHECKING:
    from dilap.backends import Backend

_CPUS = Path("/sys/devices/system/cpu")


def fingerprint(backend: "Backend", *, device: str) -> Fingerprint:
    """Return the fingerprint of this machine and of the runtime as it is built here."""
    return Fingerprint(
        device=device,
        machine=platform.machine().lower(),
        processor=processor(),
        num_cores=num_physical_cores(),
        memory_bytes=memory_bytes(),
        last_level_cache_bytes=last_level_cache_bytes(),
        power_mode=sensors.power_mode(),
        serial_sha256=serial_sha256(),
        runtime=backend.name,
        runtime_version=backend.version(),
        runtime_build=backend.build(),
        soft={"kernel": f"{platform.system()} {platform.release()}", "python": platform.python_version()},
    )


def serial_sha256() -> str:
    """Return a hash that tells this machine from others of its kind; empty where it has no serial number."""
    for path in ("/proc/device-tree/serial-number", "/etc/machine-id"):
        if serial := text(Path(path)).strip("\0"):
            return hashlib.sha256(serial.encode()).hexdigest()[:16]
    return ""


def pin(mask: str) -> None:
    """Run this process on the cores of a hexadecimal mask alone. Raises InvalidInput where the machine lacks them."""
    cores = int(mask, 16)
    if sys.platform == "win32":
        allowed = windows.pin(cores)
    else:
        try:
            os.sched_setaffinity(0, [core for core in range(cores.bit_length()) if cores >> core & 1])
            allowed = True
        except OSError:
            allowed = False
    if not allowed:
        raise InvalidInput(f"the cores {mask} (hexadecimal) cannot be chosen here; this machine has {os.cpu_count()}")


def usable_cpus() -> tuple[int, ...]:
    """Return the logical CPUs that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))


def num_physical_cores() -> int:
    """Return how many physical cores this process may use; the two hyper-threads of a core count once."""
    siblings = {text(_CPUS / f"cpu{cpu}/topology/thread_siblings_list") or str(cpu) for cpu in usable_cpus()}
    return len(siblings)


def processor() -> str:
    """Return the processor's marketing name, or the board's where the kernel knows only part numbers (Arm)."""
    for line in text(Path("/proc/cpuinfo")).splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    board = text(Path("/proc/device-tree/model")).strip("\0")
    return board or platform.processor() or "unknown"


def memory_bytes() -> int:
    """Return the installed memory in bytes, to the nearest 256 MiB.

    It is rounded because the part of the memory that a kernel keeps for itself changes with its version.
    """
    kilobytes = _fields(Path("/proc/meminfo")).get("MemTotal", 0)
    step = 256 << 20
    return round(kilobytes * 1024 / step) * step


def last_level_cache_bytes() -> int:
    """Return the bytes of all caches of the highest level that the usable CPUs have; 0 where unknown."""
    found: dict[tuple[int, str], int] = {}
    for index in (path for cpu in usable_cpus() for path in (_CPUS / f"cpu{cpu}/cache").glob("index*")):
        size, level = text(index / "size"), text(index / "level")
        if size.endswith("K") and level.isdigit():
            found[int(level), text(index / "shared_cpu_list")] = int(size[:-1]) * 1024
    last = max((level for level, _ in found), default=0)
    return sum(size for (level, _), size in found.items() if level == last)


@dataclass(frozen=True, kw_only=True)
class MemoryUse:
    """Resident memory of this process in bytes. Pages of a mapped file count, though the kernel can drop them."""

    peak_bytes: int
    resident_bytes: int


def memory_use() -> MemoryUse:
    if sys.platform == "win32":
        resident, peak = windows.memory()
        return MemoryUse(peak_bytes=peak, resident_bytes=resident)
    fields = _fields(Path("/proc/self/status"))
    resident = fields.get("RssAnon", 0) + fields.get("RssFile", 0)
    return MemoryUse(peak_bytes=fields.get("VmHWM", 0) * 1024, resident_bytes=resident * 1024)


class MemoryWatch:
    """Reads the resident memory of this process every few milliseconds, in a thread, while something else runs."""

    def __init__(self, *, interval_seconds: float = 0.005) -> None:
        self._interval_seconds = interval_seconds
        self._samples: list[int] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> "MemoryWatch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def average_bytes(self) -> float:
        return sum(self._samples) / len(self._samples)

    def _look(self) -> None:
        while True:
            self._samples.append(memory_use().resident_bytes)
            if self._stop.wait(self._interval_seconds):
                return


def reset_peak_memory_() -> None:
    """Let the peak start again from what is resident now; without effect where the kernel does not offer it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


class BusyClock:
    """CPU time that other processes, and the hypervisor, took from this machine.

    The kernel counts the machine's time in ticks of 10 ms but our own to the nanosecond, so a short reading is off by
    a tick or so either way: add several readings up before judging, and do not replace negative ones by 0.
    """

    def __init__(self) -> None:
        self._wall, self._busy = time.monotonic(), _busy_seconds()
        self._own = time.process_time()

    def lap(self) -> tuple[float, float | None]:
        """Return the seconds since the last lap, and the CPU seconds that others used in them (None where unknown)."""
        wall, busy, own = time.monotonic(), _busy_seconds(), time.process_time()
        others = None if busy is None or self._busy is None else (busy - self._busy) - (own - self._own)
        seconds = wall - self._wall
        self._wall, self._busy, self._own = wall, busy, own
        return seconds, others


def _busy_seconds() -> float | None:
    """Return the seconds of all CPUs in user, nice, system, irq, softirq and steal; None where unknown."""
    first = text(Path("/proc/stat")).partition("\n")[0].split()
    if not first or first[0] != "cpu":
        return None
    ticks = [int(word) for word in first[1:9]]
    idle = ticks[3] + ticks[4]  # idle and iowait
    return (sum(ticks) - idle) / os.sysconf("SC_CLK_TCK")


def _fields(path: Path) -> dict[str, int]:
    """Return the `Name:  123 kB` lines of a /proc file, as name -> kB."""

    def pairs() -> Iterator[tuple[str, int]]:
        for line in text(path).splitlines():
            words = line.split()
            if len(words) == 3 and words[2] == "kB":
                yield words[0].rstrip(":"), int(words[1])

    return dict(pairs())

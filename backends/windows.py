"""What only Windows' kernel32 can tell or do, and Python's standard library not: power, memory, speed, cores."""

import ctypes
import sysconfig
from typing import Any

_NO_BATTERY = 255  # BatteryLifePercent of SYSTEM_POWER_STATUS where it is unknown
_ARM64 = 0xAA64  # IMAGE_FILE_MACHINE_ARM64
_POWER_THROTTLING = 4  # ProcessPowerThrottling, of the enumeration PROCESS_INFORMATION_CLASS
_EXECUTION_SPEED = 1  # PROCESS_POWER_THROTTLING_EXECUTION_SPEED: EcoQoS


class _PowerThrottling(ctypes.Structure):
    """Windows' PROCESS_POWER_THROTTLING_STATE: only those bits of `state` count that are set in `control` too."""

    _fields_ = (("version", ctypes.c_ulong), ("control", ctypes.c_ulong), ("state", ctypes.c_ulong))


class _MemoryCounters(ctypes.Structure):
    """Windows' PROCESS_MEMORY_COUNTERS; the last six are of pools and page files."""

    _fields_ = (
        ("size", ctypes.c_uint32),
        ("faults", ctypes.c_uint32),
        ("peak", ctypes.c_size_t),
        ("resident", ctypes.c_size_t),
        ("others", ctypes.c_size_t * 6),
    )


def memory() -> tuple[int, int]:
    """Return the bytes of this process's working set, now and at its peak; zeros where Windows does not say."""
    counters = _MemoryCounters(size=ctypes.sizeof(_MemoryCounters))
    if not _kernel32().K32GetProcessMemoryInfo(_this_process(), ctypes.byref(counters), counters.size):
        return 0, 0
    return counters.resident, counters.peak


def power() -> tuple[bool | None, float | None]:
    """Return whether the machine is plugged in, and the battery's percentage; None for what Windows does not know.

    The first three bytes of what GetSystemPowerStatus writes are ACLineStatus, BatteryFlag and BatteryLifePercent.
    """
    status = (ctypes.c_ubyte * 12)()
    if not _kernel32().GetSystemPowerStatus(status):
        return None, None
    return {0: False, 1: True}.get(status[0]), None if status[2] == _NO_BATTERY else float(status[2])


def is_emulated() -> bool:
    """Return whether Windows on Arm emulates another processor for this process.

    IsWow64Process2 gives the machine type of the process (0 for a native one) and that of the system. It calls an x64
    process native too, so that the platform of the Python build has to decide.
    """
    process, native = ctypes.c_ushort(), ctypes.c_ushort()
    if not _kernel32().IsWow64Process2(_this_process(), ctypes.byref(process), ctypes.byref(native)):
        return False
    return native.value == _ARM64 and sysconfig.get_platform() != "win-arm64"


def ask_full_speed() -> None:
    """Switch off EcoQoS, by which Windows slows down what runs in the background, as everything over ssh does."""
    state = _PowerThrottling(version=1, control=_EXECUTION_SPEED, state=0)
    _kernel32().SetProcessInformation(
        _this_process(), _POWER_THROTTLING, ctypes.byref(state), ctypes.sizeof(_PowerThrottling)
    )


def pin(mask: int) -> bool:
    """Run this process on the cores of `mask` alone; return whether Windows allowed it."""
    return bool(_kernel32().SetProcessAffinityMask(_this_process(), ctypes.c_size_t(mask)))


def _kernel32() -> Any:
    windll: Any = getattr(ctypes, "windll")  # noqa: B009  (absent elsewhere, and type checkers know it)
    return windll.kernel32


def _this_process() -> ctypes.c_void_p:
    """Return the handle that stands for the calling process."""
    return ctypes.c_void_p(-1)

"""What is asked of Windows' kernel32, without which the standard library cannot say it: power, emulation, cores."""

import ctypes
import sysconfig
from typing import Any

_NO_BATTERY = 255  # of SYSTEM_POWER_STATUS: unknown
_ARM64 = 0xAA64  # IMAGE_FILE_MACHINE_ARM64
_POWER_THROTTLING = 4  # of PROCESS_INFORMATION_CLASS
_EXECUTION_SPEED = 1  # PROCESS_POWER_THROTTLING_EXECUTION_SPEED: EcoQoS


class _PowerThrottling(ctypes.Structure):
    """PROCESS_POWER_THROTTLING_STATE: a bit of `state` counts where `control` has it."""

    _fields_ = (("version", ctypes.c_ulong), ("control", ctypes.c_ulong), ("state", ctypes.c_ulong))


def power() -> tuple[bool | None, float | None]:
    """Whether it is plugged in, and the battery's percentage.

    GetSystemPowerStatus: ACLineStatus, BatteryFlag and BatteryLifePercent are the first three bytes.
    """
    status = (ctypes.c_ubyte * 12)()
    if not _kernel32().GetSystemPowerStatus(status):
        return None, None
    return {0: False, 1: True}.get(status[0]), None if status[2] == _NO_BATTERY else float(status[2])


def is_emulated() -> bool:
    """Whether Windows on Arm translates this process from another processor's code.

    IsWow64Process2 gives the machine of the process (0 where it is the native one) and that of the system. It calls an
    x64 process native too, which the build of Python tells apart.
    """
    process, native = ctypes.c_ushort(), ctypes.c_ushort()
    if not _kernel32().IsWow64Process2(_this_process(), ctypes.byref(process), ctypes.byref(native)):
        return False
    return native.value == _ARM64 and sysconfig.get_platform() != "win-arm64"


def ask_full_speed() -> None:
    """No EcoQoS, which Windows gives to what runs in the background, as everything over ssh does."""
    state = _PowerThrottling(version=1, control=_EXECUTION_SPEED, state=0)
    _kernel32().SetProcessInformation(
        _this_process(), _POWER_THROTTLING, ctypes.byref(state), ctypes.sizeof(_PowerThrottling)
    )


def pin(mask: int) -> bool:
    """Run on the cores of `mask` alone; whether Windows allowed it."""
    return bool(_kernel32().SetProcessAffinityMask(_this_process(), ctypes.c_size_t(mask)))


def _kernel32() -> Any:
    windll: Any = getattr(ctypes, "windll")  # noqa: B009  (absent elsewhere, and type checkers know it)
    return windll.kernel32


def _this_process() -> ctypes.c_void_p:
    """The handle that stands for the calling process."""
    return ctypes.c_void_p(-1)

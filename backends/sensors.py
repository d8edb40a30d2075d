"""The state of the machine this code is on, as far as it says: Linux (Jetson's power modes too) and Windows.

Readings that a kernel does not offer, or not to us, are left out.
"""

import ctypes
import functools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dilap.types import DeviceState

_SYS = Path("/sys")
_NO_BATTERY = 255  # of SYSTEM_POWER_STATUS: unknown


def state() -> DeviceState:
    """Now; takes a few milliseconds."""
    windows = sys.platform == "win32"
    ac_power, battery = _windows_power() if windows else _linux_power()
    return DeviceState(
        power_mode=power_mode(),
        governor=text(_cpus() / "cpu0/cpufreq/scaling_governor") or "unknown",
        num_cores=os.cpu_count(),
        affinity=_affinity(),
        clocks_khz=dict(_clocks()),
        temperatures_celsius=dict(_temperatures()),
        throttle_events=_throttle_events(),
        ac_power=ac_power,
        battery_percent=battery,
        load=None if windows else os.getloadavg()[0],
    )


def power_mode() -> str:
    """By name, which means the same on every module: nvpmodel's (Jetson), powercfg's (Windows), or the governor."""
    if found := re.search(r"NV Power Mode: *(\S+)", _said("nvpmodel", "-q")):
        return found[1]
    if found := re.search(r"\(([^()]*)\)\s*$", _said("powercfg", "/getactivescheme")):
        return found[1]
    return text(_cpus() / "cpu0/cpufreq/scaling_governor") or "unknown"


def text(path: Path) -> str:
    """What a file of the kernel's says; nothing where it is not there or not for us."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _cpus() -> Path:
    return _SYS / "devices/system/cpu"


@functools.cache
def _program(name: str) -> str | None:
    return shutil.which(name)


def _said(name: str, *words: str) -> str:
    """Standard output of a program; nothing where it is absent or fails."""
    if _program(name) is None:
        return ""
    try:
        return subprocess.run(
            [name, *words], capture_output=True, encoding="utf-8", errors="replace", timeout=10, check=False
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _affinity() -> str:
    return ",".join(map(str, sorted(os.sched_getaffinity(0)))) if hasattr(os, "sched_getaffinity") else "unknown"


def _clocks() -> Iterator[tuple[str, int]]:
    for policy in sorted((_cpus() / "cpufreq").glob("policy*")):
        if (clock := text(policy / "scaling_cur_freq")).isdigit():
            yield policy.name, int(clock)
    for node in sorted((_SYS / "class/devfreq").glob("*gpu*")) + sorted((_SYS / "class/devfreq").glob("*ga10b*")):
        if (clock := text(node / "cur_freq")).isdigit():
            yield node.name, int(clock) // 1000  # this one is in Hz


def _temperatures() -> Iterator[tuple[str, float]]:
    for zone in sorted((_SYS / "class/thermal").glob("thermal_zone*")):
        millidegrees = text(zone / "temp")
        if millidegrees.isdigit() and int(millidegrees) > 0:  # 0 and below are sensors that are off
            yield text(zone / "type") or zone.name, int(millidegrees) / 1000


def _throttle_events() -> int | None:
    over_current = list((_SYS / "class/hwmon").glob("hwmon*/oc*_event_cnt"))
    thermal = list(_cpus().glob("cpu*/thermal_throttle/core_throttle_count"))
    counts = [int(count) for path in over_current + thermal if (count := text(path)).isdigit()]
    return sum(counts) if counts else None


def _linux_power() -> tuple[bool | None, float | None]:
    supplies = sorted((_SYS / "class/power_supply").glob("*"))
    online = [text(one / "online") for one in supplies if text(one / "type") in ("Mains", "USB")]
    charges = [text(one / "capacity") for one in supplies if text(one / "type") == "Battery"]
    charge = next((float(one) for one in charges if one.isdigit()), None)
    return ("1" in online if online else None), charge


def _windows_power() -> tuple[bool | None, float | None]:
    """GetSystemPowerStatus: ACLineStatus, BatteryFlag, BatteryLifePercent are its first three bytes."""
    status = (ctypes.c_ubyte * 12)()
    windll: Any = getattr(ctypes, "windll")  # noqa: B009  (absent elsewhere, and type checkers know it)
    if not windll.kernel32.GetSystemPowerStatus(status):
        return None, None
    return {0: False, 1: True}.get(status[0]), None if status[2] == _NO_BATTERY else float(status[2])

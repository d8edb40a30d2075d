"""The state of the machine that this code runs on: Linux (with Jetson's power modes) and Windows.

Readings that a kernel does not offer, or does not offer to our user, are left out.
"""

import functools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from dilap.backends import windows
from dilap.core.measurement import DeviceState

_SYS = Path("/sys")


def state() -> DeviceState:
    """Return the current state; this takes a few milliseconds."""
    on_windows = sys.platform == "win32"
    ac_power, battery = windows.power() if on_windows else _linux_power()
    clocks, pinned = _clocks()
    return DeviceState(
        power_mode=power_mode(),
        governor=text(_cpus() / "cpu0/cpufreq/scaling_governor") or "unknown",
        num_cores=os.cpu_count(),
        affinity=_affinity(),
        clocks_khz=clocks,
        pinned_khz=pinned,
        temperatures_celsius=dict(_temperatures()),
        throttle_events=_throttle_events(),
        ac_power=ac_power,
        battery_percent=battery,
        load=None if on_windows else os.getloadavg()[0],
        emulated=windows.is_emulated() if on_windows else None,
    )


def power_mode() -> str:
    """Return the power mode's name: nvpmodel's (Jetson), powercfg's (Windows), or else the CPU frequency governor.

    A name means the same on every Jetson module; the modes' numbers do not.
    """
    if found := re.search(r"NV Power Mode: *(\S+)", _said("nvpmodel", "-q")):
        return found[1]
    if found := re.search(r"\(([^()]*)\)\s*$", _said("powercfg", "/getactivescheme")):
        return found[1]
    return text(_cpus() / "cpu0/cpufreq/scaling_governor") or "unknown"


def text(path: Path) -> str:
    """Return the content of one of the kernel's files; empty where it is absent or we may not read it."""
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
    """Return the standard output of a program; empty where it is absent, cannot start or takes too long."""
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


def _clocks() -> tuple[dict[str, int], dict[str, int]]:
    """Return every clock in kHz, and the value of those that are pinned (their minimum is their maximum)."""
    gpus = sorted({*(_SYS / "class/devfreq").glob("*gpu*"), *(_SYS / "class/devfreq").glob("*ga10b*")})
    nodes = [(policy, "scaling_", 1) for policy in sorted((_cpus() / "cpufreq").glob("policy*"))]
    clocks, pinned = {}, {}
    for node, prefix, per_khz in [*nodes, *((gpu, "", 1000) for gpu in gpus)]:
        now, low, high = (text(node / f"{prefix}{word}_freq") for word in ("cur", "min", "max"))
        if now.isdecimal():
            clocks[node.name] = int(now) // per_khz
            if low == high and high.isdecimal():
                pinned[node.name] = int(high) // per_khz
    return clocks, pinned


def _temperatures() -> Iterator[tuple[str, float]]:
    for zone in sorted((_SYS / "class/thermal").glob("thermal_zone*")):
        millidegrees = text(zone / "temp")
        if millidegrees.isdecimal() and int(millidegrees) > 0:  # 0 and below are sensors that are off
            yield text(zone / "type") or zone.name, int(millidegrees) / 1000


def _throttle_events() -> int | None:
    over_current = list((_SYS / "class/hwmon").glob("hwmon*/oc*_event_cnt"))
    thermal = list(_cpus().glob("cpu*/thermal_throttle/core_throttle_count"))
    counts = [int(count) for path in over_current + thermal if (count := text(path)).isdecimal()]
    return sum(counts) if counts else None


def _linux_power() -> tuple[bool | None, float | None]:
    supplies = sorted((_SYS / "class/power_supply").glob("*"))
    online = [text(one / "online") for one in supplies if text(one / "type") in ("Mains", "USB")]
    charges = [text(one / "capacity") for one in supplies if text(one / "type") == "Battery"]
    charge = next((float(one) for one in charges if one.isdecimal()), None)
    return ("1" in online if online else None), charge

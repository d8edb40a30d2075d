"""Whether a device is in a state that is worth measuring, and what mends it."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from dilap.core.errors import Unfit
from dilap.core.measurement import DeviceState
from dilap.profilers.devices.device import Device

_THROTTLING = 1  # Android's thermal status: 0 is none, 1 light
WAIT_SECONDS = 600  # for heat and earlier work to pass
_LOOK_SECONDS = 15


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What is wrong with a device's state, what it is about, and what mends it; `passes` if time alone mends it."""

    about: str
    reason: str
    mend: str
    passes: bool = False


def require_fit(state: DeviceState, device: Device, *, threads: int, force: bool) -> tuple[str, ...]:
    """Raise Unfit where the state is not worth measuring; with `force`, return the reasons that are overridden."""
    problems = list(find_problems(state, device, threads=threads))
    if problems and not force:
        found = "; ".join(f"{problem.reason} ({problem.mend})" for problem in problems)
        raise Unfit(f"{device.label} is not fit to be measured: {found}; --force measures all the same, and says so")
    return tuple(problem.reason for problem in problems)


def settled_state(
    ask: Callable[[], DeviceState],
    device: Device,
    *,
    threads: int,
    seconds: int,
    tell: Callable[[str], None] | None,
    sleep: Callable[[float], None] = time.sleep,
) -> DeviceState:
    """Wait, up to `seconds`, for problems that time mends, and return the state after that.

    Heat passes, and so does the load average of our own last measurement, which looks like other programs' work.
    """
    for _ in range(seconds // _LOOK_SECONDS):
        state = ask()
        problems = list(find_problems(state, device, threads=threads))
        if not problems or not all(problem.passes for problem in problems):
            return state
        if tell is not None:
            tell(f"waiting for {device.label}: {problems[0].reason}")
        sleep(_LOOK_SECONDS)
    return ask()


def find_problems(state: DeviceState, device: Device, *, threads: int) -> Iterator[Problem]:
    """Yield what the device's limits do not allow; what a device does not say is no problem."""
    limits, advice = device.limits, device.advice
    hottest = state.hottest_celsius
    if limits.hottest_celsius is not None and hottest is not None and hottest > limits.hottest_celsius:
        reason = f"it is {hottest:.0f} °C warm, {limits.hottest_celsius:.0f} are allowed"
        yield Problem(about="heat", reason=reason, mend=advice.get("heat", "let it cool"), passes=True)
    if state.thermal_status is not None and state.thermal_status >= _THROTTLING:
        reason = f"it throttles (thermal status {state.thermal_status})"
        yield Problem(about="heat", reason=reason, mend="let it cool", passes=True)
    if slow := state.slow_clocks(state.pinned_khz):
        now, pinned = (clocks[slow[0]] / 1e6 for clocks in (state.clocks_khz, state.pinned_khz))
        reason = f"{slow[0]} runs at {now:.2f} GHz and is pinned to {pinned:.2f}"
        yield Problem(about="clocks", reason=reason, mend=advice.get("clocks", "let it cool"), passes=True)
    if (
        limits.battery_percent is not None
        and state.battery_percent is not None
        and state.battery_percent < limits.battery_percent
        and not state.ac_power
    ):
        reason = f"its battery is at {state.battery_percent:.0f} %"
        yield Problem(about="battery", reason=reason, mend="charge it")
    if limits.needs_ac_power and state.ac_power is False:
        yield Problem(about="battery", reason="it runs on battery", mend="plug it in")
    if state.emulated:
        reason = "its Python is built for another processor, and emulated"
        yield Problem(
            about="cores", reason=reason, mend="install python.org's ARM64 build, and name it in devices.toml"
        )
    if state.num_cores is not None:
        yield from _core_problems(state, state.num_cores, device, threads=threads)


def _core_problems(state: DeviceState, num_cores: int, device: Device, *, threads: int) -> Iterator[Problem]:
    if threads > num_cores:
        reason = f"{threads} threads on {num_cores} cores that are online"
        yield Problem(about="cores", reason=reason, mend=device.advice.get("power mode", f"--threads {num_cores}"))
    share = device.limits.load_per_core
    if share is not None and state.load is not None and state.load > share * num_cores:
        reason = f"other programs keep {state.load:.1f} of its {num_cores} cores busy"
        yield Problem(about="load", reason=reason, mend="stop them: top shows which", passes=True)

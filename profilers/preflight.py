"""Whether a device is in a state that is worth measuring, and what mends it."""

from collections.abc import Iterator
from dataclasses import dataclass

from dilap.errors import Unfit
from dilap.profilers.devices import Device
from dilap.types import DeviceState

_THROTTLING = 1  # Android's thermal status: 0 is none, 1 light


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What is wrong with a device's state, and what to do about it."""

    reason: str
    mend: str


def require_fit(state: DeviceState, device: Device, *, threads: int, force: bool) -> tuple[str, ...]:
    """Raises Unfit where the state is not worth measuring; with `force`, the reasons that were overridden."""
    problems = list(find_problems(state, device, threads=threads))
    if problems and not force:
        found = "; ".join(f"{problem.reason} ({problem.mend})" for problem in problems)
        raise Unfit(f"{device.label} is not fit to be measured: {found}; --force measures all the same, and says so")
    return tuple(problem.reason for problem in problems)


def find_problems(state: DeviceState, device: Device, *, threads: int) -> Iterator[Problem]:
    """What the device's limits do not allow; what a device does not say is no problem."""
    limits, advice = device.limits, device.advice
    hottest = state.hottest_celsius
    if limits.hottest_celsius is not None and hottest is not None and hottest > limits.hottest_celsius:
        yield Problem(
            reason=f"it is {hottest:.0f} °C warm, {limits.hottest_celsius:.0f} are allowed",
            mend=advice.get("heat", "let it cool"),
        )
    if state.thermal_status is not None and state.thermal_status >= _THROTTLING:
        yield Problem(reason=f"it throttles (thermal status {state.thermal_status})", mend="let it cool")
    if (
        limits.battery_percent is not None
        and state.battery_percent is not None
        and state.battery_percent < limits.battery_percent
        and not state.ac_power
    ):
        yield Problem(reason=f"its battery is at {state.battery_percent:.0f} %", mend="charge it")
    if limits.needs_ac_power and state.ac_power is False:
        yield Problem(reason="it runs on battery", mend="plug it in")
    if state.num_cores is not None:
        if threads > state.num_cores:
            yield Problem(
                reason=f"{threads} threads on {state.num_cores} cores that are online",
                mend=advice.get("power mode", f"--threads {state.num_cores}"),
            )
        allowed = None if limits.load_per_core is None else limits.load_per_core * state.num_cores
        if allowed is not None and state.load is not None and state.load > allowed:
            yield Problem(
                reason=f"other programs keep {state.load:.1f} of its {state.num_cores} cores busy",
                mend="stop them: top shows which",
            )

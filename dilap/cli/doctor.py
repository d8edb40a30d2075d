"""What can be used from this machine, and why not the rest."""

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass

from dilap import backends
from dilap.errors import DilapError
from dilap.profilers.devices import Device, Registry
from dilap.profilers.preflight import find_problems
from dilap.types import DeviceState

_SLOW_GOVERNORS = {"powersave", "schedutil", "ondemand", "conservative"}  # they let clocks fall between two samples


@dataclass(frozen=True, kw_only=True)
class Check:
    """A runtime, a device or a step of looking at one; `reason` says what was found, or what is wrong and mends it."""

    kind: str
    name: str
    usable: bool
    reason: str


def examine(registry: Registry) -> Iterator[Check]:
    """Every runtime here and every device that DiLAP knows."""
    for name in backends.BACKENDS:
        backend = backends.get(name)
        reason = backend.unavailable()
        yield Check(kind="runtime", name=name, usable=reason is None, reason=reason or backend.version())
    yield from list_devices(registry)


def list_devices(registry: Registry) -> Iterator[Check]:
    """Every device, and where it is; nothing is asked of it."""
    for device in registry.all():
        reason = device.unavailable()
        found = f"{device.description}{device.where()}; runtimes: {', '.join(device.backends)}"
        yield Check(kind="device", name=device.label, usable=reason is None, reason=reason or found)


def check_devices(devices: Sequence[Device]) -> Iterator[Check]:
    """Look at every one of a kind."""
    for device in devices:
        yield Check(kind="device", name=device.label, usable=True, reason=f"{device.description}{device.where()}")
        yield from check_device(device)


def check_device(device: Device) -> Iterator[Check]:
    """Look at a device step by step, as far as it can be reached."""

    def step(name: str, *, usable: bool, reason: str) -> Check:
        return Check(kind="check", name=name, usable=usable, reason=reason)

    if reason := device.unavailable():
        yield step("address", usable=False, reason=reason)
        return
    try:
        yield step("connection", usable=True, reason=device.greet())
        yield step("free space", usable=True, reason=f"{device.free_bytes() / 1e9:.1f} GB for models")
    except DilapError as error:
        yield step("connection", usable=False, reason=str(error))
        return
    state: DeviceState | None = None
    for backend in device.backends:
        check, seen = _check_runtime(device, backend)
        yield check
        state = seen or state
    if state is not None:
        yield from _check_state(state, device)


def _check_runtime(device: Device, backend: str) -> tuple[Check, DeviceState | None]:
    """Whether models can be timed in a runtime there, and the device's state where one can."""
    try:
        with closing(device.open(backend)) as instrument:
            found = f"{instrument.fingerprint.runtime_version}; {instrument.fingerprint.runtime_build}"
            return Check(kind="check", name=backend, usable=True, reason=found), instrument.state()
    except DilapError as error:
        return Check(kind="check", name=backend, usable=False, reason=str(error)), None


def _check_state(state: DeviceState, device: Device) -> Iterator[Check]:
    """The power mode, the clocks and what preflight would refuse."""
    advice = device.advice
    pinned = state.governor not in _SLOW_GOVERNORS
    clocks = ", ".join(f"{name} {clock / 1e6:.2f} GHz" for name, clock in state.clocks_khz.items()) or "not told"
    hint = "" if pinned else f"; they move while measuring: {advice.get('clocks', 'choose the governor performance')}"
    yield Check(kind="check", name="power mode", usable=True, reason=_with(state.power_mode, advice.get("power mode")))
    yield Check(kind="check", name="clocks", usable=pinned, reason=f"{state.governor}; {clocks}{hint}")
    warmth = ", ".join(f"{name} {value:.0f} °C" for name, value in state.temperatures_celsius.items()) or "not told"
    throttled = "" if state.throttle_events is None else f"; throttled {state.throttle_events} times since it started"
    yield Check(kind="check", name="heat", usable=True, reason=f"{warmth}{throttled}")
    problems = list(find_problems(state, device, threads=device.default_threads()))
    for problem in problems:
        yield Check(kind="check", name="fitness", usable=False, reason=_with(problem.reason, problem.mend))
    if not problems:
        yield Check(kind="check", name="fitness", usable=True, reason="fit to be measured")


def _with(found: str, advice: str | None) -> str:
    return f"{found} ({advice})" if advice else found


def line(check: Check) -> str:
    return f"{'ok  ' if check.usable else 'no  '}{check.kind:8}{check.name:14}{check.reason}"

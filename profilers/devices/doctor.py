"""Find out what can be used from this machine, and why the rest cannot."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from dilap import backends
from dilap.core.errors import DilapError, LinkLost
from dilap.core.measurement import DeviceState
from dilap.core.printable import printable
from dilap.core.shape import Architecture, LayerWidths
from dilap.core.workload import Workload
from dilap.profilers.devices import device as devices
from dilap.profilers.devices.device import Device, Registry
from dilap.profilers.devices.preflight import find_problems
from dilap.profilers.profiler import Case, Profiler

_ROOM_BYTES = 1e9  # room for a model and a block of probes
TINY = Architecture(
    family="llama",
    hidden_size=64,
    head_dim=16,
    vocab_size=256,
    tied_embeddings=False,
    ffn_matrices=3,
    norm_vectors=1,
    qkv_bias=False,
    out_bias=False,
    ffn_bias=False,
    qk_norm=False,
    num_positions=0,
    layers=(LayerWidths(num_heads=4, num_kv_heads=2, num_channels=96),),
)
_FLOATS = ("f32", "f16", "bf16")


@dataclass(frozen=True, kw_only=True)
class Check:
    """The result of looking at a runtime, at a device or at one thing about a device.

    `reason` says what was found, or what is wrong and what mends it; `paste` has the lines that a file lacks.
    """

    kind: str
    name: str
    usable: bool
    reason: str
    paste: tuple[str, ...] = ()


def examine(registry: Registry) -> Iterator[Check]:
    """Yield a check of every runtime here, tried on tiny models, and of every device that DiLAP knows."""
    for name in backends.BACKENDS:
        yield _try_runtime(name)
    yield from list_devices(registry)


def _try_runtime(name: str) -> Check:
    """Check that a runtime reads and decodes a tiny model in every quantised precision that it offers.

    Floats are not enough: some builds of llama.cpp run them and crash on quantised models.
    """
    backend = backends.get(name)
    if reason := backend.unavailable():
        return Check(kind="runtime", name=name, usable=False, reason=reason)
    ran = []
    for precision in [one for one in backend.precisions() if one not in _FLOATS] or backend.precisions()[:1]:
        try:
            _run_tiny(name, precision)
        except DilapError as error:
            return Check(kind="runtime", name=name, usable=False, reason=f"{precision}: {error}")
        ran.append(precision)
    return Check(kind="runtime", name=name, usable=True, reason=f"{backend.version()}, ran {', '.join(ran)}")


def _run_tiny(name: str, precision: str) -> None:
    """Write a model of random weights and run a prompt and a token of it, in the runtime's own process.

    Raises Crashed where that died, and what else writing and running raises.
    """
    from dilap import export  # torch: seconds that --list-devices should not cost

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "tiny"
        artifact = export.get(name).export_probe(TINY, precision=precision, seed=0, out=out)
        profiler = Profiler(devices.get("host_cpu"), backend=name, force=True)
        for phase in ("prefill", "decode"):
            workload = Workload(phase=phase, prompt_tokens=8, context=8, precision=precision)
            profiler.try_once(Case(path=out / artifact.path, workload=workload))


def list_devices(registry: Registry) -> Iterator[Check]:
    """Yield every device, and where it is; the devices themselves are not asked."""
    for device in registry.all():
        reason = device.unavailable()
        found = f"{device.description}{device.where()}; runtimes: {', '.join(device.backends)}"
        yield Check(kind="device", name=device.label, usable=reason is None, reason=reason or found)


def check_devices(devices: Sequence[Device], *, file: Path) -> Iterator[Check]:
    """Check each of these devices, step by step; `file` is the one that says where devices are."""
    for device in devices:
        yield Check(kind="device", name=device.label, usable=True, reason=f"{device.description}{device.where()}")
        yield from check_device(device, file=file)


def check_device(device: Device, *, file: Path) -> Iterator[Check]:
    """Check a device step by step, as far as it can be reached."""

    def step(name: str, *, usable: bool, reason: str, paste: tuple[str, ...] = ()) -> Check:
        return Check(kind="check", name=name, usable=usable, reason=reason, paste=paste)

    if device.unavailable():
        yield step("address", usable=False, reason=f"it is not known; paste into {file}", paste=device.entry)
        return
    try:
        yield step("connection", usable=True, reason=device.greet())
        free = device.free_bytes()
        advice = "" if free > _ROOM_BYTES else "; free some, or give another folder in devices.toml"
        yield step("free space", usable=not advice, reason=f"{free / 1e9:.1f} GB for models{advice}")
    except DilapError as error:
        yield step("connection", usable=False, reason=str(error))
        return
    state: DeviceState | None = None
    for backend in device.backends:
        check, seen = _check_runtime(device, backend)
        yield check
        state = seen or state
    if state is None:
        yield step("runtime", usable=False, reason="none can be used there: mend one of those above")
        return
    yield from _check_state(state, device)


def _check_runtime(device: Device, backend: str) -> tuple[Check, DeviceState | None]:
    """Check that models can be timed in a runtime there; return the device's state too where they can."""
    try:
        with closing(device.open(backend)) as instrument:
            found = f"{instrument.fingerprint.runtime_version}; {instrument.fingerprint.runtime_build}"
            return Check(kind="runtime", name=backend, usable=True, reason=found), instrument.state()
    except DilapError as error:
        # A lost link is told with the advice to look at the device, as is done here.
        reason = str(error.__cause__ if isinstance(error, LinkLost) and error.__cause__ else error)
        return Check(kind="runtime", name=backend, usable=False, reason=reason), None


def _check_state(state: DeviceState, device: Device) -> Iterator[Check]:
    """Yield what the device says of itself; where preflight would refuse it, why, and what mends it."""
    problems = {one.about: one for one in find_problems(state, device, threads=device.default_threads())}
    for about, found in _findings(state, device):
        problem = problems.get(about)
        reason = found if problem is None else f"{problem.reason}: {problem.mend}"
        yield Check(kind="check", name=about, usable=problem is None, reason=reason)


def _findings(state: DeviceState, device: Device) -> Iterator[tuple[str, str]]:
    """Yield everything that a measurement depends on, with advice where it could be better."""
    advice = device.advice
    is_fastest = state.power_mode in device.fastest_modes
    yield "power mode", state.power_mode + _hint("" if is_fastest else advice.get("power mode", ""))
    clocks = ", ".join(f"{name} {clock / 1e6:.2f} GHz" for name, clock in state.clocks_khz.items())
    is_pinned = state.governor == "performance" or (clocks and set(state.clocks_khz) == set(state.pinned_khz))
    yield "clocks", f"{state.governor}; {clocks or 'not told'}" + _hint("" if is_pinned else advice.get("clocks", ""))
    warmth = ", ".join(f"{name} {value:.0f} °C" for name, value in state.temperatures_celsius.items()) or "not told"
    yield "heat", warmth + _counted("throttled", state.throttle_events)
    plugged = {True: "plugged in", False: "on battery", None: "not told"}[state.ac_power]
    yield "battery", plugged if state.battery_percent is None else f"{plugged}, {state.battery_percent:.0f} %"
    yield "load", "not told" if state.load is None else f"{state.load:.1f} cores"
    yield "cores", f"{state.num_cores} online, running on {state.affinity}"


def _hint(advice: str) -> str:
    return f" (better: {advice})" if advice else ""


def _counted(what: str, times: int | None) -> str:
    return "" if times is None else f"; {what} {times} times since it started"


def lines(check: Check) -> list[str]:
    """Return a check as the line that says what was found, and those to paste below it."""
    first = printable(f"{'ok  ' if check.usable else 'no  '}{check.kind:8}{check.name:14} {check.reason}")
    return [first, *(f"    {one}" for one in check.paste)]

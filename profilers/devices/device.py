"""The devices that DiLAP knows by name: what they are, and where the user's are."""

import difflib
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path

from dilap import backends
from dilap.backends import host
from dilap.core.errors import InvalidInput, LinkLost, Unavailable
from dilap.profilers.instruments.agent import AgentClient, Connection, Instrument, LocalConnection, RemoteConnection
from dilap.profilers.instruments.phone import Phone
from dilap.profilers.instruments.runners import RUNNERS, find_runner
from dilap.profilers.links.adb import AdbTransport
from dilap.profilers.links.shells import posix, powershell
from dilap.profilers.links.ssh import SshAddress, SshTransport
from dilap.profilers.links.store import Store, posix_programs, python_programs
from dilap.profilers.links.transports import Transport


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The state in which a device is fit to be measured; None sets no limit."""

    hottest_celsius: float | None = None
    battery_percent: float | None = 30
    needs_ac_power: bool = False
    load_per_core: float | None = 0.5


@dataclass(frozen=True, kw_only=True)
class Location:
    """Where one device is: over ssh, or over adb by serial.

    `folder` is where DiLAP keeps files there, `python` what runs the agent, `runner` the timing program of a device
    without Python.
    """

    ssh: SshAddress | None = None
    adb: str | None = None
    folder: str
    python: str = "python3"
    windows: bool = False
    runner: str | None = None


@dataclass(frozen=True, kw_only=True)
class Reach:
    """What a runtime gets out of a processor: a share of its published peaks, and the seconds that an operator takes
    beside them, to be started and for threads to wait for one another.
    """

    share: float
    operator_seconds: float

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1 or self.operator_seconds < 0:
            raise ValueError(f"a share above 0 and up to 1, and seconds, got {self}")


# The best and the worst that published speeds of language models show, with a little room: tests have them one by one.
# Phones and laptops reach 48 to 65 % of their memory's peak with 1 to 8 billion weights, 29 % with a poor build; a
# model of 135 million takes 15 ms a token on the cores of an Orin Nano, which reads its weights in 1.
_OF_CPUS = (Reach(share=0.7, operator_seconds=2.5e-6), Reach(share=0.3, operator_seconds=32e-6))
# 96 % of an Orin NX's peak where a runtime's kernels are written for it, 31 % of an Orin Nano's in llama.cpp.
_OF_GPUS = (Reach(share=1.0, operator_seconds=0.5e-6), Reach(share=0.3, operator_seconds=20e-6))


@dataclass(frozen=True, kw_only=True)
class Device:
    """A device that models are measured on.

    `backends` are its runtimes, the default one first, each with the precision that ships there by default. `affinity`
    is the mask of the cores to run on, in hexadecimal without 0x; the cache's size stands here for a device that does
    not say it. Bandwidth and compute (of floats) are published peaks, for estimates alone, like `reach`, the best and
    the worst that runtimes get out of them; numbers of fewer bits are multiplied `quantised_gain` times as fast. A
    device that became slower is given rests of `back_off_seconds`, of twice that, and so on, `max_back_offs` times.
    `advice` are commands that mend a state, by what they are about; `fastest_modes` are power modes that need no
    advice.
    """

    name: str
    description: str
    transport: str
    backends: Mapping[str, str]
    num_threads: int | None = None
    affinity: str | None = None
    last_level_cache_bytes: int = 0
    bytes_per_second: float | None = None
    flops_per_second: float | None = None
    quantised_gain: float = 4.0  # Arm's and x86's dot products take four 8-bit numbers in the place of a float
    reach: tuple[Reach, Reach] = _OF_CPUS
    limits: Limits = field(default_factory=Limits)
    back_off_seconds: float = 15.0
    max_back_offs: int = 4
    fastest_modes: tuple[str, ...] = ()
    advice: Mapping[str, str] = field(default_factory=dict)
    location: Location | None = None
    number: int = 1

    @property
    def label(self) -> str:
        """The name, and the number where it is not the first of its kind."""
        return self.name if self.number == 1 else f"{self.name}:{self.number}"

    def unavailable(self) -> str | None:
        """Return why the device cannot be used; None where that can be tried."""
        if self.transport == "local" or self.location is not None:
            return None
        head, where = self.entry
        return (
            f"it is not known where your {self.name} ({self.description}) is: write {head} and {where} into "
            f"devices.toml, then look with dilap-profile --check {self.name}; without the device: "
            "dilap-prune --estimate"
        )

    @property
    def entry(self) -> tuple[str, str]:
        """The lines that devices.toml lacks where it is not known where the device is."""
        return f"[{self.name}]", 'adb = "SERIAL"' if self.transport == "adb" else 'ssh = "user@host"'

    def where(self) -> str:
        """Return the words ` at ADDRESS` to put behind a description; empty for a device without one."""
        if self.location is None:
            return ""
        return f" at {self.location.adb or (self.location.ssh and self.location.ssh.destination)}"

    def greet(self) -> str:
        """Reach the device and return what it says it is. Raises Unavailable, with advice, where it is not reached."""
        if self.location is None:
            return f"this machine, {host.processor()}"
        with closing(self.transport_to()) as transport:
            argv = ["cmd", "/c", "ver"] if self.location.windows else ["uname", "-srm"]
            return transport.run(argv, seconds=30).checked(f"{argv[0]} on {self.label}").strip()

    def free_bytes(self) -> int:
        """Return the free bytes in the folder where models are kept there."""
        if self.location is None:
            return shutil.disk_usage(tempfile.gettempdir()).free
        with closing(self.transport_to()) as transport:
            return self._store(transport).free_bytes()

    def open(self, backend: str) -> Instrument:
        """Return the device, ready to time models in a runtime. Raises Unavailable."""
        if reason := self.unavailable():
            raise Unavailable(reason)
        try:
            if self.location is not None and self.location.adb is not None:
                return self._open_phone(backend, self.location)
            return AgentClient(self.connect(), backend=backend, device=self.name, affinity=self.affinity)
        except LinkLost as error:
            raise LinkLost(f"{error}; look at it with: dilap-profile --check {self.label}") from error

    def _open_phone(self, backend: str, location: Location) -> Phone:
        """Return a phone with its runner. Raises InvalidInput where that is missing, or is of another runtime."""
        if location.runner is None:
            raise InvalidInput(
                f"{self.label} has no Python: give a timing program that was built for it with --runner "
                f"({', '.join(RUNNERS)})"
            )
        program = Path(location.runner).expanduser()
        runner = find_runner(program)
        if runner.backend != backend:
            raise InvalidInput(f"{program} times {runner.backend}, not {backend}: choose --backend {runner.backend}")
        with ExitStack() as stack:
            transport = stack.enter_context(closing(self.transport_to()))
            phone = Phone(
                transport,
                self._store(transport),
                runner=runner,
                program=program,
                device=self.name,
                affinity=self.affinity,
                cache_bytes=self.last_level_cache_bytes,
            )
            stack.pop_all()  # from now on it is the phone that closes the transport
            return phone

    def connect(self) -> Connection:
        """Return a connection to the device's Python. Raises Unavailable."""
        if reason := self.unavailable():
            raise Unavailable(reason)
        if self.location is None:
            return LocalConnection()
        transport = self.transport_to()
        return RemoteConnection(transport, files=self._store(transport), python=self.location.python)

    def transport_to(self) -> Transport:
        """Return the transport to a device that is not this machine. Raises Unavailable."""
        assert self.location is not None
        if self.location.adb is not None:
            return AdbTransport(self.location.adb)
        assert self.location.ssh is not None
        return SshTransport(self.location.ssh, shell=powershell if self.location.windows else posix)

    def _store(self, transport: Transport) -> Store:
        assert self.location is not None
        programs = python_programs(self.location.python) if self.location.windows else posix_programs()
        return Store(transport, folder=self.location.folder, programs=programs)

    def default_precision(self, backend: str) -> str:
        """Return the precision that ships here in that runtime. Raises InvalidInput where the device has not got it."""
        self.require_runtime(backend)
        return self.backends[backend]

    def require_runtime(self, backend: str) -> None:
        """Raise InvalidInput, listing the device's runtimes, where it has not got that one."""
        if backend not in self.backends:
            backends.get(backend)  # one that there is nowhere has an error of its own
            raise InvalidInput(f"{self.name} has no {backend}; it runs {', '.join(self.backends)}")

    def default_threads(self) -> int:
        """Return the preset number of threads, or else all physical cores; the profiler notices other load on them."""
        return self.num_threads or host.num_physical_cores()


# Modes are chosen by name, because their numbers differ between modules and JetPacks.
_JETSON_MODES = ("MAXN", "MAXN_SUPER")
_JETSON_ADVICE = {
    "clocks": "sudo jetson_clocks",
    "power mode": "grep POWER_MODEL /etc/nvpmodel.conf lists the modes by name and ID; sudo nvpmodel -m ID sets one",
    "heat": "let it cool, or give it a fan: sudo jetson_clocks --fan",
}
# On the CPUs of devices, models ship with 4 bits by default: decoding reads every weight once a token, and a latency
# table in another precision does not transfer. Runtimes repack Q4_0 and blocks of 32 for Arm's dot products when they
# load.
DEVICES: Mapping[str, Device] = {
    device.name: device
    for device in (
        # Any load is seen while measuring, and a laptop may be used on battery: its owner knows.
        Device(
            name="host_cpu",
            description="this machine's CPU",
            transport="local",
            backends={"llamacpp": "q4_0", "onnxruntime": "int4", "executorch": "8da4w"},
            limits=Limits(battery_percent=None, load_per_core=None),
            back_off_seconds=1.0,
            max_back_offs=2,
            bytes_per_second=20e9,  # two channels of DDR4 as one process gets them; a guess, like the next
            flops_per_second=100e9,
        ),
        # Orin NX 16 GB: 102.4 GB/s of LPDDR5; 32 tensor cores at 0.918 GHz, 256 f16 multiply-adds each.
        Device(
            name="jetson_gpu",
            description="Jetson Orin GPU, TensorRT",
            transport="ssh",
            backends={"tensorrt": "f16"},
            num_threads=1,
            bytes_per_second=102.4e9,
            flops_per_second=15.0e12,
            quantised_gain=2.0,
            reach=_OF_GPUS,
            limits=Limits(hottest_celsius=60),
            fastest_modes=_JETSON_MODES,
            advice=_JETSON_ADVICE,
        ),
        # The smallest Orin has 6 Cortex-A78AE: 1.5 GHz, two 128-bit pipes of 4 multiply-adds.
        Device(
            name="jetson_cpu",
            description="Jetson Orin CPU",
            transport="ssh",
            backends={"llamacpp": "q4_0", "onnxruntime": "int4"},
            num_threads=6,
            bytes_per_second=68e9,
            flops_per_second=144e9,
            limits=Limits(hottest_celsius=60),
            fastest_modes=_JETSON_MODES,
            advice=_JETSON_ADVICE,
        ),
        # X1P-42-100: LPDDR5x-8448 on 128 bits; 8 Oryon at 3.2 GHz, four 128-bit pipes.
        Device(
            name="snapdragon_x",
            description="Snapdragon X Plus laptop",
            transport="ssh",
            backends={"onnxruntime": "int4", "llamacpp": "q4_0"},
            num_threads=8,
            bytes_per_second=135e9,
            flops_per_second=819e9,
            limits=Limits(needs_ac_power=True),
            fastest_modes=("High performance", "Ultimate Performance", "performance"),
            advice={"power mode": "powercfg /setactive 8c5e7fda-e8bf-4a96-9a85-a6e23a8c635c"},
        ),
        # XNNPACK delegates no bf16. Cores 3 to 7 are the A715, A710 and X3; 8.5 GT/s LPDDR5X on 64 bits.
        Device(
            name="s23",
            description="Samsung S23",
            transport="adb",
            backends={"executorch": "8da4w", "llamacpp": "q4_0"},
            num_threads=5,
            affinity="f8",
            last_level_cache_bytes=8 << 20,
            bytes_per_second=67e9,
            flops_per_second=240e9,
            limits=Limits(hottest_celsius=37),
            fastest_modes=("normal",),
            advice={
                "clocks": "adb shell cmd power set-fixed-performance-mode-enabled true",
                "heat": "take it out of its case, off the charger, and wait",
                "power mode": "adb shell settings put global low_power 0",
            },
        ),
    )
}


@dataclass(frozen=True)
class Registry:
    """The presets by name, and the user's devices of each kind."""

    located: Mapping[str, tuple[Device, ...]] = field(default_factory=dict)

    def all(self) -> list[Device]:
        """Return the user's devices, and the presets of the kinds of which the user has none."""
        return [device for name, preset in DEVICES.items() for device in self.located.get(name, (preset,))]

    def get(self, name: str) -> Device:
        """Return the device of that name, or of `NAME:2`, the second of its kind. Raises InvalidInput, listing all."""
        known = {device.label: device for device in self.all()}
        name = name.removesuffix(":1")
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else "."
            raise InvalidInput(f"unknown device {name!r}{hint} Known: {', '.join(known)}")
        return known[name]

    def group(self, name: str) -> tuple[Device, ...]:
        """Return all devices of the kind `name`, or the one that `NAME:2` names. Raises InvalidInput."""
        return self.located.get(name) or (self.get(name),)


def get(name: str) -> Device:
    """Return the preset of that name. Raises InvalidInput, listing the known ones."""
    return Registry().get(name)

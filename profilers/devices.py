"""The devices that DiLAP knows by name."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass

from dilap.backends import host
from dilap.errors import InvalidInput, Unavailable
from dilap.profilers.transports import LocalTransport, Transport


@dataclass(frozen=True, kw_only=True)
class Device:
    """A target. `backends` are the runtimes that this version offers there, the default first."""

    name: str
    description: str
    transport: str
    backends: tuple[str, ...] = ()

    def unavailable(self) -> str | None:
        """Why the device cannot be reached; None where it can."""
        if self.transport == "local":
            return None
        return (
            f"device {self.name} ({self.description}) needs the {self.transport} transport, which this version does "
            "not have yet: it measures on host_cpu only"
        )

    def connect(self) -> Transport:
        """A way to the device. Raises Unavailable."""
        if reason := self.unavailable():
            raise Unavailable(reason)
        return LocalTransport()

    def default_threads(self) -> int:
        """All physical cores; other load on them is noticed by the profiler, not avoided. Raises Unavailable."""
        if reason := self.unavailable():
            raise Unavailable(reason)
        return host.num_physical_cores()


DEVICES: Mapping[str, Device] = {
    device.name: device
    for device in (
        Device(
            name="host_cpu",
            description="this machine's CPU",
            transport="local",
            backends=("llamacpp", "onnxruntime", "executorch"),
        ),
        Device(name="jetson_gpu", description="Jetson Orin GPU, TensorRT", transport="ssh", backends=("tensorrt",)),
        Device(name="jetson_cpu", description="Jetson Orin CPU", transport="ssh"),
        Device(name="snapdragon_x", description="Snapdragon X Plus laptop", transport="ssh"),
        Device(name="s23", description="Samsung S23", transport="adb"),
    )
}


def get(name: str) -> Device:
    """The device of that name. Raises InvalidInput with the known ones."""
    if name not in DEVICES:
        close = difflib.get_close_matches(name, DEVICES, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else "."
        raise InvalidInput(f"unknown device {name!r}{hint} Known: {', '.join(DEVICES)}")
    return DEVICES[name]

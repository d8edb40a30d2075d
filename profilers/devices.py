"""The devices that DiLAP knows by name."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass

from dilap import backends
from dilap.backends import host
from dilap.errors import InvalidInput, Unavailable
from dilap.profilers.transports import LocalTransport, Transport


@dataclass(frozen=True, kw_only=True)
class Device:
    """A target. `backends` are its runtimes, each with the precision that ships there by default; the default first."""

    name: str
    description: str
    transport: str
    backends: Mapping[str, str]

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

    def default_precision(self, backend: str) -> str:
        """What ships here in that runtime; the runtime's own default where the device is not known to have it."""
        return self.backends.get(backend) or backends.get(backend).precisions()[0]

    def default_threads(self) -> int:
        """All physical cores; other load on them is noticed by the profiler, not avoided. Raises Unavailable."""
        if reason := self.unavailable():
            raise Unavailable(reason)
        return host.num_physical_cores()


# What ships on a CPU by default has 4 bits: decoding reads every weight once a token, and a latency table in another
# precision does not transfer. Runtimes repack Q4_0 and blocks of 32 for Arm's dot products when they load.
DEVICES: Mapping[str, Device] = {
    device.name: device
    for device in (
        Device(
            name="host_cpu",
            description="this machine's CPU",
            transport="local",
            backends={"llamacpp": "f16", "onnxruntime": "int4", "executorch": "8da4w"},
        ),
        Device(
            name="jetson_gpu",
            description="Jetson Orin GPU, TensorRT",
            transport="ssh",
            backends={"tensorrt": "f16"},
        ),
        Device(
            name="jetson_cpu",
            description="Jetson Orin CPU",
            transport="ssh",
            backends={"llamacpp": "q4_0", "onnxruntime": "int4"},
        ),
        Device(
            name="snapdragon_x",
            description="Snapdragon X Plus laptop",
            transport="ssh",
            backends={"onnxruntime": "int4", "llamacpp": "q4_0"},
        ),
        # XNNPACK delegates no bf16
        Device(name="s23", description="Samsung S23", transport="adb", backends={"executorch": "8da4w"}),
    )
}


def get(name: str) -> Device:
    """The device of that name. Raises InvalidInput with the known ones."""
    if name not in DEVICES:
        close = difflib.get_close_matches(name, DEVICES, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else "."
        raise InvalidInput(f"unknown device {name!r}{hint} Known: {', '.join(DEVICES)}")
    return DEVICES[name]

"""A phone as an instrument: what it says of itself, and models timed by a runner program on it."""

import hashlib
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from dilap.core.codec import file_sha256
from dilap.core.errors import LinkLost
from dilap.core.measurement import DeviceState, Fingerprint
from dilap.core.workload import Workload
from dilap.profilers.instruments.agent import Loaded, Sampled
from dilap.profilers.instruments.runners import Job, Runner, RunnerSession, pinned
from dilap.profilers.links.store import Files
from dilap.profilers.links.transports import Transport

_MEMORY_STEP = 256 << 20  # memory is rounded to it: what a kernel keeps for itself changes with its version
# Fields that a phone does not give to a shell are printed as nothing.
_STATE = """\
echo "load $(cat /proc/loadavg)"
echo "cores $(nproc)"
echo "low_power $(settings get global low_power)"
echo "governor $(cat /sys/devices/system/cpu/cpu0/cpufreq/scaling_governor)"
for policy in /sys/devices/system/cpu/cpufreq/policy*; do
  cd "$policy" && echo "clock ${policy##*/} $(cat scaling_cur_freq) $(cat scaling_min_freq) $(cat scaling_max_freq)"
done
dumpsys battery
dumpsys thermalservice
"""
_IDENTITY = """\
echo "machine $(uname -m)"
echo "kernel $(uname -r)"
echo "soc $(getprop ro.soc.model)"
echo "model $(getprop ro.product.model)"
echo "serial $(getprop ro.serialno)"
echo "build $(getprop ro.build.fingerprint)"
echo "cores $(nproc)"
echo "memory $(grep MemTotal /proc/meminfo)"
"""


def parse_state(output: str, *, affinity: str) -> DeviceState:
    """Return the state that the output of `_STATE` describes.

    The temperatures are the battery's and the skin's, because the cores themselves are hot whenever they work.
    """

    def found(pattern: str) -> str | None:
        match = re.search(pattern, output, re.MULTILINE)
        return match[1] if match else None

    def number(pattern: str) -> float | None:
        text = found(pattern.replace("NUMBER", r"([0-9]{1,9}(?:\.[0-9]{1,9})?)"))
        return float(text) if text is not None else None

    tenths, skin = number(r"^\s*temperature: NUMBER$"), number(r"mValue=NUMBER, mType=3\b")
    temperatures = {} if tenths is None else {"battery": tenths / 10}
    if skin is not None:
        temperatures["skin"] = skin
    status, cores = found(r"^Thermal Status: ([0-9]{1,3})$"), found(r"^cores ([0-9]{1,5})$")
    clocks = re.findall(r"^clock (\S+) ([0-9]{1,12})(?: ([0-9]{1,12}) ([0-9]{1,12}))?\s*$", output, re.MULTILINE)
    powered = re.findall(r"^\s*(?:AC|USB|Wireless) powered: (true|false)", output, re.MULTILINE)
    return DeviceState(
        power_mode={"0": "normal", "1": "low power"}.get(found(r"^low_power (\d)") or "", "unknown"),
        governor=found(r"^governor (\S+)") or "unknown",
        num_cores=int(cores) if cores else None,
        affinity=affinity,
        clocks_khz={name: int(now) for name, now, _, _ in clocks},
        pinned_khz={name: int(high) for name, _, low, high in clocks if high and low == high},
        temperatures_celsius=temperatures,
        thermal_status=int(status) if status else None,
        ac_power="true" in powered if powered else None,
        battery_percent=number(r"^\s*level: NUMBER$"),
        load=number(r"^load NUMBER\b"),
    )


class Phone:
    """A phone over adb. It has no Python: a runner program times the models, and shell commands do the rest."""

    def __init__(
        self,
        transport: Transport,
        files: Files,
        *,
        runner: Runner,
        program: Path,
        device: str,
        affinity: str | None,
        cache_bytes: int,
    ) -> None:
        self._transport, self._files, self._runner = transport, files, runner
        self._affinity = affinity
        self._sessions: dict[int, RunnerSession] = {}
        self._program = self._place(program, beside={path.name: path for path in program.parent.glob("*.so")})
        self._transport.run(["chmod", "755", self._program], seconds=60).checked("chmod on the device")
        version = runner.check(transport, self._program)
        self.fingerprint = self._identify(
            device, version=f"{program.name}, {version}, sha256 {file_sha256(program)[:12]}", cache_bytes=cache_bytes
        )

    def load(
        self, path: Path, *, sha256: str, workload: Workload, companions: Mapping[str, str] | None = None
    ) -> Loaded:
        place = self._files.place(path, sha256=sha256, companions=companions or {})
        job = Job(model=place, local=path, workload=workload, prefix=tuple(pinned(self._affinity)), put=self._put_bytes)
        session = self._runner.open(self._transport, self._program, job)
        handle = len(self._sessions) + 1
        self._sessions[handle] = session
        return Loaded(handle=handle, load_seconds=session.load_seconds, peak_memory_bytes=session.peak_memory_bytes)

    def sample(self, handle: int, count: int, *, lead_in_seconds: float = 0.0) -> Sampled:  # noqa: ARG002
        """Time a model; runners lead in by one run of their own, which is enough for the caches of a phone."""
        samples = self._sessions[handle].sample(count)
        return Sampled(samples_ns=tuple(samples), seconds=sum(samples) / 1e9, other_seconds=None)

    def average_memory(self, handle: int, runs: int) -> int | None:
        return self._sessions[handle].average_memory(runs)

    def divergence(self, handle: int, other: int, tokens: Sequence[int]) -> float | None:  # noqa: ARG002
        return None

    def state(self) -> DeviceState:
        said = self._transport.run(["sh", "-c", _STATE], seconds=60)
        return parse_state(said.stdout, affinity=self._affinity or "unknown")

    def close(self) -> None:
        for session in self._sessions.values():
            session.close()
        self._transport.close()

    def _identify(self, device: str, *, version: str, cache_bytes: int) -> Fingerprint:
        said = self._transport.run(["sh", "-c", _IDENTITY], seconds=60).stdout
        fields = dict(re.findall(r"^(\w+) (.*)$", said, re.MULTILINE))
        memory = re.search(r"([0-9]{1,12}) kB", fields.get("memory", ""))
        if not fields.get("machine") or memory is None or not re.fullmatch("[0-9]{1,5}", fields.get("cores", "")):
            raise LinkLost(f"the device answered {said[-200:]!r} when asked what it is; try again")
        serial = fields.get("serial", "")
        return Fingerprint(
            device=device,
            machine=fields["machine"],
            processor=fields.get("soc") or fields.get("model") or "unknown",
            num_cores=int(fields["cores"]),
            memory_bytes=round(int(memory[1]) * 1024 / _MEMORY_STEP) * _MEMORY_STEP,
            last_level_cache_bytes=cache_bytes,
            power_mode=self.state().power_mode,
            runtime=self._runner.backend,
            runtime_version=version,
            runtime_build=f"cores {self._affinity or 'any'}",
            serial_sha256=hashlib.sha256(serial.encode()).hexdigest()[:16] if serial else "",
            soft={"kernel": fields.get("kernel", ""), "build": fields.get("build", "")},
        )

    def _place(self, path: Path, *, beside: Mapping[str, Path]) -> str:
        companions = {name: file_sha256(one) for name, one in beside.items()}
        return self._files.place(path, sha256=file_sha256(path), companions=companions)

    def _put_bytes(self, name: str, content: bytes) -> str:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / name
            path.write_bytes(content)
            return self._place(path, beside={})

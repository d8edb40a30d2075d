"""What dilap-profile says of devices: where they are, and what is wrong with one and mends it."""

import json
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import pytest
from standins.fabricated import FINGERPRINT
from standins.fake_job import call

from dilap import backends
from dilap.cli import profile
from dilap.core.errors import LinkLost, Unavailable
from dilap.core.measurement import DeviceState, Fingerprint
from dilap.profilers.devices import device as devices
from dilap.profilers.devices.device import Device
from dilap.profilers.devices.doctor import Check, check_device, lines
from dilap.profilers.instruments.agent import Instrument

TOML = """\
[[jetson_cpu]]
ssh = "me@orin"
[[jetson_cpu]]
ssh = "me@second"
[s23]
adb = "R5CT1234567"
"""
FILE = Path("here") / "devices.toml"
FIT = DeviceState(
    power_mode="MAXN",
    governor="schedutil",
    num_cores=6,
    clocks_khz={"policy0": 1_510_400},
    pinned_khz={"policy0": 1_510_400},
    temperatures_celsius={"tj": 45.0},
    throttle_events=0,
    load=0.2,
)


class Told:
    """An instrument that only says what it was given."""

    def __init__(self, state: DeviceState) -> None:
        self.fingerprint: Fingerprint = FINGERPRINT
        self._state = state

    def state(self) -> DeviceState:
        return self._state

    def close(self) -> None:
        """Nothing is open."""


@dataclass(frozen=True, kw_only=True)
class Reached(Device):
    """A device that answers; `runtimes` are the errors of those that are missing."""

    state: DeviceState = FIT
    free: float = 50e9
    unreached: str | None = None
    missing: dict[str, str | LinkLost] = field(default_factory=dict)

    def unavailable(self) -> str | None:
        return None

    def greet(self) -> str:
        if self.unreached is not None:
            raise LinkLost(self.unreached)
        return "Linux 5.15.148-tegra aarch64"

    def free_bytes(self) -> int:
        return int(self.free)

    def open(self, backend: str) -> Instrument:
        if backend in self.missing:
            error = self.missing[backend]
            raise Unavailable(error) if isinstance(error, str) else error
        told: Any = Told(self.state)
        instrument: Instrument = told
        return instrument


def reached(kind: str = "jetson_cpu", **changes: Any) -> Reached:
    preset = devices.get(kind)
    return Reached(**{one.name: getattr(preset, one.name) for one in fields(preset)}, **changes)


def found(device: Device) -> dict[str, Check]:
    return {check.name: check for check in check_device(device, file=FILE)}


def wrong(device: Device) -> list[str]:
    return [check.name for check in check_device(device, file=FILE) if not check.usable]


def test_a_fit_device_passes_every_step() -> None:
    steps = [
        *["connection", "free space", "llamacpp", "onnxruntime"],
        *["power mode", "clocks", "heat", "battery", "load", "cores"],
    ]
    assert list(found(reached())) == steps
    assert wrong(reached()) == []


def test_a_device_that_is_nowhere_says_what_to_paste_where() -> None:
    check = found(devices.get("jetson_cpu"))["address"]
    assert (check.reason, check.paste) == (f"it is not known; paste into {FILE}", ("[jetson_cpu]", 'ssh = "user@host"'))


def test_a_check_does_not_advise_itself() -> None:
    lost = LinkLost("no answer; look at it with: dilap-profile --check jetson_cpu")
    lost.__cause__ = LinkLost("no answer")
    assert found(reached(missing={"llamacpp": lost}))["llamacpp"].reason == "no answer"


def test_a_device_out_of_reach_says_why_and_ends_there() -> None:
    checks = found(reached(unreached="Permission denied (publickey).; add your key there: ssh-copy-id me@orin"))
    assert "ssh-copy-id me@orin" in checks.pop("connection").reason
    assert checks == {}


def test_a_full_disk_says_what_to_do() -> None:
    check = found(reached(free=0.2e9))["free space"]
    assert not check.usable
    assert "another folder in devices.toml" in check.reason


def test_a_missing_runtime_is_named_with_the_command_that_installs_it() -> None:
    checks = found(reached(missing={"llamacpp": "no llama_cpp; pip install llama-cpp-python"}))
    assert not checks["llamacpp"].usable
    assert "pip install llama-cpp-python" in checks["llamacpp"].reason
    assert checks["onnxruntime"].usable


def test_a_device_without_any_runtime_is_not_usable() -> None:
    assert "runtime" in wrong(reached(missing={"llamacpp": "none", "onnxruntime": "none"}))


COMMANDS = {
    "power mode": ("jetson_cpu", DeviceState(power_mode="15W"), "sudo nvpmodel -m ID"),
    "clocks": ("jetson_cpu", DeviceState(clocks_khz={"policy0": 729_600}, governor="schedutil"), "sudo jetson_clocks"),
    "heat": ("jetson_gpu", DeviceState(temperatures_celsius={"tj": 71.0}), "sudo jetson_clocks --fan"),
    "battery": ("snapdragon_x", DeviceState(ac_power=False), "plug it in"),
    "load": ("jetson_cpu", DeviceState(num_cores=6, load=5.0), "top shows which"),
    "cores": ("jetson_cpu", DeviceState(num_cores=4), "sudo nvpmodel -m ID"),
}


@pytest.mark.parametrize("step", COMMANDS)
def test_every_finding_comes_with_what_mends_it(step: str) -> None:
    kind, state, command = COMMANDS[step]
    assert command in found(reached(kind, state=state))[step].reason


@pytest.mark.parametrize("step", ["heat", "battery", "load", "cores"])
def test_what_keeps_a_device_from_being_measured_is_wrong(step: str) -> None:
    kind, state, _ = COMMANDS[step]
    assert wrong(reached(kind, state=state)) == [step]


def test_pinned_clocks_need_no_advice() -> None:
    assert "jetson_clocks" not in found(reached())["clocks"].reason


def test_a_check_is_one_line() -> None:
    check = Check(kind="check", name="free space", usable=False, reason="0.2 GB for models")
    assert lines(check) == ["no  check   free space     0.2 GB for models"]


@pytest.fixture
def toml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "devices.toml"
    path.write_text(TOML)
    monkeypatch.setenv("DILAP_DEVICES", str(path))
    return path


@pytest.mark.usefixtures("toml")
def test_the_list_says_where_every_device_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(profile.main, "--list-devices") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [one.split()[2] for one in lines] == [
        *["host_cpu", "jetson_gpu", "jetson_cpu", "jetson_cpu:2", "snapdragon_x", "s23"]
    ]
    assert "at me@second" in lines[3]
    assert lines[4].startswith("no  ")


@pytest.mark.usefixtures("toml")
def test_the_list_can_be_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(profile.main, "--list-devices", "--json") == 0
    usable = {one["name"]: one["usable"] for one in json.loads(capsys.readouterr().out)}
    assert usable["s23"]
    assert not usable["jetson_gpu"]


def test_a_list_of_ones_own_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.toml").write_text('[snapdragon_x]\nssh = "me@laptop"\n')
    assert call(profile.main, "--list-devices", "--devices", tmp_path / "mine.toml") == 0
    assert "at me@laptop" in capsys.readouterr().out


def test_a_check_of_what_is_nowhere_exits_with_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(profile.main, "--check", "jetson_gpu") == 1
    assert "devices.toml\n    [jetson_gpu]\n    ssh = " in capsys.readouterr().out


def test_this_machine_is_looked_at_like_any_other() -> None:
    if reason := backends.get("llamacpp").unavailable():
        pytest.skip(reason)
    checks = found(replace(devices.get("host_cpu"), backends={"llamacpp": "f16"}))
    assert list(checks)[:4] == ["connection", "free space", "llamacpp", "power mode"]
    assert checks["llamacpp"].usable


def test_an_unknown_device_is_refused_with_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(profile.main, "--check", "jetson_cpuu") == 2
    assert "did you mean 'jetson_cpu'?" in capsys.readouterr().err.strip().splitlines()[-1]

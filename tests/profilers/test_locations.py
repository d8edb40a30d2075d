"""devices.toml, and the registry that it makes."""

from pathlib import Path

import pytest

from dilap.core.errors import InvalidInput
from dilap.profilers.devices.device import DEVICES, Registry
from dilap.profilers.devices.locations import read_registry

TWO = """
[[jetson_cpu]]
ssh = "nano@10.0.0.7"
port = 2222
identity_file = "~/.ssh/nano"
[[jetson_cpu]]
ssh = "second"
[s23]
adb = "R5CT $(id) 'x'"
"""


def read(tmp_path: Path, text: str) -> Registry:
    path = tmp_path / "devices.toml"
    path.write_text(text)
    return read_registry(path)


def test_several_of_a_kind_are_numbered(tmp_path: Path) -> None:
    group = read(tmp_path, TWO).group("jetson_cpu")
    assert [device.label for device in group] == ["jetson_cpu", "jetson_cpu:2"]


def test_one_of_several_can_be_named(tmp_path: Path) -> None:
    registry = read(tmp_path, TWO)
    (second,) = registry.group("jetson_cpu:2")
    assert (second.name, second.where()) == ("jetson_cpu", " at second")
    assert registry.get("jetson_cpu:1") == registry.get("jetson_cpu")


def test_an_address_is_what_the_file_says(tmp_path: Path) -> None:
    location = read(tmp_path, TWO).get("jetson_cpu").location
    assert location is not None
    assert location.ssh is not None
    assert location.ssh.options()[-3:] == ["-oPort=2222", "-i", str(Path("~/.ssh/nano").expanduser())]


def test_a_serial_may_hold_anything(tmp_path: Path) -> None:
    location = read(tmp_path, TWO).get("s23").location
    assert location is not None
    assert location.adb == "R5CT $(id) 'x'"


def test_what_is_not_in_the_file_is_a_preset(tmp_path: Path) -> None:
    registry = read(tmp_path, TWO)
    assert registry.get("host_cpu") == DEVICES["host_cpu"]
    assert "devices.toml" in str(registry.get("jetson_gpu").unavailable())


def test_a_snapdragon_runs_windows_unless_told_otherwise(tmp_path: Path) -> None:
    text = '[[snapdragon_x]]\nssh = "a"\n[[snapdragon_x]]\nssh = "b"\nsystem = "linux"'
    locations = [device.location for device in read(tmp_path, text).group("snapdragon_x")]
    assert [(one.windows, one.python) for one in locations if one] == [(True, "python"), (False, "python3")]


BAD = {
    "kind": ('[jetson]\nssh = "a"', "no such kind of device; known: jetson_gpu"),
    "host": ('[host_cpu]\nssh = "a"', "no such kind of device"),
    "no address": ("[jetson_cpu]\nport = 22", "reached over ssh"),
    "other way": ('[s23]\nssh = "a"', "reached over adb"),
    "typo": ('[jetson_cpu]\nssh = "a"\nprot = 22', "unknown key 'prot'; did you mean 'port'"),
    "type": ('[jetson_cpu]\nssh = "a"\nport = "22"', "port is a int, got '22'"),
    "empty": ('[jetson_cpu]\nssh = ""', "ssh is a str, got ''"),
    "option": ('[jetson_cpu]\nssh = "-oProxyCommand=id"', "no ssh destination"),
    "system": ('[snapdragon_x]\nssh = "a"\nsystem = "dos"', "system is linux or windows"),
    "mask": ('[s23]\nadb = "a"\naffinity = "0xf8"', "mask of cores in hexadecimal"),
    "no table": ('jetson_cpu = "a"', 'expected lines like ssh = "user@host"'),
    "no toml": ("[", "not readable TOML"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_entry_is_named_with_the_file(tmp_path: Path, name: str) -> None:
    text, message = BAD[name]
    with pytest.raises(InvalidInput) as raised:
        read(tmp_path, text)
    assert message in str(raised.value)
    assert str(raised.value).startswith(str(tmp_path / "devices.toml"))


def test_an_unknown_name_lists_the_known(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="did you mean 'jetson_cpu"):
        read(tmp_path, TWO).get("jetson_cpu:3")

"""The lab of tools/device_lab: aarch64 stand-ins that real ssh and adb clients reach."""

import fcntl
import io
import os
import shutil
import time
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from dilap.profilers.devices.device import Registry
from dilap.profilers.devices.locations import read_registry
from dilap.profilers.instruments import archive
from dilap.profilers.links.adb import AdbTransport
from dilap.profilers.links.ssh import SshAddress, SshTransport
from dilap.profilers.links.transports import Transport, run_client
from standins import STANDINS

LAB = Path(os.environ.get("DILAP_DEVICE_LAB", "/var/cache/dilap-device-lab"))
LLAMA_BENCH = LAB / "llamacpp" / "bin" / "llama-bench"
SSH_PORT, SECOND_SSH_PORT, ADB_PORT = 22023, 22024, 5658
# words that a shell must not read
HOSTILE = ["a b", "'", '"', "$(touch owned)", "`id`", "line\nbreak", "; rm -rf x", "-n", "", "*", "ünïcödé ☃", "\\"]


def unavailable() -> str | None:
    """Why the lab cannot be used; None where it can."""
    for program in ("ssh", "sftp", "adb"):
        if shutil.which(program) is None:
            return f"{program} is not installed; tools/device_lab up installs it"
    for name in ("sshd", "adb_device"):
        try:
            running = Path(f"/proc/{(LAB / f'{name}.pid').read_text().strip()}/cmdline").read_bytes()
        except OSError:
            running = b""
        if not running:
            return "the device lab is not up; run tools/device_lab up (Debian, root; it gets qemu and the rest)"
    if not LLAMA_BENCH.exists():
        return "the device lab has no llama.cpp yet; run tools/device_lab up"
    return None


needs_lab = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))


@contextmanager
def private_lab(home: Path) -> Iterator[None]:
    """The lab for us alone, and an adb server of our own: the user's devices and keys are none of a test's business."""
    with (LAB / "lock").open("w") as lock, pytest.MonkeyPatch.context() as patch:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another run of the tests would see our processes as its orphans
        patch.setenv("ANDROID_ADB_SERVER_PORT", "5139")
        patch.setenv("HOME", str(home))
        yield
        run_client(["adb", "kill-server"], seconds=15, device="adb")


def ssh_transport(port: int = SSH_PORT) -> Transport:
    return SshTransport(SshAddress(destination="127.0.0.1", port=port, config_file=str(LAB / "ssh_config")))


def adb_transport(port: int = ADB_PORT) -> Transport:
    return AdbTransport(f"127.0.0.1:{port}")


def write_devices(
    path: Path,
    *,
    ssh_port: int = SSH_PORT,
    adb_port: int = ADB_PORT,
    folder: str = "dilap",
    runner: Path = STANDINS / "llama-bench.standin",
) -> Registry:
    """A devices.toml of the lab: two of a kind, a laptop with Linux, and a phone whose cores are this machine's."""
    config = LAB / "ssh_config"
    path.write_text(
        f'[[jetson_cpu]]\nssh = "127.0.0.1"\nport = {ssh_port}\nconfig_file = "{config}"\nfolder = "/root/{folder}"\n'
        f'[[jetson_cpu]]\nssh = "127.0.0.1"\nport = {SECOND_SSH_PORT}\nconfig_file = "{config}"\n'
        f'[snapdragon_x]\nssh = "127.0.0.1"\nport = {ssh_port}\nconfig_file = "{config}"\nsystem = "linux"\n'
        f'folder = "/root/{folder}"\n'
        f'[s23]\nadb = "127.0.0.1:{adb_port}"\naffinity = "1"\nfolder = "/data/local/tmp/{folder}"\n'
        f'runner = "{runner}"\n'
    )
    return read_registry(path)


def agent_archive(*, name: str, replaced: Mapping[str, str], added: Mapping[str, str] | None = None) -> bytes:
    """The agent that travels, with texts of the file `name` replaced and with other files added."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive.agent_archive())) as real, zipfile.ZipFile(buffer, "w") as ours:
        for one in real.namelist():
            text = real.read(one).decode()
            for old, new in replaced.items() if one == name else ():
                assert text.count(old) == 1, f"{name} has no {old!r} any more"
                text = text.replace(old, new)
            ours.writestr(zipfile.ZipInfo(one), text)
        for one, text in (added or {}).items():
            ours.writestr(zipfile.ZipInfo(one), text)
    return buffer.getvalue()


def processes() -> list[str]:
    """The command lines of what runs in the lab's devices."""
    roots = {str(LAB / "jetson"), str(LAB / "jetson2")}
    found = [_command(process) for process in Path("/proc").glob("[0-9]*") if _root(process) in roots]
    return [command for command in found if command]  # a zombie has none


def _root(process: Path) -> str:
    try:
        return os.readlink(process / "root")
    except OSError:  # it has ended
        return ""


def _command(process: Path) -> str:
    try:
        return (process / "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
    except OSError:
        return ""


def orphans(*, seconds: float = 8.0) -> list[str]:
    """What still runs in the devices after the time that a lease takes."""
    deadline = time.monotonic() + seconds
    while (found := processes()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return found

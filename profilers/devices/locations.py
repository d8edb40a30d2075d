"""Reads devices.toml, which says where the user's devices are."""

import difflib
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from dilap.core.documents import read_toml
from dilap.core.errors import InvalidInput
from dilap.profilers.devices.device import DEVICES, Device, Location, Registry
from dilap.profilers.links.ssh import SshAddress

_KEYS: Mapping[str, type] = {
    "ssh": str,
    "port": int,
    "identity_file": str,
    "config_file": str,
    "adb": str,
    "folder": str,
    "python": str,
    "system": str,
    "runner": str,
    "affinity": str,
}


def default_file() -> Path:
    """Return the path of devices.toml in the folder where the system keeps a user's configuration."""
    home = os.environ.get("APPDATA" if os.name == "nt" else "XDG_CONFIG_HOME")
    return (Path(home) if home else Path.home() / ".config") / "dilap" / "devices.toml"


def devices_file(file: Path | None = None) -> Path:
    """Return the file of the user's devices: `file`, or else that of $DILAP_DEVICES, or else the default one."""
    named = os.environ.get("DILAP_DEVICES")
    return file or (Path(named).expanduser() if named else default_file())


def known_devices(file: Path | None = None) -> Registry:
    """Return the user's devices from `devices_file`; the presets alone where the default one is missing.

    Raises InvalidInput.
    """
    path = devices_file(file)
    is_named = file is not None or bool(os.environ.get("DILAP_DEVICES"))
    return read_registry(path) if is_named or path.exists() else Registry()


def read_registry(path: Path) -> Registry:
    """Read the devices of a file: `[jetson_cpu]` for one of a kind, `[[jetson_cpu]]` for each of several.

    Raises InvalidInput, naming the file and the entry.
    """
    document = read_toml(path)
    located: dict[str, tuple[Device, ...]] = {}
    for kind, found in document.items():
        entries = found if isinstance(found, list) else [found]
        located[kind] = tuple(
            _device(kind, entry, number=number, source=f"{path}: [{kind}]")
            for number, entry in enumerate(entries, start=1)
        )
    return Registry(located)


def _device(kind: str, entry: object, *, number: int, source: str) -> Device:
    reachable = [name for name, preset in DEVICES.items() if preset.transport != "local"]
    if kind not in reachable:
        raise InvalidInput(f"{source}: no such kind of device; known: {', '.join(reachable)}")
    if not isinstance(entry, dict):
        raise InvalidInput(f'{source}: expected lines like ssh = "user@host", got {entry!r:.80}')
    for key, value in entry.items():
        _require_known(key, value, source)
    preset = DEVICES[kind]
    if preset.transport not in entry:
        raise InvalidInput(f'{source}: it is reached over {preset.transport}; write {preset.transport} = "..."')
    affinity = entry.get("affinity", preset.affinity)
    if affinity is not None and not re.fullmatch("[0-9a-fA-F]+", affinity):
        raise InvalidInput(f"{source}: affinity is a mask of cores in hexadecimal, like f8, got {affinity!r:.80}")
    return replace(preset, location=_location(preset, entry, source), number=number, affinity=affinity)


def _require_known(key: str, value: object, source: str) -> None:
    if key not in _KEYS:
        close = difflib.get_close_matches(key, _KEYS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise InvalidInput(f"{source}: unknown key {key!r:.80}{hint} Known: {', '.join(_KEYS)}")
    if type(value) is not _KEYS[key] or value == "":
        raise InvalidInput(f"{source}: {key} is a {_KEYS[key].__name__}, got {value!r:.80}")
    if isinstance(value, str) and "\0" in value:
        raise InvalidInput(f"{source}: {key} holds a NUL")


def _location(preset: Device, entry: Mapping[str, Any], source: str) -> Location:
    system = entry.get("system", "windows" if preset.name == "snapdragon_x" else "linux")
    if system not in ("linux", "windows"):
        raise InvalidInput(f"{source}: system is linux or windows, got {system!r:.80}")
    ssh = None
    if "ssh" in entry:
        try:
            ssh = SshAddress(
                destination=entry["ssh"],
                port=entry.get("port"),
                identity_file=entry.get("identity_file"),
                config_file=entry.get("config_file"),
            )
        except InvalidInput as error:
            raise InvalidInput(f"{source}: {error}") from error
    return Location(
        ssh=ssh,
        adb=entry.get("adb"),
        folder=entry.get("folder", "/data/local/tmp/dilap" if "adb" in entry else ".cache/dilap"),
        python=entry.get("python", "python" if system == "windows" else "python3"),
        windows=system == "windows",
        runner=entry.get("runner"),
    )

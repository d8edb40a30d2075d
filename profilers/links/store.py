"""A device's copies of files, by content: what is there already is not sent again, and nothing half sent is used.

`FOLDER/store/KEY/NAME` holds files that belong together, KEY being the digest of their names and contents. A file is
sent to `FOLDER/parts/SHA256`, checked there, and only then renamed into its place.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from dilap.core.codec import digest
from dilap.core.documents import int64, is_plain_name
from dilap.core.errors import InvalidInput, LinkLost, Unavailable
from dilap.profilers.links.transports import Transport

_SECONDS = 600.0  # limit of one program: a slow device may hash gigabytes
_LIMIT_BYTES = 4 << 30  # what earlier models may keep on a device
_SPARE_BYTES = 64 << 20  # what is always left free

# $1 $2: folders; then pairs of a path and the part that becomes it. Prints df's line and one line a pair: a SHA-256,
# `part` or `none`.
_SURVEY = """\
[ -d "$1" ] && [ -d "$2" ] || mkdir -p "$1" "$2" || exit 1
df -Pk "$1" || exit 1
shift 2
while [ $# -gt 0 ]; do
  if [ -f "$1" ]; then sha256sum <"$1"; elif [ -s "$2" ]; then echo part; else echo none; fi
  shift 2
done
"""
# $1: the part; $2: its SHA-256; $3: the folder of $4, its place.
_ACCEPT = """\
sum=$(sha256sum <"$1") || exit 1
if [ "${sum%% *}" = "$2" ]; then mkdir -p "$3" && mv -f "$1" "$4" && echo kept; else rm -f "$1"; echo wrong; fi
"""
# $1: the store; $2: how many KiB may stay; then the keys that stay in any case. The least recently used go.
# One `du` for all: a program a key took most of the time of a push.
_EVICT = """\
cd "$1" || exit 1
limit=$2 total=0; shift 2
[ $# -eq 0 ] || touch -c "$@"
keys=
for key in $(ls -1t); do  # ours: folders, no links, of 16 hexadecimal digits
  case $key in *[!0-9a-f]*) continue;; esac
  [ ${#key} -eq 16 ] && [ -d "$key" ] && [ ! -L "$key" ] && keys="$keys $key"
done
[ -z "$keys" ] || du -sk $keys | while read -r size key; do
  total=$((total + size))
  case " $* " in *" $key "*) continue;; esac
  [ $total -le $limit ] || rm -rf "$key"
done
"""
_SURVEY_PYTHON = """\
import hashlib, os, shutil, sys
store, parts, *pairs = sys.argv[1:]
for folder in (store, parts):
    os.makedirs(folder, exist_ok=True)
print('-', 0, 0, shutil.disk_usage(store).free // 1024, '0%')
for path, part in zip(pairs[::2], pairs[1::2]):
    if os.path.isfile(path):
        hasher = hashlib.sha256()
        with open(path, 'rb') as file:
            for chunk in iter(lambda: file.read(1 << 20), b''):
                hasher.update(chunk)
        print(hasher.hexdigest())
    else:
        print('part' if os.path.isfile(part) and os.path.getsize(part) else 'none')
"""
_ACCEPT_PYTHON = """\
import hashlib, os, sys
part, wanted, folder, path = sys.argv[1:]
hasher = hashlib.sha256()
with open(part, 'rb') as file:
    for chunk in iter(lambda: file.read(1 << 20), b''):
        hasher.update(chunk)
if hasher.hexdigest() == wanted:
    os.makedirs(folder, exist_ok=True)
    os.replace(part, path)
    print('kept')
else:
    os.remove(part)
    print('wrong')
"""
_EVICT_PYTHON = """\
import os, re, shutil, sys
store, limit, *kept = sys.argv[1:]
for key in kept:
    if os.path.isdir(os.path.join(store, key)):
        os.utime(os.path.join(store, key))
total = 0
named = [one for one in os.scandir(store) if re.fullmatch('[0-9a-f]{16}', one.name)]
ours = [one for one in named if one.is_dir(follow_symlinks=False)]
for entry in sorted(ours, key=lambda one: -one.stat().st_mtime):
    total += sum(file.stat().st_size for file in os.scandir(entry.path)) // 1024
    if total > int(limit) and entry.name not in kept:
        shutil.rmtree(entry.path)
"""


@dataclass(frozen=True, kw_only=True)
class Programs:
    """The three programs that a store runs on a device, as argv prefixes."""

    survey: tuple[str, ...]
    accept: tuple[str, ...]
    evict: tuple[str, ...]


def posix_programs() -> Programs:
    """Return the programs for a device with a POSIX shell."""
    return Programs(
        survey=("sh", "-c", _SURVEY, "dilap-store"),
        accept=("sh", "-c", _ACCEPT, "dilap-store"),
        evict=("sh", "-c", _EVICT, "dilap-store"),
    )


def python_programs(python: str) -> Programs:
    """Return the programs for Windows, where the agent needs a Python anyway."""
    return Programs(
        survey=(python, "-c", _SURVEY_PYTHON),
        accept=(python, "-c", _ACCEPT_PYTHON),
        evict=(python, "-c", _EVICT_PYTHON),
    )


class Files(Protocol):
    """Makes files of this machine available to programs on a device."""

    def place(self, path: Path, *, sha256: str, companions: Mapping[str, str]) -> str:
        """Make sure that a file and its companions (name -> SHA-256) are on the device; return its path there."""


class Store:
    """The copies of files on one device."""

    def __init__(self, transport: Transport, *, folder: str, programs: Programs) -> None:
        self._transport, self._programs = transport, programs
        self._store, self._parts = f"{folder}/store", f"{folder}/parts"
        self._in_use: set[str] = set()
        self._is_tidy = False

    def place(self, path: Path, *, sha256: str, companions: Mapping[str, str]) -> str:
        """Copy what is missing of a file and its companions to the device; return the file's path there.

        Raises Unavailable where the device has no room, LinkLost where it went away.
        """
        contents = {path.name: sha256, **companions}
        key = digest(contents)[:16]
        self._in_use.add(key)
        places = {name: f"{self._store}/{key}/{_plain(name)}" for name in contents}
        states, free = self._survey([(places[name], self._part(contents[name])) for name in contents])
        missing = {name: state for name, state in zip(contents, states, strict=True) if state != contents[name]}
        if missing:
            self._make_room(sum(path.with_name(name).stat().st_size for name in missing), free)
        for name, state in missing.items():
            self._send(path.with_name(name), contents[name], places[name], resume=state == "part")
        return places[path.name]

    def free_bytes(self) -> int:
        """Return the free bytes where the store is."""
        return self._survey([])[1]

    def _survey(self, pairs: Sequence[tuple[str, str]]) -> tuple[list[str], int]:
        """Return what is at every place (a SHA-256, `part` or `none`), and the bytes that are free."""
        words = [word for pair in pairs for word in pair]
        printed = self._run(self._programs.survey, self._store, self._parts, *words)
        lines = printed.splitlines()
        disk, states = lines[: len(lines) - len(pairs)], lines[len(lines) - len(pairs) :]
        try:
            fields = disk[-1].split()
            share = next(index for index, field in enumerate(fields) if field.endswith("%"))
            return [state.split()[0] for state in states], _free_bytes(fields[share - 1])
        except (IndexError, StopIteration, ValueError):
            raise LinkLost(f"the device answered the store with {printed[-200:]!r}; try again") from None

    def _make_room(self, num_bytes: int, free: int) -> None:
        """Remove old files where that is needed. Raises Unavailable where all that are not in use are not enough."""
        wanted = num_bytes + _SPARE_BYTES
        if wanted > free:
            self._evict(limit=0)
            _, free = self._survey([])
        elif not self._is_tidy:  # once a session is enough
            self._evict(limit=_LIMIT_BYTES)
            self._is_tidy = True
        if wanted > free:
            raise Unavailable(
                f"the device has {free / 1e6:.0f} MB free in {os.path.dirname(self._store)}, {wanted / 1e6:.0f} MB are "
                "needed: free some, or give another folder in devices.toml"
            )

    def _evict(self, *, limit: int) -> None:
        """Remove the files that were used longest ago until those left, beside the ones in use, take `limit` bytes."""
        self._run(self._programs.evict, self._store, str(limit >> 10), *self._in_use)

    def _send(self, path: Path, sha256: str, place: str, *, resume: bool) -> None:
        part = self._part(sha256)
        for goes_on in (True, False) if resume else (False,):
            try:
                self._transport.push(path, part, resume=goes_on)
            except LinkLost:
                if not goes_on:
                    raise
                continue  # a part that is longer than the file cannot be continued
            if self._run(self._programs.accept, part, sha256, os.path.dirname(place), place).strip() == "kept":
                return
        raise LinkLost(f"{path.name} arrived on the device with another content than it was sent with; try again")

    def _part(self, sha256: str) -> str:
        return f"{self._parts}/{sha256}"

    def _run(self, program: Sequence[str], *words: str) -> str:
        return self._transport.run([*program, *words], seconds=_SECONDS).checked("the store on the device")


def _free_bytes(kibibytes: str) -> int:
    if (free := int64(kibibytes)) < 0 or free > 1 << 50:
        raise ValueError(f"{kibibytes} KiB are free on no device")
    return free * 1024


def _plain(name: str) -> str:
    """Return `name`. Raises InvalidInput for a name that would leave its folder."""
    if not is_plain_name(name):
        raise InvalidInput(f"{name!r} is no file name")
    return name

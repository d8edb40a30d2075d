"""Tables that others may see: what was measured and on what, and nothing that tells whose machine it was.

The folder `profilers/measured` is where contributed tables lie.
"""

import re
from dataclasses import replace
from pathlib import Path

from dilap.core.codec import digest, encode
from dilap.core.documents import parse_object, read_text
from dilap.core.errors import InvalidInput
from dilap.core.measurement import Fingerprint
from dilap.profilers.tables.networks.table import NetworkTable
from dilap.profilers.tables.record import AnyTable
from dilap.profilers.tables.table import LatencyTable

# Where a runtime was compiled by its user, its build names folders: /home/me/src, C:\Users\me\src, ~/src.
_PATH = re.compile(r"(?<!\w)(?:[A-Za-z]:|~)?[/\\][^\s,;|\"']+")


def read(path: Path) -> LatencyTable | NetworkTable:
    """Read the table of a decoder or of another network. Raises InvalidInput."""
    first = read_text(path).split("\n", 1)[0] if path.is_file() else "{}"
    kind = parse_object(first, source=f"{path}: line 1").get("type")
    return NetworkTable.read(path) if kind == NetworkTable.__name__ else LatencyTable.read(path)


def shared(table: AnyTable) -> AnyTable:
    """Return a table without serial number, kernel, folders and the time of day; all samples stay."""
    header = replace(
        table.header, fingerprint=_shared_fingerprint(table.header.fingerprint), created=table.header.created[:10]
    )
    return replace(table, header=header, partners=tuple(map(shared, table.partners)))


def _shared_fingerprint(found: Fingerprint) -> Fingerprint:
    return replace(found, serial_sha256="", soft={}, runtime_build=_PATH.sub("(a folder)", found.runtime_build))


def shared_name(table: LatencyTable | NetworkTable) -> str:
    """Return a name for the file of a shared table: device, runtime, what was timed, and a digest of the rest."""
    header = table.header
    kind = table.header.architecture.family if isinstance(table, LatencyTable) else "network"
    words = (header.fingerprint.device, header.backend, header.workload.phase, header.workload.precision, kind)
    return f"{'-'.join(words)}-{digest(encode(header))[:8]}.jsonl"


def share(path: Path, out: Path | None) -> Path:
    """Write what may be shared of the table in `path`, by default into the working folder, and return the new file.

    Raises InvalidInput where `path` is no table, or something is in the place of the new file.
    """
    table = shared(read(path))
    made = out or Path(shared_name(table))
    if made.exists():
        raise InvalidInput(f"{made} is there already: name another file with --out")
    table.write(made)
    return made

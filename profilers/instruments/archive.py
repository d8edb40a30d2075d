"""The agent as one file: an archive of its sources, which is copied to devices and run by a Python there as it is."""

import io
import zipfile
from pathlib import Path

import dilap

_ROOMS = ("core", "backends")  # these packages travel as a whole
_MAIN = """\
import sys

if sys.version_info < (3, 10):
    sys.exit("the agent needs Python 3.10 or newer, this is " + sys.version.split()[0] + "; set python in devices.toml")
from dilap.backends.agent import main

main()
"""


def travelling() -> list[Path]:
    """Return the source files that travel in the archive."""
    root = Path(dilap.__file__).resolve().parent
    return [root / "__init__.py", *(path for room in _ROOMS for path in sorted((root / room).rglob("*.py")))]


def agent_archive() -> bytes:
    """Return the archive: the same bytes for the same sources, so that a device has each version once."""
    root = Path(dilap.__file__).resolve().parent.parent
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, source in [
            ("__main__.py", _MAIN.encode()),
            *((path.relative_to(root).as_posix(), path.read_bytes()) for path in travelling()),
        ]:
            archive.writestr(zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0)), source)
    return buffer.getvalue()

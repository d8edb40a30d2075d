"""The agent as one file: what travels to devices, as an archive that a Python there runs as it is."""

import io
import zipfile
from pathlib import Path

import dilap

MODULES = (
    "__init__",
    "codec",
    "documents",
    "errors",
    "executorch_bindings",
    "gguf_header",
    "printable",
    "registry",
    "sqnr",
    "tensorrt_build",
    "tensorrt_recipe",
    "types",
)
_MAIN = """\
import sys

if sys.version_info < (3, 10):
    sys.exit("the agent needs Python 3.10 or newer, this is " + sys.version.split()[0] + "; set python in devices.toml")
from dilap.backends.agent import main

main()
"""


def travelling() -> list[Path]:
    """The source files that travel."""
    root = Path(dilap.__file__).resolve().parent
    return [root / f"{name}.py" for name in MODULES] + sorted((root / "backends").glob("*.py"))


def agent_archive() -> bytes:
    """The same bytes for the same sources, so that a device has each version once."""
    root = Path(dilap.__file__).resolve().parent.parent
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, source in [
            ("__main__.py", _MAIN.encode()),
            *((path.relative_to(root).as_posix(), path.read_bytes()) for path in travelling()),
        ]:
            archive.writestr(zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0)), source)
    return buffer.getvalue()

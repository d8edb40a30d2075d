"""Open artifacts that read text to score it, each in its runtime's own process."""

from collections.abc import Mapping
from pathlib import Path

from dilap import backends
from dilap.backends import Reader
from dilap.backends.child import opened
from dilap.core import registry
from dilap.core.errors import Unavailable, Unsupported

READERS = {
    "executorch": "dilap.backends.executorch.runtime:ExecuTorchReader",
    "llamacpp": "dilap.backends.llamacpp.runtime:LlamaCppReader",
    "onnxruntime": "dilap.backends.onnxruntime.runtime:OnnxRuntimeReader",
}


def open_reader(name: str, path: Path, *, threads: int, switches: Mapping[str, str] | None = None) -> Reader:
    """Open an artifact to read text with it. Of `switches`, only those that change the computed numbers are used.

    Raises Unavailable where the runtime cannot be used here, Unsupported for a runtime without a reader, InvalidInput
    where the file is damaged, and Crashed where the runtime dies.
    """
    backend = backends.get(name)
    if reason := backend.unavailable():
        raise Unavailable(reason)
    if name not in READERS:
        raise Unsupported(f"{name} artifacts run on their device alone: score the checkpoint instead")
    lossy = {key: value for key, value in (switches or {}).items() if key in backend.lossy_switches}
    reader: Reader = opened(registry.get(READERS, name, kind="backend"), path, runtime=name, threads=threads, **lossy)
    return reader

"""Open artifacts that are shown texts or images to score them, each in its runtime's own process."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dilap import backends
from dilap.backends import Network, Reader
from dilap.backends.child import opened
from dilap.core import registry
from dilap.core.errors import Unavailable, Unsupported

READERS = {
    "executorch": "dilap.backends.executorch.runtime:ExecuTorchReader",
    "llamacpp": "dilap.backends.llamacpp.runtime:LlamaCppReader",
    "onnxruntime": "dilap.backends.onnxruntime.runtime:OnnxRuntimeReader",
}
NETWORKS = {
    "executorch": "dilap.backends.executorch.network:ExecuTorchNetwork",
    "onnxruntime": "dilap.backends.onnxruntime.network:OnnxNetwork",
}


def open_reader(name: str, path: Path, *, threads: int, switches: Mapping[str, str] | None = None) -> Reader:
    """Open an artifact to read text with it. Of `switches`, only those that change the computed numbers are used.

    Raises Unavailable where the runtime cannot be used here, Unsupported for a runtime without a reader, InvalidInput
    where the file is damaged, and Crashed where the runtime dies.
    """
    kind = _kind(READERS, name)
    backend = backends.get(name)
    lossy = {key: value for key, value in (switches or {}).items() if key in backend.lossy_switches}
    reader: Reader = opened(kind, path, runtime=name, threads=threads, **lossy)
    return reader


def open_network(name: str, path: Path, *, threads: int) -> Network:
    """Open an artifact to show it images. Raises what `open_reader` raises."""
    network: Network = opened(_kind(NETWORKS, name), path, runtime=name, threads=threads)
    return network


def _kind(known: Mapping[str, str], name: str) -> Any:
    """Return a runtime's class. Raises Unavailable where the runtime is not here, Unsupported where it has none."""
    if reason := backends.get(name).unavailable():
        raise Unavailable(reason)
    if name not in known:
        raise Unsupported(f"{name} artifacts run on their device alone: score the checkpoint instead")
    return registry.get(known, name, kind="backend")

"""Run an artifact on the machine this code is on.

Torch-free: the same files run here, in the agent on a Jetson and on a Windows laptop (Python >= 3.10 there),
with nothing but the standard library, numpy and one runtime. A backend is three things: `unavailable` (the
reason, or None), `capabilities` (what it can hold, as data) and `load` (an artifact, as a `Session`).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from dilap.core import registry
from dilap.core.errors import InvalidInput, Unsupported
from dilap.core.rules import Capabilities
from dilap.core.shape import Architecture
from dilap.core.workload import Workload

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

BACKENDS = {
    "executorch": "dilap.backends.executorch.runtime:ExecuTorch",
    "llamacpp": "dilap.backends.llamacpp.runtime:LlamaCpp",
    "onnxruntime": "dilap.backends.onnxruntime.runtime:OnnxRuntime",
    "tensorrt": "dilap.backends.tensorrt.runtime:TensorRT",
}
MAX_READ_TOKENS = 512  # at once: their logits, for a vocabulary of 50k, are 100 MB


class Session(Protocol):
    """One loaded artifact, ready to be timed under one workload.

    Where `sample` gives a GPU's time, the session keeps the host's, launch and wait included, in a list `host_ns`.
    """

    def sample(self) -> int:
        """Run the workload once; nanoseconds."""

    def logits(self, token_ids: Sequence[int], *, incremental: bool) -> "NDArray[np.float32]":
        """Logits (tokens x vocabulary) at every position: in one pass, or token by token through the KV cache."""

    def close(self) -> None:
        """Free the model."""


class Reader(Protocol):
    """One loaded artifact that reads text to score it.

    It holds one sequence in its KV cache, of `max_tokens` at most. What a text shares with the one before it need not
    be read again: reading goes on at any position, and forgets what was behind it.
    """

    max_tokens: int
    vocab_size: int

    def reserve(self, num_tokens: int) -> None:
        """Make room for a sequence of that length; forgets what was read."""

    def read(self, token_ids: Sequence[int], *, start: int, num_rows: int) -> "NDArray[np.float32]":
        """Read at most MAX_READ_TOKENS from position `start` on; logits (num_rows x vocabulary) of the last ones."""

    def close(self) -> None:
        """Free the model."""


class Backend(Protocol):
    """A runtime. `name` is its key in BACKENDS, `format` the artifact format that it loads.

    `load_seconds` is how long a load may take at most, on a slow device with a cold disk. `shares_threads` says that
    all models of a process run in the same number of threads. `lossy_switches` are those that change the numbers too.
    """

    name: str
    format: str
    load_seconds: float
    shares_threads: bool
    lossy_switches: frozenset[str]

    def unavailable(self) -> str | None:
        """Why the runtime cannot be used here and how to get it; None where it can."""

    def version(self) -> str:
        """The runtime's version."""

    def build(self) -> str:
        """The build's features that change speed (instruction sets, for one)."""

    def precisions(self) -> tuple[str, ...]:
        """The precisions that it runs, the default first."""

    def switches(self) -> Mapping[str, tuple[str, ...]]:
        """What may make a model faster on some machine: switch to values, the runtime's plain default first."""

    def how_to_run(self, file: str, workload: Workload) -> dict[str, str]:
        """How the stock runtime runs `file` in the workload's configuration: commands, calls and environment variables
        by the name of the program or language."""

    def capabilities(self, architecture: Architecture, *, precision: str) -> Capabilities:
        """What it can hold of models that compute as `architecture` does, in any widths."""

    def cache_bits(self, workload: Workload) -> float:
        """Bits that a number in the KV cache takes in the workload's configuration."""

    def after_a_crash(self) -> str:
        """What to try when the runtime has died in its process."""

    def load(self, path: Path, workload: Workload) -> Session:
        """Load an artifact. Raises InvalidInput where the file is damaged or its tensors are wrong."""


def get(name: str) -> Backend:
    """The backend of that name. Raises InvalidInput with the known ones."""
    backend: Backend = registry.get(BACKENDS, name, kind="backend")()
    return backend


def require_precision(backend: Backend, precision: str) -> None:
    """Raises InvalidInput, with the known ones, for a precision that the backend does not run."""
    if precision not in backend.precisions():
        raise InvalidInput(f"unknown precision {precision!r}; {backend.name} runs {', '.join(backend.precisions())}")


def require_switches(backend: Backend, workload: Workload) -> None:
    """Raises InvalidInput, with the known ones, for a switch or a value that the backend's runtime does not have."""
    known = backend.switches()
    for name, value in workload.switches.items():
        if value not in known.get(name, ()):
            offered = "; ".join(f"{switch} {', '.join(values)}" for switch, values in known.items()) or "none"
            raise InvalidInput(f"{backend.name} has no switch {name!r} with the value {value!r}; it has: {offered}")


def require_loadable(backend: Backend, architecture: Architecture, *, precision: str) -> None:
    """Raises Unsupported, by group and rule, where the backend's runtime does not load models of that shape."""
    if reason := backend.capabilities(architecture, precision=precision).refusal(architecture):
        raise Unsupported(f"{backend.name} cannot hold this model in {precision}: {reason}")

"""Run an artifact on the machine this code is on.

Torch-free: the same files run here, in the agent on a Jetson and on a Windows laptop (Python >= 3.10 there),
with nothing but the standard library, numpy and one runtime. A backend is three things: `unavailable` (the
reason, or None), `capabilities` (what it can hold, as data) and `load` (an artifact, as a `Session`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from dilap import registry
from dilap.types import Workload

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

BACKENDS = {
    "executorch": "dilap.backends.executorch:ExecuTorch",
    "llamacpp": "dilap.backends.llamacpp:LlamaCpp",
    "onnxruntime": "dilap.backends.onnxruntime:OnnxRuntime",
    "tensorrt": "dilap.backends.tensorrt:TensorRT",
}


@dataclass(frozen=True, kw_only=True)
class Capabilities:
    """The plans that a runtime loads; the search space is cut by it before the search.

    `unsupported` is the reason why the family cannot be held at all. `ffn_multiple` is the step of FFN widths
    that the kernels and quantisation blocks of the precision need; `output_biases` says whether the output projections
    may have a bias that the family lacks.
    """

    unsupported: str | None = None
    per_layer_widths: bool = True
    head_pruning: bool = True
    attention_removal: bool = True
    ffn_removal: bool = True
    ffn_multiple: int = 1
    output_biases: bool = True


class Session(Protocol):
    """One loaded artifact, ready to be timed under one workload."""

    def sample(self) -> int:
        """Run the workload once; nanoseconds."""

    def logits(self, token_ids: Sequence[int], *, incremental: bool) -> "NDArray[np.float32]":
        """Logits (tokens x vocabulary) at every position: in one pass, or token by token through the KV cache."""

    def close(self) -> None:
        """Free the model."""


class Backend(Protocol):
    """A runtime. `name` is its key in BACKENDS, `format` the artifact format that it loads."""

    name: str
    format: str

    def unavailable(self) -> str | None:
        """Why the runtime cannot be used here and how to get it; None where it can."""

    def version(self) -> str:
        """The runtime's version."""

    def build(self) -> str:
        """The build's features that change speed (instruction sets, for one)."""

    def precisions(self) -> tuple[str, ...]:
        """The precisions that it runs, the default first."""

    def capabilities(self, family: str, *, precision: str) -> Capabilities:
        """What it can hold of a model family."""

    def load(self, path: Path, workload: Workload) -> Session:
        """Load an artifact. Raises InvalidInput where the file is damaged or its tensors are wrong."""


def get(name: str) -> Backend:
    """The backend of that name. Raises InvalidInput with the known ones."""
    backend: Backend = registry.get(BACKENDS, name, kind="backend")()
    return backend

"""Run an artifact in its runtime, on the machine that this code runs on.

    backend = backends.get("llamacpp")
    session = backend.load(Path("model.gguf"), Workload(precision="f16"))
    nanoseconds = session.sample()

The same files run here and in the agent on a Jetson or a Windows laptop (Python 3.10 or newer). They need the standard
library, numpy and one runtime, but not torch (only ExecuTorch's runtime brings it along). A backend says whether its
runtime can be used here (`unavailable`) and which models it can hold (`capabilities`), and opens an artifact as a
`Session` (`load`).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from dilap.core import registry
from dilap.core.errors import InvalidInput, Unsupported
from dilap.core.network_input import NetworkInput, TokenInput
from dilap.core.precisions import Mix
from dilap.core.rules import Capabilities, NetworkCapabilities
from dilap.core.shape import UNMIXED, Architecture
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
MAX_READ_TOKENS = 512  # tokens of one `Reader.read`: their logits are 100 MB for a vocabulary of 50k


class Session(Protocol):
    """One loaded artifact, ready to be timed under one workload.

    Where `sample` returns a GPU's own time, the session also keeps a list `host_ns` of the times that the host saw,
    launch and wait included, and says in `device_bytes` what it takes of the GPU's memory.
    """

    def sample(self) -> int:
        """Run the workload once and return the nanoseconds that it took."""

    # Raises Unsupported in the phase `forward`; see `Network`.
    def logits(self, token_ids: Sequence[int], *, incremental: bool) -> "NDArray[np.float32]":
        """Return the logits (tokens x vocabulary) at all positions: in one pass, or one by one with the KV cache."""

    def close(self) -> None:
        """Free the model."""


class Network(Protocol):
    """One loaded artifact that maps images to logits; the sessions of the phase `forward` are such too.

    Encoders of texts are networks as well. Theirs are tokens (texts x 3 x tokens, see `dilap.core.network_input`), and
    without a head they give an embedding of every text.
    """

    shape: tuple[int, ...]

    def outputs(self, images: "NDArray[Any]") -> "NDArray[np.float32]":
        """Return the logits (images x classes) of any number of images, each of the size that the file takes.

        `shape` is that of the batch that the file takes at once: batch x channels x height x width.
        """

    def close(self) -> None:
        """Free the model."""


class Reader(Protocol):
    """One loaded artifact that reads text to score it.

    It holds one sequence of at most `max_tokens` tokens in its KV cache. What a text shares with the beginning of the
    text before it need not be read again: reading may go on at any position, and forgets everything from there on.
    """

    max_tokens: int
    vocab_size: int

    def reserve(self, num_tokens: int) -> None:
        """Make room for a sequence of `num_tokens` tokens; what was read before is forgotten."""

    def read(self, token_ids: Sequence[int], *, start: int, num_rows: int) -> "NDArray[np.float32]":
        """Read at most MAX_READ_TOKENS tokens, the first one at position `start`.

        Return the logits (num_rows x vocabulary) of the last `num_rows` of them.
        """

    def close(self) -> None:
        """Free the model."""


class Backend(Protocol):
    """One runtime. `name` is its key in BACKENDS, `format` the artifact format that it loads.

    `load_seconds` is the longest time that a load may take, on a slow device with a cold disk. `shares_threads` says
    that all models of a process run in the same number of threads. `lossy_switches` are the names of the switches that
    change the computed numbers and not only the speed.
    """

    name: str
    format: str
    load_seconds: float
    shares_threads: bool
    lossy_switches: frozenset[str]

    def unavailable(self) -> str | None:
        """Return why the runtime cannot be used here and how to get it; None where it can."""

    def version(self) -> str:
        """Return the runtime's version."""

    def build(self) -> str:
        """Return the features of this build that change its speed, such as instruction sets."""

    def precisions(self) -> tuple[str, ...]:
        """Return the precisions in which the runtime runs decoders, the default first."""

    def network_precisions(self) -> tuple[str, ...]:
        """Return the precisions in which the runtime runs image networks, the default first; none where it cannot."""

    def switches(self) -> Mapping[str, tuple[str, ...]]:
        """Return settings that may make a model faster on some machine: switch -> values, the plain default first."""

    def how_to_run(self, file: str, workload: Workload) -> dict[str, str]:
        """Return how the stock runtime runs `file` in the workload's configuration.

        The values are commands, calls, settings and environment variables; the keys say which program, language or
        file each one is for.
        """

    def capabilities(self, architecture: Architecture, *, precision: str) -> Capabilities:
        """Return the limits on models that compute as `architecture` does, whatever their widths are.

        A model with parts in several precisions has the limits of all of them.
        """

    def network_capabilities(self, *, precision: str) -> NetworkCapabilities:
        """Return what the runtime makes of image networks in a precision of `network_precisions`."""

    def cache_bits(self, workload: Workload) -> float:
        """Return how many bits a number in the KV cache takes in the workload's configuration."""

    def after_a_crash(self) -> str:
        """Return advice for a user whose runtime crashed in its process."""

    def load(self, path: Path, workload: Workload) -> Session:
        """Load an artifact.

        Raises InvalidInput where the file is damaged or its tensors are wrong, Unsupported where it is for another
        workload: a decoder, an image network of another batch.
        """


def get(name: str) -> Backend:
    """Return the backend of that name. Raises InvalidInput, listing the known ones, for any other name."""
    backend: Backend = registry.get(BACKENDS, name, kind="backend")()
    return backend


def require_precision(backend: Backend, precision: str) -> None:
    """Raise InvalidInput, listing the known ones, for a precision that the backend does not run."""
    if precision not in backend.precisions():
        raise InvalidInput(f"unknown precision {precision!r}; {backend.name} runs {', '.join(backend.precisions())}")


def capabilities_of(backend: Backend, architecture: Architecture, mix: Mix) -> tuple[Capabilities, ...]:
    """Return the limits of all precisions in `mix`, that of the whole first.

    Raises InvalidInput for a part or a precision that is not known, Unsupported where the runtime holds no such mix.
    """
    mix.require_parts(architecture)
    for one in mix.used:
        require_precision(backend, one)
    found = tuple(backend.capabilities(architecture, precision=one) for one in mix.used)
    if len(found) > 1 and not all(one.mixed_precisions for one in found):
        raise Unsupported(f"{backend.name} holds all parts of a model in one precision, got {mix}: name one alone")
    is_untied = mix.precisions.get("head") != mix.precisions.get("embedding")
    if is_untied and architecture.tied_embeddings and not all(one.untied_precisions for one in found):
        raise Unsupported(
            f"{backend.name} holds a {architecture.family} whose head is its embedding in one precision for both: give "
            "head and embedding the same one"
        )
    return found


def require_networks(backend: Backend) -> None:
    """Raise Unsupported, with the runtimes that do, for a runtime that runs no image networks."""
    if not backend.network_precisions():
        able = [name for name in BACKENDS if get(name).network_precisions()]
        raise Unsupported(f"{backend.name} runs no image networks; use --backend {' or '.join(able)}")


def require_network_precision(backend: Backend, precision: str) -> None:
    """Raise Unsupported, listing the known ones, for a precision in which the runtime runs no image networks."""
    require_networks(backend)
    known = backend.network_precisions()
    if precision not in known:
        raise Unsupported(f"{backend.name} runs image networks in {' and '.join(known)}, not in {precision!r}")


def require_network_input(backend: Backend, input_: NetworkInput, *, precision: str) -> None:
    """Raise Unsupported, with the reason, for a runtime that holds no networks with such an input in a precision."""
    require_network_precision(backend, precision)
    if isinstance(input_, TokenInput) and (
        reason := backend.network_capabilities(precision=precision).unsupported_texts
    ):
        raise Unsupported(reason)


def require_switches(backend: Backend, workload: Workload) -> None:
    """Raise InvalidInput, listing the known ones, for a switch or a value that the backend's runtime does not have."""
    known = backend.switches()
    for name, value in workload.switches.items():
        if value not in known.get(name, ()):
            offered = "; ".join(f"{switch} {', '.join(values)}" for switch, values in known.items()) or "none"
            raise InvalidInput(f"{backend.name} has no switch {name!r} with the value {value!r}; it has: {offered}")


def require_loadable(
    backend: Backend, architecture: Architecture, *, precision: str, precisions: Mapping[str, str] = UNMIXED
) -> None:
    """Raise Unsupported, naming the group and the rule, where the runtime does not load models of that shape.

    `precisions` has, by name, the precision of the parts that do not have `precision`.
    """
    mix = Mix(precision=precision, precisions=precisions)
    for one, limits in zip(mix.used, capabilities_of(backend, architecture, mix), strict=True):
        if reason := limits.refusal(architecture):
            raise Unsupported(f"{backend.name} cannot hold this model in {one}: {reason}")

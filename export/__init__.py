"""Write a model as an artifact in a runtime's format, and check it against the torch model that it came from.

    from dilap import export
    export.get("llamacpp").export(model, tokenizer=folder, precision="q4_0", plan_digest="", out=Path("mine"))
    export.get("llamacpp").export(model, precision="q4_0", precisions={"head": "q8_0", "layers.3.ffn": "f16"}, ...)
    export.get_network("onnxruntime").export(
        network, input_=parse_input("3x224x224"), precision="f32", images=None, plan_digest="", out=Path("ours")
    )

An exporter for another runtime is one class with the methods of `Exporter`, named in `EXPORTERS`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from dilap import backends
from dilap.core import registry
from dilap.core.artifact import Artifact
from dilap.core.errors import Unavailable
from dilap.core.network_input import NetworkInput
from dilap.core.shape import UNMIXED, Architecture

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from dilap.models.network import Examples

EXPORTERS = {
    "executorch": "dilap.export.executorch.writer:ExecuTorchExporter",
    "llamacpp": "dilap.export.gguf.writer:GgufExporter",
    "onnxruntime": "dilap.export.onnx.onnxruntime:OnnxRuntimeExporter",
    "tensorrt": "dilap.export.onnx.tensorrt:TensorRTExporter",
}
NETWORK_EXPORTERS = {
    "executorch": "dilap.export.executorch.network:ExecuTorchNetworkExporter",
    "onnxruntime": "dilap.export.onnx.network:OnnxNetworkExporter",
    "tensorrt": "dilap.export.onnx.tensorrt_network:TensorRTNetworkExporter",
}


class Exporter(Protocol):
    """Writes one runtime's format; `backend` is the runtime's name."""

    backend: str

    def export(
        self,
        model: "PreTrainedModel",
        *,
        tokenizer: Path,
        precision: str,
        precisions: Mapping[str, str] = UNMIXED,
        plan_digest: str,
        out: Path,
    ) -> Artifact:
        """Write `model` into the folder `out` with its sidecar `artifact.json`, whole or not at all.

        `tokenizer` is a Hugging Face folder or a GGUF file. `precisions` has those of parts of the model that do not
        have `precision`, or are to have exactly it; see `dilap.core.precisions`. The result is verified (logits against
        torch, the tokenizer's samples against transformers) before it appears. Raises VerificationFailed, Unsupported,
        and InvalidInput for a part or a precision that is not known.
        """

    def export_probe(
        self,
        architecture: Architecture,
        *,
        precision: str,
        precisions: Mapping[str, str] = UNMIXED,
        seed: int,
        out: Path,
    ) -> Artifact:
        """Write a model of that shape with random weights and no tokenizer, for timing only."""


class NetworkExporter(Protocol):
    """Writes networks that are no decoders for one runtime; `backend` is the runtime's name."""

    backend: str

    def export(
        self,
        model: "nn.Module",
        *,
        input_: NetworkInput,
        precision: str,
        images: "Examples | None",
        plan_digest: str,
        out: Path,
        tokenizer: Path | None = None,
    ) -> Artifact:
        """Write a network that maps a batch of images or texts to vectors into the folder `out`, whole or not at all.

        `input_` is what it takes, and becomes part of the sidecar. `images` (images x channels x height x width) are
        preprocessed photographs, or sentences as tokens (sentences x 3 x tokens): 8 bits take their scales from them,
        and need them. The result is compared with torch on the first of them, or on random ones where there are none.
        `tokenizer` is the folder of the tokenizer of an encoder of texts, which is put beside its file. Raises
        VerificationFailed, Unsupported.
        """


def get(backend: str) -> Exporter:
    """Return the exporter for a backend. Raises InvalidInput, listing the known ones, Unavailable without a library."""
    exporter: Exporter = _made(EXPORTERS, backend)
    return exporter


def get_network(backend: str) -> NetworkExporter:
    """Return the exporter of image networks for a backend. Raises what `get` raises, and Unsupported for none."""
    backends.require_networks(backends.get(backend))
    exporter: NetworkExporter = _made(NETWORK_EXPORTERS, backend)
    return exporter


def _made(table: Mapping[str, str], backend: str) -> Any:
    try:
        return registry.get(table, backend, kind="backend")()
    except ImportError as error:
        raise Unavailable(f"exporting to {backend} needs {error.name}; pip install 'dilap[{backend}]'") from error

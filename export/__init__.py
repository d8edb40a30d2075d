"""Write a model as an artifact in a runtime's format, and check it against the torch model that it came from.

    from dilap import export
    export.get("llamacpp").export(model, tokenizer=folder, precision="q4_0", plan_digest="", out=Path("mine"))
    export.get("llamacpp").export(model, precision="q4_0", precisions={"head": "q8_0", "layers.3.ffn": "f16"}, ...)

An exporter for another runtime is one class with the methods of `Exporter`, named in `EXPORTERS`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from dilap.core import registry
from dilap.core.artifact import Artifact
from dilap.core.errors import Unavailable
from dilap.core.shape import UNMIXED, Architecture

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EXPORTERS = {
    "executorch": "dilap.export.executorch.writer:ExecuTorchExporter",
    "llamacpp": "dilap.export.gguf.writer:GgufExporter",
    "onnxruntime": "dilap.export.onnx.onnxruntime:OnnxRuntimeExporter",
    "tensorrt": "dilap.export.onnx.tensorrt:TensorRTExporter",
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


def get(backend: str) -> Exporter:
    """Return the exporter for a backend. Raises InvalidInput, listing the known ones, Unavailable without a library."""
    try:
        exporter: Exporter = registry.get(EXPORTERS, backend, kind="backend")()
    except ImportError as error:
        raise Unavailable(f"exporting to {backend} needs {error.name}; pip install 'dilap[{backend}]'") from error
    return exporter

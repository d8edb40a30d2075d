"""Write a model as an artifact in a runtime's format, and check it against the torch model that it came from.

    from dilap import export
    export.get("llamacpp").export(model, tokenizer=folder, precision="q4_0", plan_digest="", out=Path("mine"))

An exporter for another runtime is one class with the methods of `Exporter`, named in `EXPORTERS`.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from dilap.core import registry
from dilap.core.artifact import Artifact
from dilap.core.errors import Unavailable
from dilap.core.images import ImageInput
from dilap.core.shape import Architecture

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import nn
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
        self, model: "PreTrainedModel", *, tokenizer: Path, precision: str, plan_digest: str, out: Path
    ) -> Artifact:
        """Write `model` into the folder `out` with its sidecar `artifact.json`, whole or not at all.

        `tokenizer` is a Hugging Face folder or a GGUF file. The result is verified (logits against torch, the
        tokenizer's samples against transformers) before it appears. Raises VerificationFailed, Unsupported.
        """

    def export_probe(self, architecture: Architecture, *, precision: str, seed: int, out: Path) -> Artifact:
        """Write a model of that shape with random weights and no tokenizer, for timing only."""

    def export_network(
        self,
        model: "nn.Module",
        *,
        input_: ImageInput,
        precision: str,
        images: "NDArray[np.float32] | None",
        plan_digest: str,
        out: Path,
    ) -> Artifact:
        """Write a network that maps one batch of images to logits, as `export` writes a decoder.

        `input_` is what it takes, and becomes part of the sidecar. `images` (images x channels x height x width) are
        preprocessed photographs: 8 bits take their scales from them, and need them; the result is compared with torch
        on the first of them, or on random images where there are none. Raises VerificationFailed, Unsupported.
        """


def get(backend: str) -> Exporter:
    """Return the exporter for a backend. Raises InvalidInput, listing the known ones, Unavailable without a library."""
    try:
        exporter: Exporter = registry.get(EXPORTERS, backend, kind="backend")()
    except ImportError as error:
        raise Unavailable(f"exporting to {backend} needs {error.name}; pip install 'dilap[{backend}]'") from error
    return exporter

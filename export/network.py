"""What the exporters of networks that are no decoders share: what is verified on, the tokenizer, and the sidecar."""

from pathlib import Path

from torch import nn
from transformers import PreTrainedModel

from dilap import backends
from dilap.backends.inputs import random_images
from dilap.core.artifact import Artifact
from dilap.core.codec import file_sha256
from dilap.core.errors import InvalidInput
from dilap.core.network_input import NetworkInput, TokenInput
from dilap.export.hf_tokenizer import read_tokenizer, save_tokenizer
from dilap.models.network import Examples, gives_embeddings, random_examples, takes_tokens

NUM_VERIFIED = 8  # images, or texts
_FLOATS = ("f32", "f16")
# Measured, in dB (ONNX Runtime f32, int8; ExecuTorch f32, int8; TensorRT f16):
#   tiny random networks of four kinds, the worst   124    27   127    25    57
#   EfficientNet-Lite0 on photographs               119    21   115    21    46
# A damaged network amplifies rounding, so the bounds leave it room; that of 8 bits only tells a file from unrelated
# logits (-3). In ONNX Runtime the same graph is compared in f32 before it is quantised.
SQNR_BOUNDS_DB = {"f32": 60.0, "f16": 20.0, "int8": 0.0}


def require_exportable(backend: str, precision: str, input_: NetworkInput, images: Examples | None) -> None:
    """Raise Unsupported for what the runtime does not hold, InvalidInput where images are wrong or missing."""
    backends.require_network_input(backends.get(backend), input_, precision=precision)
    if images is None and precision not in _FLOATS and not is_scaled_at_run_time(input_):
        raise InvalidInput(f"{precision} needs images, from which the ranges of the activations are taken: --calib")
    if images is not None and (images.shape[1:] != input_.size or not len(images)):
        raise InvalidInput(f"inputs are {images.shape}, and the network takes them as {input_}")


def is_scaled_at_run_time(input_: NetworkInput) -> bool:
    """Return whether 8-bit activations are scaled by their own range in every run, and not by that of other inputs.

    So those of texts are: some channels of a transformer have numbers a hundred times as large as those of the others.
    The embeddings of all-MiniLM-L6-v2 have a cosine similarity of 0.992 to those in f32 with such scales in ONNX
    Runtime, and of 0.926 with fixed ones.
    """
    return isinstance(input_, TokenInput)


def verified_examples(model: nn.Module, input_: NetworkInput, images: Examples | None) -> Examples:
    """Return the images or texts on which an artifact is compared with torch: random ones where there are no others."""
    if images is not None:
        return images[:NUM_VERIFIED]
    if takes_tokens(model):
        made: Examples = random_examples(model, input_.size, NUM_VERIFIED).numpy()
        return made
    return random_images((NUM_VERIFIED, *input_.size))


def output_name(model: nn.Module) -> str:
    """Return the name of a file's output."""
    return "sentence_embedding" if gives_embeddings(model) else "logits"


def add_tokenizer(folder: Path, tokenizer: Path | None, model: nn.Module) -> None:
    """Write the tokenizer of a folder beside an encoder's file. Raises InvalidInput, VerificationFailed."""
    if tokenizer is not None and isinstance(model, PreTrainedModel):
        vocab_size = model.get_input_embeddings().num_embeddings
        save_tokenizer(read_tokenizer(tokenizer, vocab_size=vocab_size), folder)


def described(
    path: Path,
    model: nn.Module,
    input_: NetworkInput,
    *,
    backend: str,
    precision: str,
    plan_digest: str,
    sqnr_db: float | None,
    details: dict[str, object],
) -> Artifact:
    """Return the sidecar of a network's one file."""
    return Artifact(
        path=path.name,
        format=backends.get(backend).format,
        backend=backend,
        precision=precision,
        plan_digest=plan_digest,
        architecture=None,
        input=input_,
        sha256=file_sha256(path),
        num_bytes=path.stat().st_size,
        sqnr_db=sqnr_db,
        details={"torch_dtype": str(next(model.parameters()).dtype), "notes": [], **details},
    )

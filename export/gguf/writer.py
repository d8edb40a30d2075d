"""Export to GGUF, the format of llama.cpp."""

import collections
import errno
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import gguf
import numpy as np
import torch
from numpy.typing import NDArray

from dilap.backends.child import called, opened
from dilap.backends.llamacpp import file as llamacpp
from dilap.backends.llamacpp.gguf_header import read_header
from dilap.core.artifact import Artifact
from dilap.core.codec import encode, file_sha256, write_json, written_aside
from dilap.core.errors import Unsupported
from dilap.core.shape import Architecture
from dilap.export.gguf.layout import Layout, TensorSpec, layout_of
from dilap.export.gguf.tokenizer import NO_TOKENIZER, Tokenizer, read_tokenizer, verify_tokenizer, with_end_tokens
from dilap.export.random_weights import RandomWeights
from dilap.export.source_model import described, end_tokens, require_held, tensor
from dilap.export.verify import NUM_TOKENS, verify_logits
from dilap.models.anatomy import architecture_of, exported_tensors, numerics_of, stand_in_numerics
from dilap.models.context import max_tokens_of
from dilap.models.text_samples import SAMPLES

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Values = Callable[[TensorSpec, "np.dtype[np.floating]"], NDArray[np.floating]]  # one tensor's content
Verify = Callable[[Path, str], float | None]  # a written file in a precision -> SQNR in dB where there is a reference

# Measured, in dB (f32, f16, q8_0, q4_0):
#   tiny random models of four families, the worst   120    56    28    7.1
#   SmolLM2-135M                                      114    56    26    7.5
#   SmolLM2-135M pruned at random, best of four       112    56    24    5.4
#   SmolLM2-135M pruned at random, worst of four       87    27   2.1   -1.4
#   SmolLM2-135M, query rows of one layer misordered  6.3   6.3
# A damaged model amplifies rounding, so the bounds leave it room; f32 and f16 still tell it from a wrong layout.
# The quantised bounds only tell it from unrelated logits (-3): their layout is verified in f16 before.
SQNR_BOUNDS_DB = {"f32": 60.0, "f16": 20.0, "q8_0": 0.0, "q5_0": -2.5, "iq4_nl": -2.5, "q4_0": -2.5}


class GgufExporter:
    """Writes `model.gguf` and `artifact.json`."""

    backend = "llamacpp"

    def export(
        self, model: "PreTrainedModel", *, tokenizer: Path, precision: str, plan_digest: str, out: Path
    ) -> Artifact:
        """Write `model` into the folder `out`, verified, or leave nothing behind."""
        architecture = architecture_of(model)
        layout = layout_of(architecture, numerics_of(model))
        values = ModelValues(tensors=exported_tensors(model), layout=layout)
        words = read_tokenizer(tokenizer, vocab_size=architecture.vocab_size)
        words = with_end_tokens(words, end_tokens(model, words.end))

        notes = set(layout.notes)

        def verify(path: Path, precision: str) -> float:
            notes.update(verify_tokenizer(path, tokenizer))
            return verify_gguf(model, path, precision=precision)

        with written_aside(out) as folder:
            artifact = _write_folder(folder, layout, values, tokenizer=words, precision=precision, verify=verify)
            artifact = described(artifact, model, plan_digest=plan_digest, notes=tuple(notes))
            write_json(folder / "artifact.json", encode(artifact))
        return artifact

    def export_probe(self, architecture: Architecture, *, precision: str, seed: int, out: Path) -> Artifact:
        """Write a model of that shape with random weights and no tokenizer, for timing only."""
        layout = layout_of(architecture, stand_in_numerics(architecture))

        def verify(path: Path, _: str) -> None:
            called(llamacpp.validate, path, runtime="llamacpp")

        random = RandomWeights(seed)

        def values(spec: TensorSpec, dtype: "np.dtype[np.floating]") -> NDArray[np.floating]:
            return random.weights(spec.name, spec.shape, dtype)

        with written_aside(out) as folder:
            artifact = _write_folder(folder, layout, values, tokenizer=NO_TOKENIZER, precision=precision, verify=verify)
            write_json(folder / "artifact.json", encode(artifact))
        return artifact


def verify_gguf(model: "PreTrainedModel", path: Path, *, precision: str) -> float:
    """Return the SQNR in dB of a file's logits to `model`'s. Raises VerificationFailed below the precision's bound."""
    with opened(llamacpp.Gguf, path, runtime="llamacpp", num_tokens=NUM_TOKENS) as file:
        token_ids = _token_ids(file, min(NUM_TOKENS, max_tokens_of(model.config)))
        # llama.cpp looks GELU up in a table in f16, whatever the precision of the file.
        judged = "f16" if precision == "f32" and numerics_of(model).activation != "silu" else precision
        bound, name = SQNR_BOUNDS_DB[judged], f"{path.name} in {precision}"
        half = torch.float16 if judged == "f16" else None
        return verify_logits(model, file, token_ids, bound_db=bound, name=name, half=half)


def _token_ids(file: llamacpp.Gguf, count: int) -> list[int]:
    """Return tokens of real text if the file has a tokenizer: a trained model's logits are only typical there."""
    if file.has_vocabulary:
        return file.tokens("\n".join(SAMPLES))[:count]
    return [int(token) for token in np.random.default_rng(0).integers(0, file.vocab_size, count)]


@dataclass(frozen=True, kw_only=True)
class ModelValues:
    """Tensors of a torch model, converted one at a time."""

    tensors: Mapping[str, torch.Tensor]
    layout: Layout

    def __call__(self, spec: TensorSpec, dtype: "np.dtype[np.floating]") -> NDArray[np.floating]:
        """Return a tensor. Raises InvalidInput, naming it, where it is missing, not finite or of another shape."""
        kind = torch.float16 if dtype == np.float16 else torch.float32
        values = tensor(self.tensors, spec.source, spec.shape, dtype=kind)
        if spec.rotary_heads:
            values = _neighbouring(values, num_heads=spec.rotary_heads)
        if spec.factor != 1.0:
            values = values * spec.factor
        array: NDArray[np.floating] = values.contiguous().numpy()
        return array


def _neighbouring(rows: torch.Tensor, *, num_heads: int) -> torch.Tensor:
    """Put every head's rows i and i + head_dim / 2 side by side, the order of llama.cpp's NORM rotary embedding."""
    return rows.reshape(num_heads, 2, -1, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def _write_folder(
    folder: Path, layout: Layout, values: Values, *, tokenizer: Tokenizer, precision: str, verify: Verify
) -> Artifact:
    """Write and verify `folder/model.gguf`; a quantised one is made by llama.cpp's own quantiser from an f16 file.

    The f16 file is verified too: four bits cost as many decibels (7 left) as a misordered matrix does (6 left).
    """
    if precision not in SQNR_BOUNDS_DB:
        raise Unsupported(f"precision {precision!r} is not known; llama.cpp runs {', '.join(SQNR_BOUNDS_DB)}")
    require_held(layout.architecture, backend=GgufExporter.backend, precision=precision)
    folder.mkdir()
    path = folder / "model.gguf"
    quantised = precision in llamacpp.FILE_TYPES
    floats, written = (folder / "f16.gguf", "f16") if quantised else (path, precision)
    _write_floats(floats, layout, values, tokenizer=tokenizer, precision=written)
    sqnr_db = verify(floats, written)
    if quantised:
        file_type = llamacpp.FILE_TYPES[precision]
        called(llamacpp.quantise, floats, path, runtime="llamacpp", precision=precision, file_type=file_type)
        floats.unlink()
        sqnr_db = verify(path, precision)
    return _describe(path, layout, precision=precision, sqnr_db=sqnr_db)


def _write_floats(path: Path, layout: Layout, values: Values, *, tokenizer: Tokenizer, precision: str) -> None:
    """Write the header, then one tensor at a time, so that memory never holds a second copy of the model."""
    writer = gguf.GGUFWriter(path, layout.name)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16 if precision == "f16" else gguf.LlamaFileType.ALL_F32)
    for key, value in layout.metadata().items():
        _add(writer, f"{layout.name}.{key}", value)
    tokenizer.write(writer)
    specs = [(spec, _dtype(spec, precision)) for spec in layout.tensors()]
    for spec, dtype in specs:
        writer.add_tensor_info(spec.name, spec.shape, dtype, int(np.prod(spec.shape)) * dtype.itemsize)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for spec, dtype in specs:
            _write(writer, _content(spec, dtype, layout, values))
    finally:
        writer.close()


def _add(writer: gguf.GGUFWriter, key: str, value: str | int | float | list[int]) -> None:
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    else:
        writer.add_float32(key, value)


def _dtype(spec: TensorSpec, precision: str) -> "np.dtype[np.floating]":
    """Return a tensor's type. llama.cpp needs vectors (norms, biases, rotary factors) in f32, whatever matrices are.

    Routers are in f32 too, as llama.cpp's own converter and quantiser leave them.
    """
    is_matrix = len(spec.shape) > 1 and not spec.name.endswith(".ffn_gate_inp.weight")
    return np.dtype(np.float16 if precision == "f16" and is_matrix else np.float32)


def _content(spec: TensorSpec, dtype: "np.dtype[np.floating]", layout: Layout, values: Values) -> NDArray[np.floating]:
    if spec.name == "rope_freqs.weight":
        return np.array(layout.rope_factors, dtype)
    return values(spec, dtype) if spec.source else np.full(spec.shape, spec.constant, dtype)


def _write(writer: gguf.GGUFWriter, array: NDArray[np.floating]) -> None:
    try:
        writer.write_tensor_data(array)
    except OSError as error:
        if error.errno is not None:
            raise
        # numpy reports a short write without an errno, and nothing but a full disk causes one.
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error


def _describe(path: Path, layout: Layout, *, precision: str, sqnr_db: float | None) -> Artifact:
    """Return the sidecar, without a plan.

    The types are read from the file, because llama.cpp keeps f16 where a row does not fill a block.
    """
    types = collections.Counter(
        gguf.GGMLQuantizationType(kind).name.lower() for kind in read_header(path).types.values()
    )
    return Artifact(
        path=path.name,
        format="gguf",
        backend=GgufExporter.backend,
        precision=precision,
        plan_digest="",
        architecture=layout.architecture,
        sha256=file_sha256(path),
        num_bytes=path.stat().st_size,
        sqnr_db=sqnr_db,
        details={"architecture": layout.name, "tensor_types": dict(sorted(types.items()))},
    )

"""Export to GGUF, the format of llama.cpp."""

import collections
import errno
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray

from dilap.backends.child import called, opened
from dilap.backends.llamacpp import file as llamacpp
from dilap.backends.llamacpp.gguf_header import read_header
from dilap.core.artifact import Artifact
from dilap.core.codec import encode, file_sha256, write_json, written_aside
from dilap.core.numerics import Numerics
from dilap.core.precisions import Mix
from dilap.core.shape import UNMIXED, Architecture
from dilap.export.gguf.layout import Layout, TensorSpec, layout_of
from dilap.export.gguf.tokenizer import NO_TOKENIZER, Tokenizer, read_tokenizer, verify_tokenizer, with_end_tokens
from dilap.export.random_weights import RandomWeights
from dilap.export.source_model import described, end_tokens, require_held, tensor
from dilap.export.verify import NUM_TOKENS, verify_logits
from dilap.models.anatomy import architecture_of, exported_tensors, numerics_of, stand_in_numerics
from dilap.models.context import max_tokens_of
from dilap.models.origin import Origin, origin_of
from dilap.models.text_samples import SAMPLES

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Values = Callable[[TensorSpec, "np.dtype[np.floating]"], NDArray[np.floating]]  # one tensor's content
UNNAMED: Mapping[str, Any] = MappingProxyType({})  # of a model of random weights
Verify = Callable[[Path, Mix], float | None]  # a written file in a mix -> SQNR in dB where there is a reference

# Measured, in dB (f32, f16, q8_0, q4_0):
#   tiny random models of four families, the worst   120    56    28    7.1
#   SmolLM2-135M                                      114    56    26    7.5
#   SmolLM2-135M pruned at random, best of four       112    56    24    5.4
#   SmolLM2-135M pruned at random, worst of four       87    27   2.1   -1.4
#   SmolLM2-135M, query rows of one layer misordered  6.3   6.3
# A damaged model amplifies rounding, so the bounds leave it room; f32 and f16 still tell it from a wrong layout.
# The quantised bounds only tell it from unrelated logits (-3): their layout is verified in f16 before.
SQNR_BOUNDS_DB = {"f32": 60.0, "f16": 20.0, "q8_0": 0.0, "q5_0": -2.5, "iq4_nl": -2.5, "q4_0": -2.5}
_ROW_OF_Q6_K = 256  # weights, of which rows of this type are a multiple


class GgufExporter:
    """Writes `model.gguf` and `artifact.json`."""

    backend = "llamacpp"

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
        """Write `model` into the folder `out`, verified, or leave nothing behind."""
        architecture, mix = architecture_of(model), Mix(precision=precision, precisions=precisions)
        layout = _layout(architecture, numerics_of(model), mix)
        values = ModelValues(tensors=exported_tensors(model), layout=layout)
        words = read_tokenizer(tokenizer, vocab_size=architecture.vocab_size)
        words = with_end_tokens(words, end_tokens(model, words.end))

        notes = set(layout.notes)

        def verify(path: Path, mix: Mix) -> float:
            notes.update(verify_tokenizer(path, tokenizer))
            return verify_gguf(model, path, mix=mix)

        with written_aside(out) as folder:
            artifact = _write_folder(
                folder,
                layout,
                values,
                tokenizer=words,
                mix=mix,
                verify=verify,
                general=_general(origin_of(model.config)),
            )
            artifact = described(artifact, model, plan_digest=plan_digest, notes=tuple(notes))
            write_json(folder / "artifact.json", encode(artifact))
        return artifact

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
        mix = Mix(precision=precision, precisions=precisions)
        layout = _layout(architecture, stand_in_numerics(architecture), mix)

        def verify(path: Path, _: Mix) -> None:
            called(llamacpp.validate, path, runtime="llamacpp")

        random = RandomWeights(seed)

        def values(spec: TensorSpec, dtype: "np.dtype[np.floating]") -> NDArray[np.floating]:
            return random.weights(spec.name, spec.shape, dtype)

        with written_aside(out) as folder:
            artifact = _write_folder(folder, layout, values, tokenizer=NO_TOKENIZER, mix=mix, verify=verify)
            write_json(folder / "artifact.json", encode(artifact))
        return artifact


def verify_gguf(model: "PreTrainedModel", path: Path, *, mix: Mix) -> float:
    """Return the SQNR in dB of a file's logits to `model`'s.

    Raises VerificationFailed below the bound, which is that of the precision in `mix` that loses most.
    """
    with opened(llamacpp.Gguf, path, runtime="llamacpp", num_tokens=NUM_TOKENS) as file:
        token_ids = _token_ids(file, min(NUM_TOKENS, max_tokens_of(model.config)))
        # llama.cpp looks GELU up in a table in f16, whatever the precision of the file.
        least = min(mix.used, key=SQNR_BOUNDS_DB.__getitem__)
        judged = "f16" if least == "f32" and numerics_of(model).activation != "silu" else least
        bound, name = SQNR_BOUNDS_DB[judged], f"{path.name} in {mix}"
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


def _layout(architecture: Architecture, numerics: Numerics, mix: Mix) -> Layout:
    """Return the layout of a model in `mix`, in which a head that is tied to the embedding may be of another type.

    Raises Unsupported, and InvalidInput for a part or a precision that is not known.
    """
    layout = layout_of(architecture, numerics)
    require_held(architecture, backend=GgufExporter.backend, mix=mix)
    if not architecture.tied_embeddings or layout.name == "olmo2":  # whose files have both in any case
        return layout
    usual = _type_of_tied(architecture.hidden_size, mix.precision)
    head, embedding = (mix.precisions.get(part, usual) for part in ("head", "embedding"))
    return replace(layout, has_head=head != embedding)


def _type_of_tied(hidden_size: int, precision: str) -> str:
    """Return the type that llama.cpp's quantiser chooses for a matrix that is embedding and head at once."""
    if precision in ("f32", "f16", "q8_0"):
        return precision
    return "q8_0" if hidden_size % _ROW_OF_Q6_K else "q6_K"


def _write_folder(
    folder: Path,
    layout: Layout,
    values: Values,
    *,
    tokenizer: Tokenizer,
    mix: Mix,
    verify: Verify,
    general: Mapping[str, Any] = UNNAMED,
) -> Artifact:
    """Write and verify `folder/model.gguf`; a quantised one is made by llama.cpp's own quantiser from an f16 file.

    `general` has what the file says of the model's origin, by key without `general.`.
    The f16 file is verified too: four bits cost as many decibels (7 left) as a misordered matrix does (6 left).
    """
    folder.mkdir()
    path, quantised = folder / "model.gguf", [one for one in mix.used if one in llamacpp.FILE_TYPES]
    floats, written = (folder / "f16.gguf", _in_floats(mix)) if quantised else (path, mix)
    _write_floats(floats, layout, values, tokenizer=tokenizer, mix=written, general=general)
    sqnr_db = verify(floats, written)
    if quantised:
        called(
            llamacpp.quantise,
            floats,
            path,
            runtime="llamacpp",
            precision=str(mix),
            file_type=llamacpp.FILE_TYPES[quantised[0]],
            types=_types(layout, mix),
        )
        floats.unlink()
        sqnr_db = verify(path, mix)
    return _describe(path, layout, mix=mix, sqnr_db=sqnr_db)


def _in_floats(mix: Mix) -> Mix:
    """Return `mix` with f16 in place of the quantised precisions."""
    floats = {one: "f16" if one in llamacpp.FILE_TYPES else one for one in mix.used}
    precisions = {part: floats[one] for part, one in mix.precisions.items()}
    return Mix(precision=floats[mix.precision], precisions=precisions)


def _types(layout: Layout, mix: Mix) -> dict[str, str]:
    """Return, by name, the types of the matrices that the quantiser is not to choose itself.

    All matrices of a block have one type, where the quantiser would give some of them more bits. For head and embedding
    it chooses where they are not named and the precision of the whole is quantised, but it would take an embedding that
    the head is not read from for one that may be coarser.
    """
    found = {}
    for spec in filter(lambda one: one.part, layout.tensors()):
        is_chosen = spec.part in ("head", "embedding") and spec.part not in mix.precisions
        if not is_chosen or mix.precision not in llamacpp.FILE_TYPES:
            found[spec.name] = mix.of(spec.part)
        elif spec.part == "embedding" and layout.has_head:
            found[spec.name] = _type_of_tied(layout.architecture.hidden_size, mix.precision)
    return found


def _write_floats(
    path: Path, layout: Layout, values: Values, *, tokenizer: Tokenizer, mix: Mix, general: Mapping[str, Any]
) -> None:
    """Write the header, then one tensor at a time, so that memory never holds a second copy of the model."""
    writer = gguf.GGUFWriter(path, layout.name)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16 if mix.precision == "f16" else gguf.LlamaFileType.ALL_F32)
    for key, value in general.items():
        _add(writer, f"general.{key}", value)
    for key, value in layout.metadata().items():
        _add(writer, f"{layout.name}.{key}", value)
    tokenizer.write(writer)
    specs = [(spec, _dtype(spec, mix)) for spec in layout.tensors()]
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


def _general(origin: Origin) -> dict[str, Any]:
    """Return what a file says of the model's origin: as its source said it, or what a model card knows of it."""
    if origin.general:
        return origin.general
    known: dict[str, Any] = {
        "name": origin.name,
        "license": origin.license,
        "license.name": origin.license_name,
        "license.link": origin.license_link,
        "languages": list(origin.languages),
    }
    for number, base in enumerate(origin.base_models):
        known[f"base_model.{number}.repo_url"] = f"https://huggingface.co/{base}"
    known["base_model.count"] = len(origin.base_models)
    return {key: value for key, value in known.items() if value}


def _add(writer: gguf.GGUFWriter, key: str, value: str | float | list[Any]) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    else:
        writer.add_float32(key, value)


def _dtype(spec: TensorSpec, mix: Mix) -> "np.dtype[np.floating]":
    """Return a tensor's type. llama.cpp needs all but matrices (norms, biases, rotary factors) in f32."""
    return np.dtype(np.float16 if spec.part and mix.of(spec.part) == "f16" else np.float32)


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


def _describe(path: Path, layout: Layout, *, mix: Mix, sqnr_db: float | None) -> Artifact:
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
        precision=mix.precision,
        precisions=dict(mix.precisions),
        plan_digest="",
        architecture=layout.architecture,
        sha256=file_sha256(path),
        num_bytes=path.stat().st_size,
        sqnr_db=sqnr_db,
        details={"architecture": layout.name, "tensor_types": dict(sorted(types.items()))},
    )

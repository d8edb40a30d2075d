"""Export for TensorRT: an ONNX file and the recipe by which a device builds its engine."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from dilap.backends.child import called, opened
from dilap.backends.onnxruntime.file import OnnxFile
from dilap.backends.tensorrt.builder import CHECKED_TARGETS
from dilap.backends.tensorrt.recipe import MAX_TOKENS, RECIPE_FILE, CacheInput, Recipe
from dilap.core.artifact import Artifact
from dilap.core.codec import decode, encode, file_sha256, write_json, written_aside
from dilap.core.errors import Crashed, InvalidInput, Unavailable, Unsupported
from dilap.core.numerics import Numerics
from dilap.core.precisions import Mix
from dilap.core.shape import UNMIXED, Architecture
from dilap.export.hf_tokenizer import read_tokenizer, save_tokenizer
from dilap.export.onnx.emitter import Values
from dilap.export.onnx.graph import build_model
from dilap.export.onnx.tensorrt_report import CompileReport, compiled, one_layer_a_width
from dilap.export.onnx.valid import require_valid
from dilap.export.onnx.weights import ModelWeights, ProbeWeights
from dilap.export.source_model import described, require_held
from dilap.export.verify import NUM_TOKENS, torch_logits, verify_logits
from dilap.models.anatomy import architecture_of, exported_tensors, numerics_of, stand_in_numerics
from dilap.models.text_samples import SAMPLES

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_MODEL, _WEIGHTS, REFERENCE, REPORT = "model.onnx", "model.onnx.data", "reference.npz", "compile_report.json"
TESTED = ("TensorRT 10.3 (JetPack 6)", "TensorRT 10.16 (JetPack 7.2)", "TensorRT 11", "TensorRT for RTX 1.7")
# Measured in dB on tiny random models of five families, pruned: f16 53 to 66, bf16 38 to 51; SmolLM2-135M: f16 56.
# A damaged model amplifies rounding (llama.cpp's f16 then has 27), and an engine rounds at other places than torch.
SQNR_BOUNDS_DB = {"f16": 20.0, "bf16": 10.0}


class TensorRTExporter:
    """Writes `model.onnx` with its weights beside it, the recipe, the tokenizer and what was checked."""

    backend = "tensorrt"

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
        """Write `model` into the folder `out`, verified as far as this machine can, or leave nothing behind."""
        architecture = architecture_of(model)
        require_held(architecture, backend=self.backend, mix=Mix(precision=precision, precisions=precisions))
        numerics = numerics_of(model)
        values = RoundedValues(ModelWeights(exported_tensors(model)).values, precision)
        words = read_tokenizer(tokenizer, vocab_size=architecture.vocab_size)
        token_ids = words("\n".join(SAMPLES))["input_ids"][: min(NUM_TOKENS, numerics.context_length)]
        with written_aside(out) as folder:
            folder.mkdir()
            save_tokenizer(words, folder)
            files = _write_model(folder, architecture, numerics, values, dtype=precision)
            np.savez(folder / REFERENCE, token_ids=np.array(token_ids), logits=torch_logits(model, token_ids))
            recipe = _recipe(architecture, numerics, precision=precision, files=files, reference=REFERENCE)
            write_json(folder / RECIPE_FILE, encode(recipe))
            job = _Check(model, architecture, numerics, values, recipe, folder)
            sqnr_db, verified = job.verify(token_ids)
            notes = (verified, job.compile(), REMAINING)
            artifact = _describe(folder, recipe, architecture, sqnr_db=sqnr_db)
            artifact = described(artifact, model, plan_digest=plan_digest, notes=notes)
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
        """Write a model of that shape with random weights, for timing only."""
        require_held(architecture, backend=self.backend, mix=Mix(precision=precision, precisions=precisions))
        numerics = stand_in_numerics(architecture)
        with written_aside(out) as folder:
            folder.mkdir()
            files = _write_model(folder, architecture, numerics, ProbeWeights(seed).values, dtype=precision)
            recipe = _recipe(architecture, numerics, precision=precision, files=files, reference=None)
            write_json(folder / RECIPE_FILE, encode(recipe))
            artifact = _describe(folder, recipe, architecture, sqnr_db=None)
            write_json(folder / "artifact.json", encode(artifact))
        return artifact


REMAINING = (
    "on the device: the first run builds the engine with JetPack's TensorRT, compares its logits with torch's "
    f"({REFERENCE}) and keeps it in engines/; nothing here was run on a GPU"
)


@dataclass(frozen=True)
class RoundedValues:
    """Numbers rounded to `precision` but held in f32, so that what is checked is what is written."""

    values: Values
    precision: str

    def __call__(self, name: str, shape: tuple[int, ...]) -> NDArray[np.floating]:
        """Return a tensor. Raises InvalidInput, naming it, where a value is too large."""
        exact = torch.from_numpy(self.values(name, shape))
        rounded = exact.to(torch.bfloat16 if self.precision == "bf16" else torch.float16)
        if not torch.isfinite(rounded).all():
            raise InvalidInput(f"{name} holds a value too large for {self.precision}; try --precision bf16")
        array: NDArray[np.floating] = rounded.float().numpy()
        return array


def _write_model(
    folder: Path, architecture: Architecture, numerics: Numerics, values: Values, *, dtype: str
) -> dict[str, str]:
    """Write the ONNX file and its weights; return their SHA-256 by name."""
    _save(folder / _MODEL, architecture, numerics, values, dtype=dtype)
    weights = file_sha256(folder / _WEIGHTS)
    model = ir.load(folder / _MODEL)
    model.metadata_props["weights_sha256"] = weights  # so that other weights change the graph file's digest
    ir.save(model, folder / _MODEL)
    return {_MODEL: file_sha256(folder / _MODEL), _WEIGHTS: weights}


def _save(path: Path, architecture: Architecture, numerics: Numerics, values: Values, *, dtype: str) -> None:
    model = build_model(architecture, numerics, values, form="plain", dtype=dtype)
    for value in (*model.graph.inputs, *model.graph.outputs):  # batch 1: TensorRT plans better with fixed numbers
        assert value.shape is not None
        value.shape = ir.Shape([1 if str(size) == "batch" else size for size in value.shape])
    ir.save(model, path, external_data=path.name + ".data")
    require_valid(path)


def _recipe(
    architecture: Architecture,
    numerics: Numerics,
    *,
    precision: str,
    files: dict[str, str],
    reference: str | None,
) -> Recipe:
    with_attention = [layer for layer in architecture.layers if layer.num_heads]
    cache = (
        CacheInput(name=f"past_key_values.{index}.{part}", num_kv_heads=layer.num_kv_heads)
        for index, layer in enumerate(with_attention)
        for part in ("key", "value")
    )
    most = min(numerics.context_length, MAX_TOKENS)
    return Recipe(
        precision=precision,
        head_dim=architecture.head_dim,
        vocab_size=architecture.vocab_size,
        cache=tuple(cache),
        max_past=most - 1,
        max_prompt=most,
        files=files,
        reference=reference,
        bound_db=SQNR_BOUNDS_DB[precision],
        tested=TESTED,
    )


def _describe(folder: Path, recipe: Recipe, architecture: Architecture, *, sqnr_db: float | None) -> Artifact:
    """Return the sidecar, without a plan."""
    companions = {name: file_sha256(folder / name) for name in (RECIPE_FILE, recipe.reference) if name}
    return Artifact(
        path=_MODEL,
        format="onnx",
        backend=TensorRTExporter.backend,
        precision=recipe.precision,
        plan_digest="",
        architecture=architecture,
        sha256=recipe.files[_MODEL],
        companions={_WEIGHTS: recipe.files[_WEIGHTS], **companions},
        num_bytes=sum((folder / name).stat().st_size for name in recipe.files),
        sqnr_db=sqnr_db,
    )


@dataclass(frozen=True)
class _Check:
    """Checks a written folder as far as this machine can."""

    model: "PreTrainedModel"
    architecture: Architecture
    numerics: Numerics
    values: Values
    recipe: Recipe
    folder: Path

    def verify(self, token_ids: Sequence[int]) -> tuple[float | None, str]:
        """Return the SQNR in dB of the ONNX file in ONNX Runtime against torch, and a line that says so.

        The SQNR is None without ONNX Runtime. Its CPU kernels know no bf16: for bf16 the same graph is run in f32 with
        weights rounded to bf16. Raises VerificationFailed.
        """
        precision = self.recipe.precision
        path, computed = self.folder / _MODEL, precision
        if precision == "bf16":
            path, computed = self.folder / "check.onnx", "f32"
            _save(path, self.architecture, self.numerics, self.values, dtype=computed)
        try:
            bound, name = SQNR_BOUNDS_DB[precision], f"{_MODEL} in {precision}"
            with opened(OnnxFile, path, runtime="onnxruntime") as file:
                sqnr = verify_logits(self.model, file, token_ids, bound_db=bound, name=name)
        except Unavailable as error:
            return None, f"not verified against torch: {error}"
        finally:
            _remove_check(self.folder)
        how = f"computed in {computed}" + (f" on {precision} weights" if computed != precision else "")
        return sqnr, f"verified against torch in ONNX Runtime, {how}: {sqnr:.1f} dB"

    def compile(self) -> str:
        """Write the compile report; return a line that sums it up, or says why there is none."""
        shallow, numerics = one_layer_a_width(self.architecture, self.numerics)
        path = self.folder / "check.onnx"
        recipe = _recipe(shallow, numerics, precision=self.recipe.precision, files={}, reference=None)
        _save(path, shallow, numerics, ProbeWeights(0).values, dtype=recipe.precision)
        try:
            document = called(
                compiled,
                self.folder / _MODEL,
                path,
                runtime=TensorRTExporter.backend,
                recipe=encode(recipe),
                targets=CHECKED_TARGETS,
            )
        except (Crashed, Unavailable, Unsupported) as error:
            return f"not compiled: {error}"
        finally:
            _remove_check(self.folder)
        found = decode(CompileReport, document, source=REPORT)
        depth, built = len(self.architecture.layers), len(shallow.layers)
        report = replace(found, files=self.recipe.files, num_layers=depth, num_layers_built=built)
        write_json(self.folder / REPORT, encode(report))
        return f"{report.describe()} ({REPORT})"


def _remove_check(folder: Path) -> None:
    for path in folder.glob("check.onnx*"):
        path.unlink()

"""Export for TensorRT: an ONNX file and the recipe by which a device builds its engine."""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from transformers import AutoTokenizer

from dilap import tensorrt_build
from dilap.anatomy import architecture_of
from dilap.codec import encode, file_sha256, write_json, written_aside
from dilap.errors import InvalidInput, Unavailable, Unsupported
from dilap.export.onnx_graph import OPSET, Values, build_model
from dilap.export.onnx_hyperparameters import Hyperparameters, hyperparameters, probe_hyperparameters
from dilap.export.tensorrt_report import CompileReport, compile_for, one_layer_a_width
from dilap.export.text_samples import SAMPLES
from dilap.export.verify import NUM_TOKENS, torch_logits, verify_logits
from dilap.tensorrt_build import CHECKED_TARGETS
from dilap.tensorrt_recipe import RECIPE_FILE, SHAPE_INPUT, CacheInput, Recipe
from dilap.types import Architecture, Artifact

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_MODEL, _WEIGHTS, _REFERENCE, _REPORT = "model.onnx", "model.onnx.data", "reference.npz", "compile_report.json"
_TESTED = ("TensorRT 10.3 (JetPack 6)", "TensorRT 10.16 (JetPack 7.2)", "TensorRT 11", "TensorRT for RTX 1.7")
_MAX_TOKENS = 2048  # of a prompt and of a context: an engine reserves memory for its largest shapes
# Measured in dB on tiny random models of five families, pruned: f16 53 to 66, bf16 38 to 51; SmolLM2-135M: f16 56.
# A damaged model amplifies rounding (llama.cpp's f16 then has 27), an engine rounds in places of its own.
SQNR_BOUNDS_DB = {"f16": 20.0, "bf16": 10.0}


class TensorRTExporter:
    """Writes `model.onnx` with its weights beside it, the recipe, the tokenizer and what was checked."""

    backend = "tensorrt"

    def export(
        self, model: "PreTrainedModel", *, tokenizer: Path, precision: str, plan_digest: str, out: Path
    ) -> Artifact:
        """Write `model` into the folder `out`, verified as far as this machine can, or leave nothing behind."""
        architecture = architecture_of(model)
        numbers = hyperparameters(model, architecture)
        values = ModelValues(model.state_dict(), precision)
        with written_aside(out) as folder:
            folder.mkdir()
            token_ids = _write_tokenizer(tokenizer, folder, count=min(NUM_TOKENS, numbers.context_length))
            files = _write_model(folder, architecture, numbers, values, dtype=precision)
            np.savez(folder / _REFERENCE, token_ids=np.array(token_ids), logits=torch_logits(model, token_ids))
            recipe = _recipe(architecture, numbers, precision=precision, files=files, reference=_REFERENCE)
            write_json(folder / RECIPE_FILE, encode(recipe))
            job = _Check(model, architecture, numbers, values, recipe, folder)
            sqnr_db, verified = job.verify(token_ids)
            notes = [verified, job.compile(), _REMAINING]
            artifact = _describe(folder, recipe, architecture, sqnr_db=sqnr_db)
            details = {**artifact.details, "torch_dtype": str(model.dtype), "notes": notes}
            artifact = replace(artifact, plan_digest=plan_digest, details=details)
            write_json(folder / "artifact.json", encode(artifact))
        return artifact

    def export_probe(self, architecture: Architecture, *, precision: str, seed: int, out: Path) -> Artifact:
        """Write a model of that shape with random weights, for timing only."""
        numbers = probe_hyperparameters(architecture)
        with written_aside(out) as folder:
            folder.mkdir()
            files = _write_model(folder, architecture, numbers, RandomValues(seed), dtype=precision)
            recipe = _recipe(architecture, numbers, precision=precision, files=files, reference=None)
            write_json(folder / RECIPE_FILE, encode(recipe))
            artifact = _describe(folder, recipe, architecture, sqnr_db=None)
            write_json(folder / "artifact.json", encode(artifact))
        return artifact


_REMAINING = (
    "on the device: the first run builds the engine with JetPack's TensorRT, compares its logits with torch's "
    f"({_REFERENCE}) and keeps it in engines/; nothing here was run on a GPU"
)


@dataclass(frozen=True)
class ModelValues:
    """Tensors of a torch model, in f32 but with no more digits than `precision` has."""

    tensors: dict[str, torch.Tensor]
    precision: str

    def __call__(self, name: str, shape: tuple[int, ...]) -> NDArray[np.floating]:
        """Raises InvalidInput, naming the tensor, for a missing one, another shape, NaN or infinity."""
        if name not in self.tensors:
            raise InvalidInput(f"the model has no tensor {name}")
        tensor = self.tensors[name].detach()
        if tuple(tensor.shape) != shape:
            raise InvalidInput(f"{name} is {tuple(tensor.shape)}, the architecture needs {shape}")
        values = tensor.to(device="cpu", dtype=torch.bfloat16 if self.precision == "bf16" else torch.float16)
        if not torch.isfinite(values).all():
            raise InvalidInput(f"{name} holds NaN, infinity or a value too large for {self.precision}; try bf16")
        array: NDArray[np.floating] = values.float().numpy()
        return array


class RandomValues:
    """N(0, 0.02) from one small block repeated, so that a probe is written at the speed of the disk."""

    def __init__(self, seed: int) -> None:
        self._block = np.random.default_rng(seed).normal(0, 0.02, 1 << 16).astype(np.float32)

    def __call__(self, name: str, shape: tuple[int, ...]) -> NDArray[np.floating]:
        if name.endswith("norm.weight"):  # ones keep the activations of a trained model's size
            return np.ones(shape, np.float32)
        return np.resize(self._block, shape)


def _write_model(
    folder: Path, architecture: Architecture, numbers: Hyperparameters, values: Values, *, dtype: str
) -> dict[str, str]:
    """The ONNX file and its weights; their SHA-256 by name. Raises Unsupported for another precision."""
    if dtype not in SQNR_BOUNDS_DB:
        raise Unsupported(f"precision {dtype!r} is not known; TensorRT runs {', '.join(SQNR_BOUNDS_DB)}")
    _save(folder / _MODEL, architecture, numbers, values, dtype=dtype)
    weights = file_sha256(folder / _WEIGHTS)
    model = ir.load(folder / _MODEL)
    model.metadata_props["weights_sha256"] = weights  # so that the digest of the graph's file tells weights apart
    ir.save(model, folder / _MODEL)
    return {_MODEL: file_sha256(folder / _MODEL), _WEIGHTS: weights}


def _save(path: Path, architecture: Architecture, numbers: Hyperparameters, values: Values, *, dtype: str) -> None:
    model = build_model(architecture, numbers, values, form="plain", dtype=dtype)
    for value in (*model.graph.inputs, *model.graph.outputs):  # batch 1: TensorRT plans better with fixed numbers
        assert value.shape is not None
        value.shape = ir.Shape([1 if str(size) == "batch" else size for size in value.shape])
    ir.save(model, path, external_data=path.name + ".data")


def _recipe(
    architecture: Architecture,
    numbers: Hyperparameters,
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
    most = min(numbers.context_length, _MAX_TOKENS)
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
        tested=_TESTED,
    )


def _write_tokenizer(path: Path, folder: Path, *, count: int) -> list[int]:
    """The tokenizer as a Hugging Face folder has it; the first `count` tokens of text that tries it."""
    where: dict[str, Any] = {"gguf_file": path.name} if path.is_file() else {}
    tokenizer = AutoTokenizer.from_pretrained(path.parent if path.is_file() else path, **where)
    tokenizer.save_pretrained(folder)
    ids: list[int] = tokenizer("\n".join(SAMPLES))["input_ids"]
    return ids[:count]


def _describe(folder: Path, recipe: Recipe, architecture: Architecture, *, sqnr_db: float | None) -> Artifact:
    """The sidecar, without a plan."""
    return Artifact(
        path=_MODEL,
        format="onnx",
        backend=TensorRTExporter.backend,
        precision=recipe.precision,
        plan_digest="",
        architecture=architecture,
        sha256=recipe.files[_MODEL],
        num_bytes=sum((folder / name).stat().st_size for name in recipe.files),
        sqnr_db=sqnr_db,
        details={"opset": OPSET, "files": recipe.files},
    )


@dataclass(frozen=True)
class _Check:
    """What this machine can check of a written folder."""

    model: "PreTrainedModel"
    architecture: Architecture
    numbers: Hyperparameters
    values: Values
    recipe: Recipe
    folder: Path

    def verify(self, token_ids: Sequence[int]) -> tuple[float | None, str]:
        """The SQNR in dB of the ONNX file in ONNX Runtime against torch, and a line that says so.

        ONNX Runtime's CPU kernels know no bf16: there the same graph is run in f32 with the weights' bf16 values.
        Raises VerificationFailed.
        """
        try:
            runtime = importlib.import_module("onnxruntime")
        except ImportError:
            return None, "not verified against torch: pip install onnxruntime and export again"
        precision = self.recipe.precision
        path, computed = self.folder / _MODEL, precision
        if precision == "bf16":
            path, computed = self.folder / "check.onnx", "f32"
            _save(path, self.architecture, self.numbers, self.values, dtype=computed)
        try:
            session = OnnxLogits(path, replace(self.recipe, precision=computed), runtime)
            name = f"{_MODEL} in {precision}"
            bound = SQNR_BOUNDS_DB[precision]
            sqnr = verify_logits(self.model, session, token_ids, bound_db=bound, name=name)
        finally:
            _remove_check(self.folder)
        how = f"computed in {computed}" + (f" on {precision} weights" if computed != precision else "")
        return sqnr, f"verified against torch in ONNX Runtime {runtime.__version__}, {how}: {sqnr:.1f} dB"

    def compile(self) -> str:
        """Write the compile report; a line that says what it says, or why there is none."""
        try:
            api = tensorrt_build.find_api()
        except Unavailable as error:
            return f"not compiled: {error}"
        if not api.for_rtx:
            return f"not compiled: {api.version} builds for this machine's GPU only"
        report = self._report(api)
        write_json(self.folder / _REPORT, encode(report))
        return f"{report.describe()} ({_REPORT})"

    def _report(self, api: tensorrt_build.Api) -> CompileReport:
        shallow = one_layer_a_width(self.architecture)
        path = self.folder / "check.onnx"
        recipe = _recipe(shallow, self.numbers, precision=self.recipe.precision, files={}, reference=None)
        _save(path, shallow, self.numbers, RandomValues(0), dtype=recipe.precision)
        try:
            tensorrt_build.parse(self.folder / _MODEL, api=api)
            targets = [compile_for(path, recipe, api, target) for target in CHECKED_TARGETS]
        finally:
            _remove_check(self.folder)
        return CompileReport(
            runtime=api.version,
            files=self.recipe.files,
            parsed=True,
            num_layers=len(self.architecture.layers),
            num_layers_built=len(shallow.layers),
            targets=tuple(targets),
        )


def _remove_check(folder: Path) -> None:
    for path in folder.glob("check.onnx*"):
        path.unlink()


class OnnxLogits:
    """An ONNX file in the plain form, open in ONNX Runtime on the CPU."""

    def __init__(self, path: Path, recipe: Recipe, runtime: Any) -> None:
        self._recipe = recipe
        options = runtime.SessionOptions()
        options.log_severity_level = 3
        self._session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self._names = [output.name for output in self._session.get_outputs()]

    def logits(self, token_ids: Sequence[int], *, incremental: bool) -> NDArray[np.float32]:
        steps = [[token] for token in token_ids] if incremental else [list(token_ids)]
        dtype = np.float16 if self._recipe.precision == "f16" else np.float32
        cache = {
            name: np.zeros(shape, dtype)
            for name, shape in self._recipe.shapes(num_tokens=1, past=0, kept=1).items()
            if name.startswith("past_key_values.")
        }
        rows, past = [], 0
        for step in steps:
            inputs = {
                "input_ids": np.array([step]),
                "position_ids": np.arange(past, past + len(step))[None],
                SHAPE_INPUT: np.array([len(step)]),
            }
            found = dict(zip(self._names, self._session.run(None, inputs | cache), strict=True))
            rows.append(found["logits"][0].astype(np.float32))
            cache = {name: found[name.replace("past_key_values.", "present.")] for name in cache}
            past += len(step)
        return np.concatenate(rows)

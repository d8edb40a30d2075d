"""Export to the folder that ONNX Runtime and ONNX Runtime GenAI load."""

import collections
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from dilap.backends.child import opened
from dilap.backends.onnxruntime.file import OnnxFile
from dilap.core.artifact import Artifact
from dilap.core.codec import encode, file_sha256, write_json, written_aside
from dilap.core.numerics import Numerics
from dilap.core.precisions import Mix
from dilap.core.shape import UNMIXED, Architecture
from dilap.export.hf_tokenizer import read_tokenizer, save_tokenizer
from dilap.export.onnx.graph import build_model
from dilap.export.onnx.valid import require_valid
from dilap.export.onnx.weights import ModelWeights, ProbeWeights
from dilap.export.source_model import described, end_tokens, require_held
from dilap.export.verify import NUM_TOKENS, verify_logits
from dilap.models.anatomy import architecture_of, exported_tensors, numerics_of, stand_in_numerics
from dilap.models.context import max_tokens_of
from dilap.models.older_names import add_older_names
from dilap.models.text_samples import SAMPLES

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MODEL, DATA = "model.onnx", "model.onnx.data"
_CODE = Path(__file__).with_name("modeling_ort.py")  # for optimum, and not imported here
_NO_TOKEN = -1  # for GenAI, which refuses a model without an end token
_MAX_LENGTH = 4096  # GenAI allocates the cache for this many tokens unless it is told another number

# Measured, in dB (f32, int8, int4):
#   tiny random models of five families, the worst   121    27   7.8
#   SmolLM2-135M                                      112    25   7.5
#   SmolLM2-135M pruned at random, best of four       112    25   7.1
#   SmolLM2-135M pruned at random, worst of four       91   6.9   1.4
#   SmolLM2-135M, query rows of one layer misordered   13    13   6.5
# A damaged model amplifies rounding, so the bounds leave it room (see export/gguf/writer.py); f32 still tells it from a
# wrong layout, and the quantised bounds only from unrelated logits (-3).
SQNR_BOUNDS_DB = {"f32": 60.0, "int8": 0.0, "int4": -2.5}


class OnnxRuntimeExporter:
    """Writes `model.onnx` with its data, config, tokenizer, a class for optimum and `artifact.json`."""

    backend = "onnxruntime"

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
        require_held(architecture, backend=self.backend, mix=mix)
        numerics = numerics_of(model)
        weights = ModelWeights(exported_tensors(model))
        words = read_tokenizer(tokenizer, vocab_size=architecture.vocab_size)
        with written_aside(out) as folder:
            folder.mkdir()
            # The f32 file is verified too: four bits cost as many decibels as a misordered matrix does.
            for written in (mix,) if mix.used == ("f32",) else (Mix(precision="f32"), mix):
                _write_model(folder, architecture, numerics, weights, written)
                sqnr_db = verify_onnx(model, folder / MODEL, words, mix=written)
            save_tokenizer(words, folder)
            shutil.copyfile(_CODE, folder / _CODE.name)
            write_json(folder / "config.json", model.config.to_diff_dict())
            add_older_names(folder)
            write_json(folder / "genai_config.json", _genai_config(model, architecture, numerics, words))
            artifact = _describe(folder, architecture, mix=mix, sqnr_db=sqnr_db)
            artifact = described(artifact, model, plan_digest=plan_digest)
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
        require_held(architecture, backend=self.backend, mix=mix)
        with written_aside(out) as folder:
            folder.mkdir()
            numerics = stand_in_numerics(architecture)
            _write_model(folder, architecture, numerics, ProbeWeights(seed), mix)
            opened(OnnxFile, folder / MODEL, runtime="onnxruntime", optimised=False).close()
            artifact = _describe(folder, architecture, mix=mix, sqnr_db=None)
            write_json(folder / "artifact.json", encode(artifact))
        return artifact


def _write_model(
    folder: Path,
    architecture: Architecture,
    numerics: Numerics,
    weights: ModelWeights | ProbeWeights,
    mix: Mix,
) -> None:
    model = build_model(architecture, numerics, weights.values, form="onnxruntime", mix=mix, blocks=weights.blocks)
    ir.save(model, folder / MODEL, external_data=DATA)
    # The graph alone is the same for all models of a shape: with this, its digest stands for the weights as well.
    graph = ir.load(folder / MODEL)
    graph.metadata_props[DATA] = file_sha256(folder / DATA)
    ir.save(graph, folder / MODEL)
    require_valid(folder / MODEL)


def verify_onnx(model: "PreTrainedModel", path: Path, tokenizer: "PreTrainedTokenizerBase", *, mix: Mix) -> float:
    """Return the SQNR in dB of a file's logits to `model`'s.

    Raises VerificationFailed below the bound, which is that of the precision in `mix` that loses most.
    """
    # Real text, as a trained model's logits are only typical there.
    token_ids = tokenizer("\n".join(SAMPLES))["input_ids"][: min(NUM_TOKENS, max_tokens_of(model.config))]
    bound, name = min(SQNR_BOUNDS_DB[one] for one in mix.used), f"{path.name} in {mix}"
    with opened(OnnxFile, path, runtime="onnxruntime") as file:
        return verify_logits(model, file, token_ids, bound_db=bound, name=name)


def _genai_config(
    model: "PreTrainedModel",
    architecture: Architecture,
    numerics: Numerics,
    tokenizer: "PreTrainedTokenizerBase",
) -> dict[str, Any]:
    """Return the configuration that ONNX Runtime GenAI reads.

    Its widths are those of the first layer with attention; GenAI takes the true ones, layer by layer, from the graph.
    """
    layers = [widths for widths in architecture.layers if widths.num_heads]
    ends = end_tokens(model, tokenizer.eos_token_id) or [_NO_TOKEN]
    bos = ends[0] if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    pad = ends[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": MODEL,
        "head_size": architecture.head_dim,
        "hidden_size": architecture.hidden_size,
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "position_ids": "position_ids",
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
        "num_attention_heads": layers[0].num_heads,
        "num_hidden_layers": len(layers),
        "num_key_value_heads": layers[0].num_kv_heads,
    }
    return {
        "model": {
            "bos_token_id": bos,
            "context_length": numerics.context_length,
            "decoder": decoder,
            "eos_token_id": ends if len(ends) > 1 else ends[0],
            "pad_token_id": pad,
            "type": "llama",  # GenAI's name for an ordinary decoder
            "vocab_size": architecture.vocab_size,
        },
        "search": {
            "do_sample": False,
            "max_length": min(numerics.context_length, _MAX_LENGTH),
            "past_present_share_buffer": True,
        },
    }


def _describe(folder: Path, architecture: Architecture, *, mix: Mix, sqnr_db: float | None) -> Artifact:
    """The sidecar, without a plan."""
    model = ir.load(folder / MODEL)
    operators = collections.Counter(node.op_type for node in model.graph)
    return Artifact(
        path=MODEL,
        format="onnx",
        backend=OnnxRuntimeExporter.backend,
        precision=mix.precision,
        precisions=dict(mix.precisions),
        plan_digest="",
        architecture=architecture,
        sha256=file_sha256(folder / MODEL),
        companions={DATA: model.metadata_props[DATA]},
        num_bytes=sum((folder / name).stat().st_size for name in (MODEL, DATA)),
        sqnr_db=sqnr_db,
        details={"operators": dict(sorted(operators.items()))},
    )

"""Experts in the files of runtimes: they compute torch's logits, or are refused in one line."""

import importlib
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import onnx_ir as ir
import pytest
import torch
from standins.models import Kept, byte_level_tokenizer, logits, needs_llamacpp, pruned_model, random_tokens, tiny_model
from torch.testing import assert_close
from transformers import PreTrainedModel

from dilap import backends, export
from dilap.core.artifact import Artifact
from dilap.core.errors import InvalidInput, Unsupported
from dilap.core.sqnr import sqnr_db
from dilap.models.anatomy import architecture_of, exported_tensors
from dilap.models.load import load

EQUAL: Kept = {
    **{f"layers.{layer}.experts": units for layer, units in enumerate([(0, 2, 4), (1, 3, 5), (0, 1, 5)])},
    **{f"layers.{layer}.kv_groups": (1,) for layer in range(3)},
}
MIXED: Kept = {
    "layers.0.experts": (1, 4),
    "layers.1.experts": (),
    "layers.2.kv_groups": (),
    "layers.0.query_slots": (0,),
}
SHORTER: Kept = {"layers.1.experts": (), "layers.1.kv_groups": ()}
EVERY = {"num_experts": 4, "num_experts_per_tok": 4}  # so that rounding sends no token to other experts


def write(backend: str, model: PreTrainedModel, tokenizer: Path, out: Path, precision: str = "f32") -> Artifact:
    if reason := backends.get(backend).unavailable():
        pytest.skip(reason)
    return export.get(backend).export(model, tokenizer=tokenizer, precision=precision, plan_digest="", out=out)


@pytest.mark.parametrize("kept", [{}, EQUAL, SHORTER], ids=["dense", "equal", "shorter"])
def test_llamacpp_is_exact(kept: Kept, tokenizer: Path, tmp_path: Path) -> None:
    artifact = write("llamacpp", pruned_model("qwen3_moe", kept), tokenizer, tmp_path / "out")
    assert artifact.details["architecture"] == "qwen3moe"
    assert (artifact.sqnr_db or 0) > 110, f"{artifact.sqnr_db} dB"


@pytest.mark.parametrize("normed", [True, False], ids=["weights sum to 1", "weights of all"])
@pytest.mark.parametrize("kept", [{}, EQUAL, MIXED, SHORTER], ids=["dense", "equal", "mixed", "shorter"])
def test_onnxruntime_is_exact(kept: Kept, normed: bool, tokenizer: Path, tmp_path: Path) -> None:
    model = pruned_model("qwen3_moe", kept, norm_topk_prob=normed)
    artifact = write("onnxruntime", model, tokenizer, tmp_path / "out")
    assert (artifact.sqnr_db or 0) > 110, f"{artifact.sqnr_db} dB"


def test_a_tied_head_is_exact(tokenizer: Path, tmp_path: Path) -> None:
    model = tiny_model("qwen3_moe", tie_word_embeddings=True)
    for backend in ("llamacpp", "onnxruntime"):
        assert (write(backend, model, tokenizer, tmp_path / backend).sqnr_db or 0) > 110


@pytest.mark.parametrize(
    ("backend", "precision", "bounds"),
    [
        ("llamacpp", "f16", (50, 70)),
        ("llamacpp", "q8_0", (22, 40)),
        ("llamacpp", "q4_0", (4, 16)),
        ("onnxruntime", "int8", (22, 40)),
        ("onnxruntime", "int4", (4, 16)),
    ],
)
def test_a_precision_costs_what_it_should(
    backend: str, precision: str, bounds: tuple[float, float], tokenizer: Path, tmp_path: Path
) -> None:
    artifact = write(backend, tiny_model("qwen3_moe", **EVERY), tokenizer, tmp_path / "out", precision)
    assert bounds[0] < (artifact.sqnr_db or 0) < bounds[1], f"{artifact.sqnr_db} dB"


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_quantised_weights_of_experts_may_sum_to_less_than_1(precision: str, tokenizer: Path, tmp_path: Path) -> None:
    """QMoE itself makes them sum to 1 on CPUs, whatever its attribute says."""
    changes = {"num_experts": 6, "num_experts_per_tok": 2, "num_hidden_layers": 1}
    found = [
        write("onnxruntime", tiny_model("qwen3_moe", norm_topk_prob=normed, **changes), tokenizer, out, precision)
        for normed, out in ((True, tmp_path / "normed"), (False, tmp_path / "not"))
    ]
    lost = [one.sqnr_db or 0 for one in found]
    assert lost[1] > lost[0] - 6, lost


def test_stock_llamacpp_computes_torchs_logits(tokenizer: Path, tmp_path: Path) -> None:
    needs_llamacpp()
    model, tokens = pruned_model("qwen3_moe", EQUAL), random_tokens(1, 9)
    artifact = write("llamacpp", model, tokenizer, tmp_path / "out")
    library: Any = importlib.import_module("llama_cpp")
    kinds = {"type_k": library.GGML_TYPE_F32, "type_v": library.GGML_TYPE_F32}
    llama = library.Llama(str(tmp_path / "out" / artifact.path), n_ctx=64, logits_all=True, verbose=False, **kinds)
    llama.eval(tokens[0].tolist())
    found = np.array(llama.scores[:9])
    llama.close()
    assert sqnr_db(logits(model, tokens)[0].numpy(), found) > 100


def test_a_gguf_file_says_how_many_experts_it_has(tokenizer: Path, tmp_path: Path) -> None:
    write("llamacpp", pruned_model("qwen3_moe", EQUAL), tokenizer, tmp_path / "out")
    fields = gguf.GGUFReader(tmp_path / "out" / "model.gguf").fields
    names = ("expert_count", "expert_used_count", "expert_feed_forward_length")
    assert [fields[f"qwen3moe.{name}"].contents() for name in names] == [3, 2, 32]


@pytest.mark.parametrize("precision", ["f16", "q8_0", "q4_0"])
def test_routers_stay_in_f32(precision: str, tokenizer: Path, tmp_path: Path) -> None:
    write("llamacpp", tiny_model("qwen3_moe"), tokenizer, tmp_path / "out", precision)
    tensors = gguf.GGUFReader(tmp_path / "out" / "model.gguf").tensors
    assert {one.tensor_type.name for one in tensors if "ffn_gate_inp" in one.name} == {"F32"}
    assert "F32" not in {one.tensor_type.name for one in tensors if "_exps" in one.name}


def test_a_gguf_file_is_read_back(tokenizer: Path, tmp_path: Path) -> None:
    model, tokens = pruned_model("qwen3_moe", EQUAL), random_tokens(2, 9)
    artifact = write("llamacpp", model, tokenizer, tmp_path / "out")
    read = load(str(tmp_path / "out" / artifact.path)).model
    assert architecture_of(read) == architecture_of(model)
    assert_close(logits(read, tokens), logits(model, tokens), rtol=1e-5, atol=1e-5)


def test_a_gguf_file_that_does_not_say_how_wide_experts_are_is_refused(tokenizer: Path, tmp_path: Path) -> None:
    write("llamacpp", tiny_model("qwen3_moe"), tokenizer, tmp_path / "out")
    path = tmp_path / "out" / "model.gguf"
    path.write_bytes(path.read_bytes().replace(b"expert_feed_forward_length", b"expert_feed_forward_lengtt"))
    with pytest.raises(InvalidInput, match=r"no key expert_feed_forward_length that says how wide they are"):
        load(str(path))


def test_experts_of_every_layer_are_one_operator(tokenizer: Path, tmp_path: Path) -> None:
    """It computes only the chosen ones, as no product of standard operators does."""
    for precision, operator in (("f32", "MoE"), ("int8", "QMoE")):
        write("onnxruntime", pruned_model("qwen3_moe", MIXED), tokenizer, tmp_path / precision, precision)
        graph = ir.load(tmp_path / precision / "model.onnx").graph
        assert [node.op_type for node in graph if node.op_type.endswith("MoE")] == [operator] * 2


@pytest.mark.parametrize("backend", ["llamacpp", "onnxruntime"])
@pytest.mark.parametrize("kept", [{}, EQUAL], ids=["dense", "equal"])
def test_a_probe_has_the_size_of_a_real_export(backend: str, kept: Kept, tokenizer: Path, tmp_path: Path) -> None:
    model = pruned_model("qwen3_moe", kept)
    precision = {"llamacpp": "q4_0", "onnxruntime": "int4"}[backend]
    real = write(backend, model, tokenizer, tmp_path / "real", precision)
    probe = export.get(backend).export_probe(
        architecture_of(model), precision=precision, seed=0, out=tmp_path / "probe"
    )
    assert {**probe.details, **{name: real.details[name] for name in ("notes", "torch_dtype")}} == real.details


@pytest.mark.parametrize(
    ("where", "kept", "changes", "words"),
    [
        ("llamacpp f32", {"layers.1.experts": (0, 1, 2)}, {}, "layer 1: .*equal widths.* 3 experts of 32 channels"),
        ("llamacpp f32", {"layers.1.experts": ()}, {}, "layer 1: .*both sublayers in every layer"),
        ("llamacpp f32", {}, {"norm_topk_prob": False}, "sum to 1, whatever a file says"),
        ("llamacpp f32", {}, {"hidden_act": "gelu"}, "silu only, the model has gelu"),
        ("onnxruntime f32", {}, {"hidden_act": "gelu"}, "experts with silu only, the model has gelu"),
        ("onnxruntime int4", {}, {"moe_intermediate_size": 40}, "experts of a multiple of 32 channels, not 40"),
        ("tensorrt f16", {}, {}, "standard ONNX has no operator"),
        ("executorch f32", {}, {}, "XNNPACK has no operator that sends tokens to experts"),
    ],
)
def test_what_a_runtime_does_not_hold_is_refused_in_one_line(
    where: str, kept: Kept, changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    model, (backend, precision) = pruned_model("qwen3_moe", kept, **changes), where.split()
    words_of = byte_level_tokenizer(tmp_path / "words")
    with pytest.raises(Unsupported, match=words) as caught:
        export.get(backend).export(model, tokenizer=words_of, precision=precision, plan_digest="", out=tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("backend", "precision", "changes", "words"),
    [
        ("llamacpp", "f32", {"norm_topk_prob": False}, "sum to 1"),
        (
            "onnxruntime",
            "int4",
            {"moe_intermediate_size": 40},
            "a multiple of 32 channels, not 40; use --precision f32",
        ),
        ("tensorrt", "f16", {}, "only a token's own experts"),
        ("executorch", "f32", {}, "no operator that sends tokens to experts"),
    ],
)
def test_backends_say_so_before_a_search(backend: str, precision: str, changes: dict[str, Any], words: str) -> None:
    architecture = architecture_of(tiny_model("qwen3_moe", **changes))
    found = backends.get(backend).capabilities(architecture, precision=precision).unsupported
    assert found is not None
    assert words in found


def test_a_runtime_with_one_number_of_experts_names_the_layer_that_has_another() -> None:
    model = pruned_model("qwen3_moe", {"layers.1.experts": (0, 1, 2)})
    with pytest.raises(Unsupported, match=r"layers\.1\.experts keeps 3 where layer 0 keeps 6"):
        backends.require_loadable(backends.get("llamacpp"), architecture_of(model), precision="f32")


def test_views_of_fused_tensors_are_exported_and_not_copied() -> None:
    model = tiny_model("qwen3_moe")
    exported = exported_tensors(model)
    name = "model.layers.0.mlp.experts"
    own = model.get_parameter(f"{name}.gate_up_proj")
    assert torch.equal(torch.cat([exported[f"{name}.gate_proj"], exported[f"{name}.up_proj"]], 1), own)
    assert exported[f"{name}.gate_proj"].data_ptr() == own.data_ptr()

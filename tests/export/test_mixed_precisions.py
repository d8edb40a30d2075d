"""Files in which parts of a model have precisions of their own, in the real runtimes; ExecuTorch has its own tests."""

import ctypes
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import gguf
import onnx_ir as ir
import pytest
import torch
from standins.models import logits, plan_for, pruned_model, random_tokens, tiny_model
from torch import nn
from transformers import PreTrainedModel

from dilap import backends, export
from dilap.backends.llamacpp.file import FILE_TYPES
from dilap.backends.llamacpp.library import library
from dilap.core.artifact import Artifact
from dilap.core.codec import decode, file_sha256, read_json
from dilap.core.errors import InvalidInput, Unsupported
from dilap.core.precisions import Mix
from dilap.core.sqnr import sqnr_db
from dilap.core.workload import Workload
from dilap.models.anatomy import architecture_of
from dilap.models.cut import shrink_
from dilap.models.load import load
from dilap.models.rounding import rounded

MIXES = {  # every kind of part in another precision than the rest, and head and embedding in two
    "llamacpp": Mix(
        precision="q4_0",
        precisions={
            "layers.0.attention": "q8_0",
            "layers.0.ffn": "iq4_nl",
            "layers.1.attention": "f16",
            "layers.2.ffn": "q5_0",
            "head": "f16",
            "embedding": "q8_0",
        },
    ),
    "onnxruntime": Mix(
        precision="int4",
        precisions={"layers.0.ffn": "int8", "layers.1.attention": "f32", "head": "int4", "embedding": "int8"},
    ),
}
# Of torch with rounded weights to an artifact, which rounds activations to 8 bits too. Measured: 29 to 31; with the
# weights of the model itself 5 to 13.
LEAST_DB = 25


def exported(backend: str, model: PreTrainedModel, tokenizer: Path, out: Path, mix: Mix) -> Artifact:
    if reason := backends.get(backend).unavailable():
        pytest.skip(reason)
    return export.get(backend).export(
        model, tokenizer=tokenizer, precision=mix.precision, precisions=mix.precisions, plan_digest="", out=out
    )


def matrices(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """The part and the weight of every matrix of a llama; a tied head is one of its own."""
    for index, layer in enumerate(model.model.layers):
        for kind, name in (("attention", "self_attn"), ("ffn", "mlp")):
            for module in getattr(layer, name).modules() if hasattr(layer, name) else ():
                if isinstance(module, nn.Linear):
                    yield f"layers.{index}.{kind}", module.weight
    yield "head", model.lm_head.weight
    yield "embedding", model.get_input_embeddings().weight


@torch.no_grad()
def rounded_(model: PreTrainedModel, mix: Mix) -> PreTrainedModel:
    """Give `model` the weights that an artifact in `mix` stores; those of llama.cpp are written in f16 before."""
    if model.config.tie_word_embeddings:
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone())
    is_gguf = mix.precision in backends.get("llamacpp").precisions()
    for part, weight in matrices(model):
        weight.copy_(rounded(weight.half().float() if is_gguf else weight, mix.of(part)))
    return model


def assert_computes(artifact: Artifact, folder: Path, reference: PreTrainedModel) -> None:
    tokens = random_tokens(1, 24)
    session = backends.get(artifact.backend).load(folder / artifact.path, Workload(context=4, prompt_tokens=4))
    found = session.logits(tokens[0].tolist(), incremental=True)
    session.close()
    sqnr = sqnr_db(logits(reference, tokens)[0].numpy(), found)
    assert sqnr > LEAST_DB, f"{sqnr:.1f} dB"


def types_in(path: Path) -> dict[str, str]:
    return {tensor.name: tensor.tensor_type.name.lower() for tensor in gguf.GGUFReader(path).tensors}


def bits_in(path: Path) -> dict[str, int]:
    """The bits of all quantised matrices of an ONNX file, by name; those of the embedding under its operator."""
    found = {}
    for node in ir.load(path).graph:
        if "bits" in node.attributes:
            name = node.op_type if node.op_type == "GatherBlockQuantized" else f"{node.name}".removeprefix("model.")
            found[name] = node.attributes["bits"].as_int()
    return found


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("backend", MIXES)
def test_a_mix_computes_what_torch_does_with_the_same_rounding(
    backend: str, is_tied: bool, tokenizer: Path, tmp_path: Path
) -> None:
    model, mix = tiny_model("llama", tie_word_embeddings=is_tied), MIXES[backend]
    artifact = exported(backend, model, tokenizer, tmp_path / "out", mix)
    assert_computes(artifact, tmp_path / "out", rounded_(model, mix))


@pytest.mark.parametrize("backend", MIXES)
def test_precisions_of_a_plan_follow_the_layers_past_a_deleted_one(
    backend: str, tokenizer: Path, tmp_path: Path
) -> None:
    model, (fine, coarse) = tiny_model("llama"), backends.get(backend).precisions()[-2:]
    removed: dict[str, tuple[int, ...]] = {f"layers.0.{name}": () for name in ("kv_groups", "channels")}
    given = {"layers.0.ffn": fine, "layers.1.ffn": fine, "layers.2.attention": fine, "layers.2.ffn": fine}
    plan = plan_for(model, removed | {"layers.2.kv_groups": ()})
    mix = Mix(precision=coarse, precisions=replace(plan, precisions=given).pruned_precisions())
    assert mix.precisions == {"layers.0.ffn": fine, "layers.1.ffn": fine}
    shrink_(model, plan)
    artifact = exported(backend, model, tokenizer, tmp_path / "out", mix)
    assert artifact.precisions == mix.precisions
    whole = Mix(precision=coarse, precisions={"head": coarse, "embedding": coarse, **mix.precisions})
    same = exported(backend, model, tokenizer, tmp_path / "whole", whole)
    assert_computes(same, tmp_path / "whole", rounded_(model, whole))


def test_llamacpp_stores_every_matrix_of_a_part_in_its_precision(tokenizer: Path, tmp_path: Path) -> None:
    mix = MIXES["llamacpp"]
    exported("llamacpp", tiny_model("llama", tie_word_embeddings=True), tokenizer, tmp_path / "out", mix)
    found = types_in(tmp_path / "out" / "model.gguf")
    assert found.pop("token_embd.weight") == "q8_0"
    assert found.pop("output.weight") == "f16"
    blocks = {name: kind for name, kind in found.items() if kind != "f32"}
    assert len(blocks) == 21
    for name, kind in blocks.items():
        _, layer, matrix, _ = name.split(".")
        assert kind == mix.of(f"layers.{layer}.{'attention' if 'attn' in matrix else 'ffn'}"), name


def test_onnxruntime_stores_every_matrix_of_a_part_in_its_precision(tokenizer: Path, tmp_path: Path) -> None:
    model, mix = tiny_model("llama", tie_word_embeddings=True), MIXES["onnxruntime"]
    exported("onnxruntime", model, tokenizer, tmp_path / "out", mix)
    found = bits_in(tmp_path / "out" / "model.onnx")
    assert found.pop("GatherBlockQuantized") == 8
    assert found.pop("lm_head.weight") == 4
    assert set(found) == {
        *(f"layers.{index}.mlp.{name}.weight" for index in range(3) for name in ("gate_up_proj", "down_proj")),
        *(f"layers.{index}.self_attn.{name}.weight" for index in (0, 2) for name in ("qkv_proj", "o_proj")),
    }
    assert {name for name, bits in found.items() if bits == 8} == {name for name in found if "layers.0.mlp" in name}


@pytest.mark.parametrize("backend", MIXES)
def test_parts_that_are_not_named_are_stored_as_in_a_file_without_a_mix(
    backend: str, tokenizer: Path, tmp_path: Path
) -> None:
    model, (fine, coarse) = tiny_model("llama", tie_word_embeddings=True), backends.get(backend).precisions()[-2:]
    for name, precisions in (("plain", {}), ("mixed", {"layers.1.ffn": fine, "head": coarse})):
        exported(backend, model, tokenizer, tmp_path / name, Mix(precision=coarse, precisions=precisions))
    plain, mixed = (stored_in(tmp_path / name) for name in ("plain", "mixed"))
    named = {name for name in mixed if "blk.1.ffn_" in name or "layers.1.mlp" in name}
    named |= {name for name in mixed if name.startswith(("output.weight", "lm_head"))}
    assert {name for name in mixed if mixed[name] != plain.get(name)} <= named
    assert set(plain) - set(mixed) <= {name for name in plain if "layers.1.mlp" in name}


def stored_in(folder: Path) -> dict[str, bytes]:
    """The bytes of all tensors of a GGUF or ONNX file."""
    if (folder / "model.gguf").exists():
        return {one.name: one.data.tobytes() for one in gguf.GGUFReader(folder / "model.gguf").tensors}
    tensors = {name: one.const_value for name, one in ir.load(folder / "model.onnx").graph.initializers.items()}
    return {name: one.tobytes() for name, one in tensors.items() if one is not None and not name.startswith("integer")}


@pytest.mark.parametrize("precision", ["q8_0", "q5_0", "q4_0"])
def test_a_file_without_a_mix_is_what_the_stock_quantiser_makes(
    precision: str, tokenizer: Path, tmp_path: Path
) -> None:
    model, lib = tiny_model("llama", tie_word_embeddings=True), library()
    for one in ("f16", precision):
        exported("llamacpp", model, tokenizer, tmp_path / one, Mix(precision=one))
    params = lib.llama_model_quantize_default_params()
    params.ftype = FILE_TYPES[precision]
    source, target = tmp_path / "f16" / "model.gguf", tmp_path / "stock.gguf"
    assert lib.llama_model_quantize(os.fsencode(source), os.fsencode(target), ctypes.byref(params)) == 0
    assert file_sha256(target) == file_sha256(tmp_path / precision / "model.gguf")


@pytest.mark.parametrize("is_tied", [True, False])
def test_naming_the_defaults_of_head_and_embedding_changes_no_byte(
    is_tied: bool, tokenizer: Path, tmp_path: Path
) -> None:
    model = tiny_model("llama", tie_word_embeddings=is_tied)
    named = Mix(precision="int4", precisions={"head": "int8", "embedding": "int8"})
    plain, same = (
        exported("onnxruntime", model, tokenizer, tmp_path / str(index), mix)
        for index, mix in enumerate((Mix(precision="int4"), named))
    )
    assert same.sha256 == plain.sha256
    assert same.companions == plain.companions


def test_a_tied_head_of_the_same_precision_as_the_embedding_is_stored_once(tokenizer: Path, tmp_path: Path) -> None:
    mix = Mix(precision="f16", precisions={"head": "q4_0", "embedding": "q4_0"})
    exported("llamacpp", tiny_model("llama", tie_word_embeddings=True), tokenizer, tmp_path / "out", mix)
    found = types_in(tmp_path / "out" / "model.gguf")
    assert found["token_embd.weight"] == "q4_0"
    assert "output.weight" not in found


def test_an_embedding_that_is_not_named_keeps_the_type_that_it_has_as_a_head(tokenizer: Path, tmp_path: Path) -> None:
    model = tiny_model("llama", tie_word_embeddings=True, hidden_size=256)  # rows that q6_K fills
    exported("llamacpp", model, tokenizer, tmp_path / "plain", Mix(precision="q4_0"))
    exported("llamacpp", model, tokenizer, tmp_path / "out", Mix(precision="q4_0", precisions={"head": "q4_0"}))
    plain, mixed = (types_in(tmp_path / name / "model.gguf") for name in ("plain", "out"))
    assert plain["token_embd.weight"] == mixed["token_embd.weight"] == "q6_k"
    assert mixed["output.weight"] == "q4_0"


def test_experts_have_the_precision_of_their_sublayer_and_routers_stay_in_floats(
    tokenizer: Path, tmp_path: Path
) -> None:
    mix = Mix(precision="q4_0", precisions={"layers.1.ffn": "q8_0"})
    exported("llamacpp", tiny_model("qwen3_moe"), tokenizer, tmp_path / "out", mix)
    found = types_in(tmp_path / "out" / "model.gguf")
    for name in ("gate", "up", "down"):
        assert found[f"blk.1.ffn_{name}_exps.weight"] == "q8_0"
        assert found[f"blk.0.ffn_{name}_exps.weight"] == "q4_0"
    assert found["blk.1.ffn_gate_inp.weight"] == "f32"


def test_a_mixed_gguf_file_is_read_back_as_it_was_rounded(tokenizer: Path, tmp_path: Path) -> None:
    model, mix = tiny_model("llama", tie_word_embeddings=True), MIXES["llamacpp"]
    exported("llamacpp", model, tokenizer, tmp_path / "out", mix)
    found = load(str(tmp_path / "out" / "model.gguf")).model
    assert not found.config.tie_word_embeddings
    for (part, expected), (_, weight) in zip(matrices(rounded_(model, mix)), matrices(found), strict=True):
        assert torch.equal(weight, expected), part


@pytest.mark.parametrize("backend", MIXES)
def test_a_mixed_probe_has_the_matrices_of_a_real_export(backend: str, tokenizer: Path, tmp_path: Path) -> None:
    model, mix = pruned_model("llama", {"layers.1.channels": ()}, tie_word_embeddings=True), MIXES[backend]
    real = exported(backend, model, tokenizer, tmp_path / "real", mix)
    probe = export.get(backend).export_probe(
        architecture_of(model), precision=mix.precision, precisions=mix.precisions, seed=0, out=tmp_path / "probe"
    )
    read = types_in if backend == "llamacpp" else bits_in
    assert read(tmp_path / "probe" / probe.path) == read(tmp_path / "real" / real.path)


REFUSED: Mapping[str, tuple[str, Mapping[str, str], type[Exception], str]] = {
    "an unknown part": ("llamacpp", {"layers.3.ffn": "q8_0"}, InvalidInput, r"no part 'layers\.3\.ffn'.* 3 layers"),
    "an unknown precision": (
        "llamacpp",
        {"head": "q3_K"},
        InvalidInput,
        r"unknown precision 'q3_K'; llamacpp runs f16",
    ),
    "of another runtime": (
        "onnxruntime",
        {"head": "q8_0"},
        InvalidInput,
        r"unknown precision 'q8_0'.* f32, int8, int4",
    ),
    "TensorRT": ("tensorrt", {"head": "bf16"}, Unsupported, r"one precision, got f16 with parts in bf16"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_runtime_cannot_hold_is_refused_before_anything_is_written(
    case: str, tokenizer: Path, tmp_path: Path
) -> None:
    backend, precisions, error, words = REFUSED[case]
    mix = Mix(precision=backends.get(backend).precisions()[0], precisions=precisions)
    with pytest.raises(error, match=words):
        export.get(backend).export(
            tiny_model("llama"),
            tokenizer=tokenizer,
            precision=mix.precision,
            precisions=mix.precisions,
            plan_digest="",
            out=tmp_path / "out",
        )
    assert not list(tmp_path.iterdir())


def test_gemma_2_has_one_precision_for_embedding_and_head_in_llama_cpp(tokenizer: Path, tmp_path: Path) -> None:
    model, both = tiny_model("gemma2"), {"head": "q4_0", "embedding": "q4_0"}
    with pytest.raises(Unsupported, match="give head and embedding the same one"):
        exported("llamacpp", model, tokenizer, tmp_path / "out", Mix(precision="q8_0", precisions={"head": "q4_0"}))
    exported("llamacpp", model, tokenizer, tmp_path / "out", Mix(precision="q8_0", precisions=both))


def test_require_loadable_asks_for_every_precision() -> None:
    odd = replace(architecture_of(tiny_model("llama")), hidden_size=72)
    backend = backends.get("onnxruntime")
    backends.require_loadable(backend, odd, precision="f32")
    with pytest.raises(Unsupported, match="cannot hold this model in int8: hidden_size is 72"):
        backends.require_loadable(backend, odd, precision="f32", precisions={"layers.0.ffn": "int8"})


def test_the_sidecar_names_the_parts_and_an_old_one_is_read(tokenizer: Path, tmp_path: Path) -> None:
    mix = Mix(precision="f32", precisions={"layers.2.ffn": "f16"})
    exported("llamacpp", tiny_model("llama"), tokenizer, tmp_path / "out", mix)
    document = read_json(tmp_path / "out" / "artifact.json")
    assert document["precisions"] == {"layers.2.ffn": "f16"}
    old = {name: value for name, value in document.items() if name != "precisions"} | {"version": 1}
    assert decode(Artifact, old, source="artifact.json").precisions == {}

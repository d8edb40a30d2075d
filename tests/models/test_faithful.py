"""A model is loaded as its files have it, or refused: nothing is left out or invented in silence."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from standins.models import byte_level_tokenizer, logits, needs_llamacpp, random_tokens, tiny_model
from tokenizers import Tokenizer, pre_tokenizers
from torch.testing import assert_close
from transformers import AutoTokenizer, PreTrainedModel

from dilap import export
from dilap.backends.child import opened
from dilap.backends.llamacpp.file import Gguf
from dilap.core.errors import InvalidInput
from dilap.export.gguf.tokenizer import read_tokenizer
from dilap.models.load import load, save_checkpoint
from dilap.models.text_samples import SAMPLES

TOKENS = random_tokens(2, 12)
Tensors = dict[str, torch.Tensor]


def saved(model: PreTrainedModel, folder: Path) -> Path:
    """A model's folder as transformers writes it, with a tokenizer."""
    byte_level_tokenizer(folder)
    model.save_pretrained(folder)
    return folder


def with_config(folder: Path, **changes: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def with_tensors(folder: Path, change: Callable[[Tensors], None]) -> Path:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


def exported(model: PreTrainedModel, folder: Path) -> Path:
    """A GGUF file of the model in f32."""
    needs_llamacpp()
    words = byte_level_tokenizer(folder / "words")
    made = export.get("llamacpp").export(model, tokenizer=words, precision="f32", plan_digest="", out=folder / "out")
    return folder / "out" / made.path


def with_key(path: Path, key: str, value: float) -> Path:
    """A copy of a GGUF file with one key more."""
    reader, changed = gguf.GGUFReader(path), path.with_name("changed.gguf")
    writer = gguf.GGUFWriter(changed, reader.fields["general.architecture"].contents())
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            sub_type = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=sub_type)
    if isinstance(value, int):
        writer.add_uint16(key, value)
    else:
        writer.add_float32(key, value)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return changed


def phi3_file(model: PreTrainedModel, folder: Path) -> Path:
    """A GGUF file of a Phi-3 as llama.cpp's converter writes it: fused matrices, factors for short and long texts."""
    config, rope, path = model.config, model.config.rope_parameters, folder / "phi3.gguf"
    head_dim = config.hidden_size // config.num_attention_heads
    writer = gguf.GGUFWriter(path, "phi3")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_rope_scaling_orig_ctx_len(config.original_max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(int(rope["partial_rotary_factor"] * head_dim))
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_sliding_window(config.sliding_window or 0)
    read_tokenizer(byte_level_tokenizer(folder / "words"), vocab_size=config.vocab_size).write(writer)
    if rope["rope_type"] == "longrope":
        original = config.original_max_position_embeddings
        scale = config.max_position_embeddings / original
        writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(scale) / math.log(original)))
        for name in ("short", "long"):
            writer.add_tensor(f"rope_factors_{name}.weight", np.array(rope[f"{name}_factor"], np.float32))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.PHI3, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# tensors and the config


def test_a_tensor_that_the_config_has_no_place_for_is_named(tmp_path: Path) -> None:
    folder = with_config(saved(tiny_model("llama", attention_bias=True), tmp_path), attention_bias=False)
    with pytest.raises(InvalidInput, match=r"tensor model\.layers\.0\.self_attn\.k_proj\.bias \(and 11 more\)"):
        load(str(folder))


def test_computed_buffers_of_older_files_are_no_tensors_of_the_model(tmp_path: Path) -> None:
    folder = saved(tiny_model("llama"), tmp_path)
    frequencies = torch.ones(8)
    with_tensors(folder, lambda found: found.update({"model.layers.0.self_attn.rotary_emb.inv_freq": frequencies}))
    assert_close(logits(load(str(folder)).model, TOKENS), logits(tiny_model("llama"), TOKENS))


def test_a_head_of_its_own_is_kept_whatever_the_config_says(tmp_path: Path) -> None:
    folder = with_config(saved(tiny_model("llama"), tmp_path), tie_word_embeddings=True)
    source = load(str(folder))
    assert not source.model.config.tie_word_embeddings
    assert_close(logits(source.model, TOKENS), logits(tiny_model("llama"), TOKENS))


def test_a_head_of_its_own_reaches_every_file(tmp_path: Path) -> None:
    folder = with_config(saved(tiny_model("llama"), tmp_path / "model"), tie_word_embeddings=True)
    source = load(str(folder))
    artifact = export.get("onnxruntime").export(
        source.model, tokenizer=folder, precision="f32", plan_digest="", out=tmp_path / "out"
    )
    assert artifact.sqnr_db is not None
    assert artifact.sqnr_db > 80
    save_checkpoint(source.model, source.tokenizer, tmp_path / "again")
    assert_close(logits(load(str(tmp_path / "again")).model, TOKENS), logits(tiny_model("llama"), TOKENS))


def test_a_model_without_a_head_is_tied(tmp_path: Path) -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    folder = with_config(saved(model, tmp_path), tie_word_embeddings=False)
    source = load(str(folder))
    assert source.model.config.tie_word_embeddings
    assert_close(logits(source.model, TOKENS), logits(model, TOKENS))


@pytest.mark.parametrize("wide", [torch.float32, torch.bfloat16], ids=str)
def test_eight_bit_tensors_get_the_type_of_the_others(wide: torch.dtype, tmp_path: Path) -> None:
    def change(found: Tensors) -> None:
        for name, one in found.items():
            found[name] = one.to(torch.float8_e4m3fn if name.endswith("up_proj.weight") else wide)

    folder = with_tensors(saved(tiny_model("llama"), tmp_path), change)
    model = load(str(with_config(folder, dtype=str(wide).removeprefix("torch.")))).model
    assert {one.dtype for one in model.parameters()} == {wide}
    wanted = tiny_model("llama").model.layers[0].mlp.up_proj.weight.to(torch.float8_e4m3fn).to(wide)
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, wanted)


def test_a_model_of_two_types_gets_the_one_in_which_both_are_exact(tmp_path: Path) -> None:
    def change(found: Tensors) -> None:
        for name, one in found.items():
            found[name] = one.to(torch.float16 if name.endswith("up_proj.weight") else torch.bfloat16)

    folder = with_config(with_tensors(saved(tiny_model("llama"), tmp_path), change), dtype=None)
    model = load(str(folder)).model
    assert len({one.dtype for one in model.parameters()}) == 1
    wanted = tiny_model("llama").model.layers[0].mlp.up_proj.weight.to(torch.float16)
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, wanted.float())


@pytest.mark.parametrize("said", ["float16", "bfloat16"])
def test_weights_keep_the_type_of_their_files_whatever_the_config_says(said: str, tmp_path: Path) -> None:
    folder = with_config(saved(tiny_model("llama"), tmp_path), dtype=said)
    assert torch.equal(logits(load(str(folder)).model, TOKENS), logits(tiny_model("llama"), TOKENS))


def test_weights_in_64_bits_are_rounded_to_32(tmp_path: Path) -> None:
    def change(found: Tensors) -> None:
        found.update({name: one.double() for name, one in found.items()})

    folder = with_tensors(saved(tiny_model("llama"), tmp_path), change)
    assert torch.equal(logits(load(str(folder)).model, TOKENS), logits(tiny_model("llama"), TOKENS))


def test_a_pickle_of_two_types_is_exact_too(tmp_path: Path) -> None:
    folder = saved(tiny_model("llama"), tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.bfloat16)
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    model = load(str(with_config(folder, dtype="bfloat16"))).model
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, tensors["model.layers.0.mlp.up_proj.weight"])


@pytest.mark.parametrize(
    ("text", "words"), [("{", "generation_config"), ('{"eos_token_id": [0, 999]}', "999 is none of")]
)
def test_a_damaged_generation_config_is_not_passed_over(text: str, words: str, tmp_path: Path) -> None:
    folder = saved(tiny_model("llama"), tmp_path)
    (folder / "generation_config.json").write_text(text)
    with pytest.raises(InvalidInput, match=words):
        load(str(folder))


def test_a_whole_number_in_the_place_of_a_fraction_is_one(tmp_path: Path) -> None:
    model = tiny_model("llama", rope_parameters={"rope_theta": 10_000, "rope_type": "default"})
    path = exported(model, tmp_path)
    assert gguf.GGUFReader(path).fields["llama.rope.freq_base"].types == [gguf.GGUFValueType.FLOAT32]


# tokenizers


def with_digits(folder: Path, **changes: str) -> Path:
    """A tokenizer whose file splits every digit, and whose class of transformers does not."""
    byte_level_tokenizer(folder)
    words = Tokenizer.from_file(str(folder / "tokenizer.json"))
    digits = pre_tokenizers.Digits(individual_digits=True)
    words.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    words.add_tokens(["12", "24"])
    words.save(str(folder / "tokenizer.json"))
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


@pytest.mark.parametrize("kind", ["GPT2Tokenizer", "PreTrainedTokenizerFast", "Qwen2Tokenizer"])
def test_the_tokenizer_is_what_its_file_says(kind: str, tmp_path: Path) -> None:
    folder = with_digits(saved(tiny_model("llama"), tmp_path), tokenizer_class=kind)
    file, words = Tokenizer.from_file(str(folder / "tokenizer.json")), load(str(folder)).tokenizer
    for text in (*SAMPLES, "in 2024 and 1234"):
        assert words(text, add_special_tokens=False)["input_ids"] == file.encode(text, add_special_tokens=False).ids


def test_a_tokenizer_from_elsewhere_serves_a_model_without_one(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "model")
    words = byte_level_tokenizer(tmp_path / "words")
    assert load(str(tmp_path / "model"), tokenizer=words).tokenizer_path == words


# code and adapters


def test_code_that_is_not_there_is_not_pointed_at(tmp_path: Path) -> None:
    folder = with_config(saved(tiny_model("llama"), tmp_path / "model"), auto_map={"AutoModelForCausalLM": "own.Own"})
    source = load(str(folder))
    save_checkpoint(source.model, source.tokenizer, tmp_path / "again")
    assert "auto_map" not in json.loads((tmp_path / "again" / "config.json").read_text())


def test_an_adapter_alone_names_its_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "meta/llama"}))
    with pytest.raises(InvalidInput, match="an adapter of 'meta/llama' and no model: give that model, and --merge"):
        load(str(tmp_path))


def test_an_adapter_beside_a_model_is_not_passed_over(tmp_path: Path) -> None:
    folder = saved(tiny_model("llama"), tmp_path)
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(InvalidInput, match="holds a model and an adapter"):
        load(str(folder))


# GGUF files

ROPES: Mapping[str, dict[str, Any]] = {
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "linear": {"factor": 4.0},
    "yarn": {"factor": 4.0},
}


@pytest.mark.parametrize("kind", ROPES)
def test_a_gguf_files_rotary_factors_are_read(kind: str, tmp_path: Path) -> None:
    rope = {"rope_theta": 5000.0, "original_max_position_embeddings": 32, "rope_type": kind, **ROPES[kind]}
    model = tiny_model("llama", rope_parameters=rope)
    source = load(str(exported(model, tmp_path)))
    assert_close(logits(source.model, TOKENS), logits(model, TOKENS), rtol=1e-4, atol=1e-4)


def test_a_gguf_file_of_granite_is_read_as_the_llama_that_it_holds(tmp_path: Path) -> None:
    model = tiny_model("granite", tie_word_embeddings=True)
    source = load(str(exported(model, tmp_path)))
    assert source.model.config.model_type == "llama"
    assert_close(logits(source.model, TOKENS), logits(model, TOKENS), rtol=1e-4, atol=1e-4)


PHI3_ROPE = {"rope_type": "longrope", "rope_theta": 5000.0, "partial_rotary_factor": 0.75}
PHI3_ROPE |= {"short_factor": [1.0, 1.1, 1.2, 1.4, 1.8, 2.6], "long_factor": [2.0, 3.0, 4.0, 5.0, 6.0, 7.0]}
PHI3: Mapping[str, dict[str, Any]] = {
    "partial": {},
    "longrope": {
        "rope_parameters": PHI3_ROPE,
        "original_max_position_embeddings": 300,
        "max_position_embeddings": 512,
    },
    "sliding": {"sliding_window": 9},
}


@pytest.mark.parametrize("kind", PHI3)
def test_a_gguf_file_of_phi3_is_read_with_its_rotary_embedding_and_window(kind: str, tmp_path: Path) -> None:
    model, long = tiny_model("phi3", **PHI3[kind]), random_tokens(1, 320 if kind == "longrope" else 120)
    found = load(str(phi3_file(model, tmp_path))).model
    assert found.config.model_type == "phi3"
    for tokens in (TOKENS, long):
        assert_close(logits(found, tokens), logits(model, tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["partial", "longrope"])  # llama.cpp passes over the window
def test_a_gguf_file_of_phi3_is_what_llamacpp_computes(kind: str, tmp_path: Path) -> None:
    needs_llamacpp()
    path = phi3_file(tiny_model("phi3", **PHI3[kind]), tmp_path)
    with opened(Gguf, path, runtime="llamacpp", num_tokens=16) as file:
        found = torch.from_numpy(file.logits(TOKENS[0].tolist(), incremental=False))
    assert_close(found, logits(load(str(path)).model, TOKENS[:1])[0], rtol=1e-3, atol=1e-3)


def test_a_gguf_file_of_phi3_without_the_factors_of_long_texts_is_refused(tmp_path: Path) -> None:
    path = phi3_file(tiny_model("phi3", **PHI3["longrope"]), tmp_path)
    path.write_bytes(path.read_bytes().replace(b"rope_factors_long.weight", b"rope_factors_none.weight"))
    with pytest.raises(InvalidInput, match=r"tensor rope_factors_none\.weight of this file has no place in a phi3"):
        load(str(path))


def test_an_exported_phi3_is_read_as_the_llama_that_it_holds(tmp_path: Path) -> None:
    model = tiny_model("phi3", **PHI3["longrope"])
    source = load(str(exported(model, tmp_path)))
    assert source.model.config.model_type == "llama"
    assert_close(logits(source.model, TOKENS), logits(model, TOKENS), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text"])
def test_a_gguf_file_of_gemma_is_read_with_its_windows_caps_and_scale(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    config = load(str(exported(model, tmp_path))).model.config
    for name in ("layer_types", "sliding_window", "final_logit_softcapping", "attn_logit_softcapping"):
        assert getattr(config, name) == getattr(model.config, name), name
    found = logits(load(str(tmp_path / "out" / "model.gguf")).model, TOKENS)
    assert_close(found, logits(model, TOKENS), rtol=1e-4, atol=1e-4)


def test_a_gguf_file_without_keys_has_the_layers_that_usually_slide(tmp_path: Path) -> None:
    kinds = ["full_attention" if index == 5 else "sliding_attention" for index in range(7)]
    model = tiny_model("gemma3_text", num_hidden_layers=7, layer_types=kinds)
    assert load(str(exported(model, tmp_path))).model.config.layer_types == kinds


def test_a_gguf_file_may_say_the_period_of_layers_that_do_not_slide(tmp_path: Path) -> None:
    kinds = ["full_attention" if index == 5 else "sliding_attention" for index in range(7)]
    path = exported(tiny_model("gemma3_text", num_hidden_layers=7, layer_types=kinds), tmp_path)
    found = load(str(with_key(path, "gemma3.attention.sliding_window_pattern", 3))).model.config.layer_types
    assert [kind == "full_attention" for kind in found] == [False, False, True, False, False, True, False]


def test_a_gguf_file_of_gemma_3_without_a_window_has_none(tmp_path: Path) -> None:
    model = tiny_model("gemma3_text", layer_types=["full_attention"] * 3)
    source = load(str(exported(model, tmp_path)))
    assert_close(logits(source.model, TOKENS), logits(model, TOKENS), rtol=1e-4, atol=1e-4)


def test_both_rotary_embeddings_of_a_gguf_file_are_read(tmp_path: Path) -> None:
    rope: dict[str, dict[str, Any]] = {
        "full_attention": {"rope_type": "linear", "rope_theta": 5e4, "factor": 4.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 9000.0},
    }
    source = load(str(exported(tiny_model("gemma3_text", rope_parameters=rope), tmp_path)))
    assert source.model.config.rope_parameters == rope


def test_factors_of_llama_3_are_called_so(tmp_path: Path) -> None:
    rope = {"rope_theta": 5e5, "original_max_position_embeddings": 8192, "rope_type": "llama3", **ROPES["llama3"]}
    source = load(str(exported(tiny_model("llama", rope_parameters=rope), tmp_path)))
    assert source.model.config.rope_parameters == rope


def test_read_factors_reach_a_checkpoint_and_the_next_file(tmp_path: Path) -> None:
    rope = {"rope_theta": 5000.0, "rope_type": "linear", "factor": 4.0}
    model = tiny_model("llama", rope_parameters=rope)
    source = load(str(exported(model, tmp_path / "first")))
    save_checkpoint(source.model, source.tokenizer, tmp_path / "again")
    again = load(str(tmp_path / "again")).model
    assert_close(logits(again, TOKENS), logits(model, TOKENS), rtol=1e-4, atol=1e-4)
    assert exported(again, tmp_path / "second").is_file()  # verified against torch


def test_a_vocabulary_that_is_stepped_over_changes_nothing(tmp_path: Path) -> None:
    """transformers' reader makes an object of every token; the lists of more than 4,096 are passed over."""
    model = tiny_model("llama", vocab_size=5000)
    source = load(str(exported(model, tmp_path)))
    assert (source.model.config.vocab_size, len(source.tokenizer)) == (5000, 5000)
    assert_close(logits(source.model, TOKENS), logits(model, TOKENS), rtol=1e-4, atol=1e-4)


def test_a_key_that_is_not_read_is_named(tmp_path: Path) -> None:
    path = with_key(exported(tiny_model("llama"), tmp_path), "llama.logit_scale", 0.5)
    with pytest.raises(InvalidInput, match=r"its key llama\.logit_scale \(0\.5\) is not read"):
        load(str(path))


def test_a_key_that_changes_nothing_is_no_reason_to_refuse(tmp_path: Path) -> None:
    path = with_key(exported(tiny_model("llama"), tmp_path), "llama.rope.scaling.factor", 1.0)
    assert_close(logits(load(str(path)).model, TOKENS), logits(tiny_model("llama"), TOKENS), rtol=1e-4, atol=1e-4)


def test_a_tensor_of_a_gguf_file_without_a_place_is_named(tmp_path: Path) -> None:
    path = exported(tiny_model("llama", attention_bias=True), tmp_path)
    with pytest.raises(InvalidInput, match=r"blk\.0\.attn_k\.bias \(and \d+ more\) of this file has no place"):
        load(str(path))


def test_the_special_tokens_of_a_gguf_file_are_its_tokenizers(tmp_path: Path) -> None:
    """Those of Llama's config class, 1 and 2, are any tokens in another vocabulary."""
    model = tiny_model("llama", eos_token_id=7, bos_token_id=7)
    source = load(str(exported(model, tmp_path)))
    wanted = source.tokenizer.eos_token_id
    assert wanted != source.model.config.__class__().eos_token_id
    assert source.model.config.eos_token_id == source.model.generation_config.eos_token_id == wanted


def test_named_chat_templates_of_a_gguf_file_are_read(tmp_path: Path) -> None:
    words = AutoTokenizer.from_pretrained(byte_level_tokenizer(tmp_path / "words"))
    words.chat_template = {"default": "a", "tool_use": "b"}
    words.save_pretrained(tmp_path / "words")
    needs_llamacpp()
    made = export.get("llamacpp").export(
        tiny_model("llama"), tokenizer=tmp_path / "words", precision="f32", plan_digest="", out=tmp_path / "out"
    )
    assert load(str(tmp_path / "out" / made.path)).tokenizer.chat_template == {"default": "a", "tool_use": "b"}


def test_one_of_several_gguf_files_says_how_to_join_them(tmp_path: Path) -> None:
    path = with_key(exported(tiny_model("llama"), tmp_path), "split.count", 3)
    with pytest.raises(InvalidInput, match="one of the 3 files of a model; join them first: llama-gguf-split --merge"):
        load(str(path))

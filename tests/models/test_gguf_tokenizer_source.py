"""The tokenizer of a GGUF file is the file's: split as llama.cpp splits with it, and with no token more."""

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
from standins.models import needs_llamacpp
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from dilap.backends.llamacpp.file import Gguf
from dilap.core.errors import InvalidInput
from dilap.models.gguf_tokenizer import read_gguf_tokenizer
from dilap.models.text_samples import SAMPLES

TEXTS = (*SAMPLES, "x = 12345; y=[1,22,333]", "Don't you'll WE'VE", "<|end|>hello<|end|>", "  two  spaces ")
NAMES = (
    *("gpt-2", "llama-bpe", "qwen2", "smollm", "gpt-4o", "tekken", "falcon", "deepseek-llm", "deepseek-coder"),
    *("deepseek-v3", "starcoder", "command-r", "refact", "default", "stablelm2", "dbrx"),
)


def vocabulary(path: Path, name: str, **fields: Any) -> Path:
    """A GGUF file of a tokenizer that was trained on the samples, with a pre-tokenizer of that name."""
    needs_llamacpp()
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|end|>"],
        show_progress=False,
    )
    words.train_from_iterator([*SAMPLES * 4, *["123 456 2024"] * 40], trainer)
    found = sorted(words.get_vocab().items(), key=lambda one: one[1])
    merges = [" ".join(pair) for pair in json.loads(words.to_str())["model"]["merges"]]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name)
    writer.add_token_list([token for token, _ in found])
    writer.add_token_types([3 if token == "<|end|>" else 1 for token, _ in found])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    for key, value in fields.items():
        writer.add_bool(f"tokenizer.ggml.{key}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("name", NAMES)
def test_texts_are_split_as_llamacpp_splits_them(name: str, tmp_path: Path) -> None:
    path = vocabulary(tmp_path / "words.gguf", name)
    tokenizer = read_gguf_tokenizer(path)
    with Gguf(path, vocab_only=True) as file:
        for text in TEXTS:
            assert tokenizer(text)["input_ids"] == file.tokens(text), text


def test_no_token_is_invented(tmp_path: Path) -> None:
    path = vocabulary(tmp_path / "words.gguf", "llama-bpe")
    with Gguf(path, vocab_only=True) as file:
        assert len(read_gguf_tokenizer(path)) == file.vocab_size


@pytest.mark.parametrize("adds", [True, False])
def test_the_token_before_a_text_is_the_files(adds: bool, tmp_path: Path) -> None:
    tokenizer = read_gguf_tokenizer(vocabulary(tmp_path / "words.gguf", "gpt-2", add_bos_token=adds))
    assert (tokenizer("fox")["input_ids"][0] == tokenizer.bos_token_id) is adds


def test_a_split_that_nothing_here_makes_names_the_text(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"tokenizer \(bloom\) cannot be rebuilt: .* at token \d+: llama.cpp has"):
        read_gguf_tokenizer(vocabulary(tmp_path / "words.gguf", "bloom"))


def test_a_text_that_is_no_utf_8_is_refused_in_one_line(tmp_path: Path) -> None:
    path = vocabulary(tmp_path / "words.gguf", "gpt-2")
    path.write_bytes(path.read_bytes().replace(b"gpt-2", b"gp\x80-2"))
    with pytest.raises(InvalidInput, match=r"not a GGUF file .*decode byte 0x80") as caught:
        read_gguf_tokenizer(path)
    assert "\n" not in str(caught.value)

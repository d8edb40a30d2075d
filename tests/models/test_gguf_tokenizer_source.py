"""The tokenizer of a GGUF file is the file's: split as llama.cpp splits with it, and with no token more."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import pytest
import sentencepiece
from standins.models import needs_llamacpp
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from dilap.backends.llamacpp.file import Gguf
from dilap.core.errors import InvalidInput
from dilap.export.gguf.tokenizer import read_tokenizer, verify_tokenizer
from dilap.export.hf_tokenizer import save_tokenizer
from dilap.models.gguf_tokenizer import read_gguf_tokenizer
from dilap.models.text_samples import SAMPLES

TEXTS = (*SAMPLES, "x = 12345; y=[1,22,333]", "Don't you'll WE'VE", "<|end|>hello<|end|>", "  two  spaces ")
NAMES = (
    *("gpt-2", "llama-bpe", "qwen2", "smollm", "gpt-4o", "tekken", "falcon", "deepseek-llm", "deepseek-coder"),
    *("deepseek-v3", "starcoder", "command-r", "refact", "default", "stablelm2", "dbrx"),
)


def finish(writer: gguf.GGUFWriter, fields: Mapping[str, bool]) -> None:
    """Write the file of a vocabulary without tensors, with some switches of its tokenizer."""
    for key, value in fields.items():
        writer.add_bool(f"tokenizer.ggml.{key}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()


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
    finish(writer, fields)
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
    with pytest.raises(InvalidInput, match=r"not a whole GGUF file: .*decode byte 0x80") as caught:
        read_gguf_tokenizer(path)
    assert "\n" not in str(caught.value)


# SentencePiece


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A SentencePiece BPE model with byte fallback, which covers most of the samples."""
    folder = tmp_path_factory.mktemp("sentencepiece")
    (folder / "text").write_text("\n".join(" ".join(text.split()) for text in SAMPLES * 20), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"),
        model_prefix=str(folder / "model"),
        vocab_size=900,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=["<|turn|>"],
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "model.model"))


def sentencepiece_file(path: Path, model: Any, **fields: Any) -> Path:
    """The GGUF file of a SentencePiece model, as llama.cpp's converter writes it."""
    needs_llamacpp()
    ids = range(model.get_piece_size())
    kinds = ((model.is_unknown, 2), (model.is_control, 3), (model.is_byte, 6))
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list([model.id_to_piece(index) for index in ids])
    writer.add_token_scores([model.get_score(index) for index in ids])
    types = [next((number for test, number in kinds if test(index)), 1) for index in ids]
    types[model.piece_to_id("<|turn|>")] = 4
    writer.add_token_types(types)
    writer.add_bos_token_id(model.bos_id())
    writer.add_eos_token_id(model.eos_id())
    writer.add_unk_token_id(model.unk_id())
    finish(writer, fields)
    return path


@pytest.mark.parametrize("space", [True, False])
@pytest.mark.parametrize("bos", [True, False])
def test_a_sentencepiece_file_is_split_as_llamacpp_splits_it(
    space: bool, bos: bool, sentencepiece_model: Any, tmp_path: Path
) -> None:
    path = sentencepiece_file(tmp_path / "a.gguf", sentencepiece_model, add_space_prefix=space, add_bos_token=bos)
    tokenizer = read_gguf_tokenizer(path)
    with Gguf(path, vocab_only=True) as file:
        for text in (*TEXTS, "a<|turn|>b <|turn|> c", "</s>", "tab\there\r\n", " leading", "\u2581 a mark"):
            assert tokenizer(text)["input_ids"] == file.tokens(text), text


def test_a_sentencepiece_file_without_entries_about_spaces_has_llamacpps(
    sentencepiece_model: Any, tmp_path: Path
) -> None:
    tokenizer = read_gguf_tokenizer(sentencepiece_file(tmp_path / "a.gguf", sentencepiece_model))
    assert tokenizer.tokenize("fox")[0].startswith("▁")
    assert tokenizer("fox")["input_ids"][0] == tokenizer.bos_token_id


def test_a_sentencepiece_file_gets_no_token_more(sentencepiece_model: Any, tmp_path: Path) -> None:
    path = sentencepiece_file(tmp_path / "a.gguf", sentencepiece_model)
    assert len(read_gguf_tokenizer(path)) == sentencepiece_model.get_piece_size()


def test_a_sentencepiece_file_is_decoded_to_its_text(sentencepiece_model: Any, tmp_path: Path) -> None:
    tokenizer = read_gguf_tokenizer(sentencepiece_file(tmp_path / "a.gguf", sentencepiece_model))
    for text in SAMPLES:
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_a_sentencepiece_file_is_written_again_alike(sentencepiece_model: Any, tmp_path: Path) -> None:
    """Through a checkpoint, whose tokenizer has merges in the place of scores."""
    tokenizer = read_gguf_tokenizer(sentencepiece_file(tmp_path / "a.gguf", sentencepiece_model))
    save_tokenizer(tokenizer, tmp_path / "checkpoint")
    writer = gguf.GGUFWriter(tmp_path / "b.gguf", "llama")
    read_tokenizer(tmp_path / "checkpoint", vocab_size=920).write(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    assert verify_tokenizer(tmp_path / "b.gguf", tmp_path / "checkpoint") == []

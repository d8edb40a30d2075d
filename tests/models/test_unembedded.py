"""Added tokens without a row in the embedding are left out; every text is split as before."""

from pathlib import Path
from typing import Any

import pytest
from standins.models import byte_level_tokenizer, needs_llamacpp, tiny_model
from transformers import AutoTokenizer

from dilap import export
from dilap.core.errors import InvalidInput
from dilap.models.load import Source, load
from dilap.models.text_samples import SAMPLES

PIECE = "<image_soft_token>"


def folder(path: Path, *tokens: str, **named: str) -> Path:
    """A tiny model with as many rows as tokens, and a tokenizer with these tokens more, as that of Gemma 3 is."""
    words: Any = AutoTokenizer.from_pretrained(byte_level_tokenizer(path))
    tiny_model("llama", vocab_size=len(words)).save_pretrained(path)
    words.add_special_tokens({"additional_special_tokens": list(tokens), **named})
    words.save_pretrained(path)
    return path


@pytest.fixture
def source(tmp_path: Path) -> Source:
    return load(str(folder(tmp_path / "model", PIECE, pad_token="<pad>")))


def test_tokens_without_an_embedding_are_left_out(source: Source) -> None:
    assert len(source.tokenizer) == source.model.config.vocab_size
    assert source.tokenizer.pad_token is None
    assert source.notes == (
        f"tokens of the tokenizer for which the model has no embedding are left out: <pad>, {PIECE}",
    )


def test_every_text_is_split_as_before(source: Source, tmp_path: Path) -> None:
    whole = AutoTokenizer.from_pretrained(tmp_path / "model")
    for text in SAMPLES:
        assert source.tokenizer(text)["input_ids"] == whole(text)["input_ids"]
    assert source.tokenizer.eos_token == whole.eos_token


@pytest.mark.parametrize("backend", ["llamacpp", "onnxruntime"])
def test_such_a_model_is_exported(backend: str, source: Source, tmp_path: Path) -> None:
    needs_llamacpp()
    artifact = export.get(backend).export(
        source.model, tokenizer=source.tokenizer_path, precision="f32", plan_digest="", out=tmp_path / "out"
    )
    assert (artifact.sqnr_db or 0) > 60


def test_a_token_that_ends_texts_is_needed(tmp_path: Path) -> None:
    path = folder(tmp_path / "model", eos_token="<end of all>")
    with pytest.raises(InvalidInput, match="the tokenizer has 298 tokens, the model 297 embedding rows"):
        load(str(path))


def test_ordinary_tokens_are_needed(tmp_path: Path) -> None:
    path = tmp_path / "model"
    byte_level_tokenizer(path)
    tiny_model("llama", vocab_size=280).save_pretrained(path)
    with pytest.raises(InvalidInput, match="the tokenizer has 297 tokens, the model 280 embedding rows"):
        load(str(path))

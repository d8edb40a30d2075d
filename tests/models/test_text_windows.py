"""Calibration as papers have it: the windows of the loaders that SparseGPT and GPTQ share, from local files."""

import gzip
import json
import os
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from standins.models import tiny_model, tiny_tokenizer
from transformers import PreTrainedTokenizerBase

from dilap.core.errors import InvalidInput, Unavailable
from dilap.models import windows
from dilap.models.options import CalibrationOptions
from dilap.models.text import calibration
from dilap.models.windows import CORPORA, corpus_file, published_windows

SIZES: dict[str, Any] = {"train": 6, "validation": 3, "length": 16, "seed": 0}
RAW = " \n = Robert = \n \n He was an actor . \n He acted . \n \n = Du Fu = \n"  # as WikiText's raw files are


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def documents(count: int = 40) -> list[str]:
    """Some of them too short for a window."""
    return [f"document {n}: " + " ".join(f"word{n * k}" for k in range(2 + 7 * (n % 3))) for n in range(count)]


def write_c4(folder: Path, texts: Sequence[str]) -> Path:
    path = folder / "c4" / "train.jsonl.gz"
    path.parent.mkdir(parents=True)
    path.write_bytes(gzip.compress("\n".join(json.dumps({"text": text, "url": "u"}) for text in texts).encode()))
    return folder


def write_wikitext(folder: Path) -> Path:
    (folder / "wikitext").mkdir(parents=True)
    (folder / "wikitext" / "train.txt").write_text(RAW * 40, encoding="utf-8")
    return folder


def original_c4(texts: Sequence[str], tokenizer: Any, *, count: int, length: int, seed: int) -> torch.Tensor:
    """The loader of SparseGPT, as its specification says it."""
    random.seed(seed)
    rows = []
    for _ in range(count):
        while True:
            ids = tokenizer(texts[random.randint(0, len(texts) - 1)]).input_ids
            if len(ids) > length:
                break
        at = random.randint(0, len(ids) - length - 1)
        rows.append(ids[at : at + length])
    return torch.tensor(rows)


def test_windows_of_c4_are_those_of_the_published_loader(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    found, _ = published_windows("c4", tokenizer, **SIZES, data_dir=write_c4(tmp_path, documents()))
    assert torch.equal(found, original_c4(documents(), tokenizer, count=6, length=16, seed=0))


def test_windows_of_wikitext_are_those_of_the_published_loader(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """All rows joined by a space, blank ones empty as on the hub, tokenised once, uniform windows."""
    found, _ = published_windows("wikitext2", tokenizer, **SIZES, data_dir=write_wikitext(tmp_path))
    rows = [line if line.strip() else "" for line in (RAW * 40).splitlines(keepends=True)]
    ids = tokenizer(" ".join(rows)).input_ids
    random.seed(0)
    starts = [random.randint(0, len(ids) - 16 - 1) for _ in range(6)]
    assert found.tolist() == [ids[at : at + 16] for at in starts]


def test_sentences_of_penn_treebank_are_joined_by_spaces() -> None:
    assert CORPORA["ptb"].joined([" no it was n't \n but so \n"]) == "no it was n't but so"
    assert CORPORA["ptb"].joined(["no it was n't", "but so"]) == "no it was n't but so"


@pytest.mark.parametrize("name", ["c4", "wikitext2"])
def test_held_out_windows_share_no_token_with_any_other(
    name: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    folder = write_wikitext(write_c4(tmp_path, documents()))
    drawn = windows._Windows(
        texts=documents() if name == "c4" else [RAW * 40],
        tokenizer=tokenizer,
        length=16,
        generator=random.Random(0),
        source="here",
    )
    drawn.split(6)
    _, validation = published_windows(name, tokenizer, **SIZES, data_dir=folder)
    assert validation.shape == (3, 16)
    drawn.split(3, apart=True)
    for number, (text, start) in enumerate(drawn.drawn[6:], start=6):
        others = [at for i, (one, at) in enumerate(drawn.drawn) if one == text and i != number]
        assert all(abs(at - start) >= 16 for at in others)


def test_documents_that_are_all_too_short_are_named(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    folder = write_c4(tmp_path, ["the fox", "a dog"])
    with pytest.raises(InvalidInput, match=r"train\.jsonl\.gz: no document has more than 16 tokens; give longer"):
        published_windows("c4", tokenizer, **SIZES, data_dir=folder)


def test_too_little_text_for_apart_windows_is_named(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"too little text for \d+ windows of 16 tokens; give more"):
        published_windows(
            "c4", tokenizer, train=6, validation=40, length=16, seed=0, data_dir=write_c4(tmp_path, documents(4))
        )


@pytest.mark.parametrize("name", CORPORA)
def test_an_absent_file_is_named(name: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=rf"has no {name.removesuffix('2')}\*/train\* for {name}; files read are"):
        corpus_file(name, tmp_path)


def test_calibration_takes_the_corpora_by_name(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    folder = write_c4(tmp_path, documents())
    options = CalibrationOptions(
        source="c4", data_dir=str(folder), sequence_length=16, train_sequences=6, validation_sequences=3
    )
    found = calibration(tiny_model("llama"), tokenizer, options)
    assert (found.name, found.train.shape, found.validation.shape) == ("c4", (6, 16), (3, 16))


def test_c4_from_the_hub_without_optimum_says_what_to_install(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "optimum.gptq.data", None)
    with pytest.raises(Unavailable, match=r"c4 from the hub needs optimum; run: pip install 'dilap\[hub\]'"):
        published_windows("c4", tokenizer, **SIZES)


def test_c4_from_the_hub_goes_through_optimum_and_leaves_the_generators(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """optimum's own loader on documents that stand for the hub; its windows are those of local files."""
    data = pytest.importorskip("optimum.gptq.data", reason="optimum is not installed")
    texts = documents()
    rows = [{"text": text} for text in texts]
    monkeypatch.setattr(data, "load_dataset", lambda *_, **__: rows)
    monkeypatch.setattr(data, "is_datasets_available", lambda: True)
    random.seed(7)
    np.random.seed(7)
    before = random.getstate(), str(np.random.get_state()), torch.random.get_rng_state().tolist()
    train, validation = published_windows("c4", tokenizer, **SIZES)
    after = random.getstate(), str(np.random.get_state()), torch.random.get_rng_state().tolist()
    assert before == after
    assert torch.equal(train, original_c4(texts, tokenizer, count=6, length=16, seed=0))
    assert validation.shape == (3, 16)


@pytest.mark.parametrize("name", ["c4", "wikitext2"])
def test_samples_of_the_real_corpora_are_read(name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    if (folder := os.environ.get("DILAP_DATA")) is None:
        pytest.skip("set DILAP_DATA to a folder with c4/train.jsonl and wikitext/train.txt")
    train, validation = published_windows(
        name, tokenizer, train=2, validation=1, length=64, seed=0, data_dir=Path(folder)
    )
    assert (train.shape, validation.shape) == ((2, 64), (1, 64))

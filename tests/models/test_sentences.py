"""Sentences become tokens that an encoder takes."""

from pathlib import Path

import numpy as np
import pytest
from standins.encoders import SENTENCES, VOCABULARY, write_tokenizer

from dilap.core.errors import InvalidInput
from dilap.core.network_input import TokenInput
from dilap.models.sentences import SentenceSet, read_sentences


def write(folder: Path, text: str) -> SentenceSet:
    write_tokenizer(folder / "tokenizer")
    (folder / "text.txt").write_text(text)
    return read_sentences(str(folder / "text.txt"), tokenizer=folder / "tokenizer")


def test_a_text_is_split_at_ends_of_sentences_and_paragraphs(tmp_path: Path) -> None:
    text = "Heading\n\nThe cat sat\non the mat. Is it still there? Yes.\n\nA new paragraph begins"
    found = write(tmp_path, text)
    assert found.sentences == ("The cat sat on the mat.", "Is it still there?", "A new paragraph begins")


def test_a_sentence_is_kept_once(tmp_path: Path) -> None:
    assert len(write(tmp_path, "The cat sat there. The cat sat there. A dog ran away.")) == 2


def test_sentences_are_padded_and_cut_to_the_length(tmp_path: Path) -> None:
    found = write(tmp_path, "a b c d.\n\na b c d e f g h i j")
    tokens = found.all_tokens(TokenInput(length=8))
    words = [[VOCABULARY[one] for one in row] for row in tokens[:, 0]]
    assert words[0] == ["[CLS]", *"abcd", "[UNK]", "[SEP]", "[PAD]"]
    assert words[1] == ["[CLS]", *"abcdef", "[SEP]"]
    assert tokens[:, 1].sum(1).tolist() == [7, 8]
    assert tokens.dtype == np.int64
    assert not tokens[:, 2].any()


def test_parts_share_no_sentence_and_are_the_same_at_every_call(tmp_path: Path) -> None:
    found = write(tmp_path, "\n\n".join(one for one in SENTENCES if one.count(" ") > 2))
    few, others = found.split(train=1, validation=2, seed=3)
    assert not set(few.sentences) & set(others.sentences)
    assert (len(few), len(others)) == (1, 2)
    assert found.split(train=1, validation=2, seed=3)[1].sha256 == others.sha256 != found.sha256


def test_too_few_sentences_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="1 sentences, but 1 and 1 are needed"):
        write(tmp_path, "The cat sat there.").split(train=1, validation=1, seed=0)


def test_a_text_without_sentences_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="no sentence of at least 4 words"):
        write(tmp_path, "One.\n\nTwo words")

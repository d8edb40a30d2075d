"""Quality of encoders of texts on sentences."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from numpy.typing import NDArray
from standins.encoders import INPUT, SENTENCES, encoder, write_tokenizer

from dilap.core.errors import InvalidInput, Mismatch
from dilap.evaluation.sentence_quality import sentence_quality
from dilap.models.network import TorchNetwork
from dilap.models.sentences import SentenceSet


def sentences(count: int) -> SentenceSet:
    return SentenceSet(name="some", sentences=tuple(map(str, range(count))), tokenizer=cast(Any, SimpleNamespace()))


def vectors(*angles: float) -> NDArray[np.float32]:
    return np.array([(np.cos(one), np.sin(one)) for one in np.radians(angles)], np.float32)


def test_cosines_are_those_of_the_angles_between_embeddings() -> None:
    found = sentence_quality(3 * vectors(0, 10, 80), vectors(0, 40, 80), sentences(3))
    assert found.cosine == pytest.approx((1 + np.cos(np.radians(30)) + 1) / 3)
    assert found.low_cosine == pytest.approx(0.9 * np.cos(np.radians(30)) + 0.1)


def test_nearest_sentences_are_counted_that_are_the_same() -> None:
    found = sentence_quality(vectors(0, 10, 80, 95), vectors(0, 70, 80, 95), sentences(4))
    assert found.same_nearest == 1 / 4 + 1 / 4  # of the first and of the last


def test_embeddings_of_another_size_are_a_mismatch() -> None:
    with pytest.raises(Mismatch, match="embeddings of 2 numbers are not those of 3"):
        sentence_quality(vectors(0, 1), np.ones((2, 3), np.float32), sentences(2))


def test_one_sentence_is_too_few() -> None:
    with pytest.raises(InvalidInput, match="one sentence has no nearest other one"):
        sentence_quality(vectors(0), vectors(0), sentences(1))


def test_an_encoder_is_as_near_as_can_be_to_itself(tmp_path: Path) -> None:
    given = SentenceSet(name="six", sentences=SENTENCES, tokenizer=write_tokenizer(tmp_path))
    embeddings = TorchNetwork(encoder()).outputs(given.all_tokens(INPUT))
    found = sentence_quality(embeddings, embeddings, given)
    assert (found.num_sentences, found.text_sha256) == (6, given.sha256)
    assert found.cosine == pytest.approx(1)
    assert found.same_nearest == 1

"""Sentences for the calibration and evaluation of encoders of texts, as tokens."""

import hashlib
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from dilap.core.errors import InvalidInput
from dilap.core.network_input import TOKEN_INPUTS, TokenInput
from dilap.models.load import load_tokenizer
from dilap.models.text_files import read_text

_END = re.compile(r"(?<=[.!?])\s+|\s*\n\s*\n\s*")  # of a sentence or a paragraph
_FEWEST_WORDS = 4  # what has fewer is a heading, a number, or half of an abbreviation


@dataclass(frozen=True, kw_only=True)
class SentenceSet:
    """Sentences in the order of the text that they are from, and the tokenizer of the encoder that reads them."""

    name: str
    sentences: tuple[str, ...]
    tokenizer: PreTrainedTokenizerBase

    def __len__(self) -> int:
        return len(self.sentences)

    @property
    def sha256(self) -> str:
        """The digest of the sentences."""
        return hashlib.sha256("\n".join(self.sentences).encode()).hexdigest()

    def tokens(self, input_: TokenInput, *, batch: int = 32) -> Iterator[NDArray[np.int64]]:
        """Yield the sentences as an encoder takes them, `batch` at a time (sentences x 3 x tokens).

        Shorter ones are padded to the length of `input_`, longer ones are cut.
        """
        for start in range(0, len(self), batch):
            few = list(self.sentences[start : start + batch])
            found = self.tokenizer(few, padding="max_length", truncation=True, max_length=input_.length)
            zeros = np.zeros((len(few), input_.length), np.int64)  # not every tokenizer gives types
            yield np.stack([np.asarray(found.get(name, zeros), np.int64) for name in TOKEN_INPUTS], axis=1)

    def all_tokens(self, input_: TokenInput) -> NDArray[np.int64]:
        """Return all sentences as an encoder takes them; those of 128 tokens take 3 KB each."""
        return np.concatenate(list(self.tokens(input_)))

    def split(self, *, train: int, validation: int, seed: int) -> tuple[Self, Self]:
        """Return two parts at random that share no sentence, the same ones at every call. Raises InvalidInput."""
        if len(self) < train + validation:
            raise InvalidInput(
                f"{self.name}: {len(self)} sentences, but {train} and {validation} are needed; give more text, or ask"
                " for fewer"
            )
        drawn = random.Random(seed).sample(self.sentences, train + validation)
        return replace(self, sentences=tuple(drawn[:train])), replace(self, sentences=tuple(drawn[train:]))


def read_sentences(name: str, *, tokenizer: Path) -> SentenceSet:
    """Return the sentences, each once, of a text that `dilap.models.text_files.read_text` takes by `name`.

    `tokenizer` is the folder of the encoder's. Raises InvalidInput where there is none, or no sentence.
    """
    words = load_tokenizer(tokenizer, local_files_only=True)
    found = (" ".join(one.split()) for one in _END.split(read_text(name)))
    sentences = tuple(dict.fromkeys(one for one in found if one.count(" ") >= _FEWEST_WORDS - 1))
    if not sentences:
        raise InvalidInput(f"{name}: it holds no sentence of at least {_FEWEST_WORDS} words")
    return SentenceSet(name=name, sentences=sentences, tokenizer=words)

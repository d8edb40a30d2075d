"""Compare a model with the dense one, token by token, on a text that neither was fitted on."""

import hashlib
import math
from collections.abc import Callable, Iterator

import numpy as np
import torch

from dilap.backends import Reader
from dilap.core.errors import InvalidInput, Mismatch
from dilap.evaluation.document import TextQuality
from dilap.evaluation.scoring import log_probabilities
from dilap.evaluation.subject import Subject
from dilap.evaluation.tokenizers import TextTokenizer
from dilap.models.text import beginning, consecutive
from dilap.models.text_files import read_text


def compare(
    subject: Subject,
    reference: Subject,
    *,
    text: str,
    num_sequences: int = 32,
    length: int = 256,
    progress: Callable[[int], None] = lambda _: None,
) -> TextQuality:
    """Score both models on the first `num_sequences` sequences of `text`.

    Sequences have `length` tokens, or as many as both models can read. Raises InvalidInput where the text is too short,
    and Mismatch where the models split it into different tokens.
    """
    length = min(length, subject.reader.max_tokens, reference.reader.max_tokens)
    sequences = _sequences(subject.words, text, num_sequences=num_sequences, length=length)
    theirs = _sequences(reference.words, text, num_sequences=num_sequences, length=length)
    if sequences != theirs or subject.reader.vocab_size != reference.reader.vocab_size:
        raise Mismatch(
            f"{subject.name} is of another model than {reference.name}: they split {text} into different tokens "
            f"({subject.reader.vocab_size} and {reference.reader.vocab_size} known); where one was made with "
            "--vocabulary TEXT, give it here too"
        )
    for one in (subject, reference):
        one.reader.reserve(length)
    sums = torch.zeros(6, dtype=torch.float64)
    for sequence in sequences:
        for mine, dense, labels in _rows(subject.reader, reference.reader, sequence):
            sums += _sums(mine, dense, labels)
        progress(length)
    kl = float(sums[0]) / (len(sequences) * length)
    nll, top1, agreement, reference_nll, reference_top1 = (sums[1:] / (len(sequences) * (length - 1))).tolist()
    return TextQuality(
        text=text,
        text_sha256=hashlib.sha256(np.array(sequences, np.int32).tobytes()).hexdigest(),
        tokens=len(sequences) * length,
        reference=reference.name,
        reference_digest=reference.digest,
        kl=kl,
        perplexity=math.exp(nll),
        top1=top1,
        agreement=agreement,
        reference_perplexity=math.exp(reference_nll),
        reference_top1=reference_top1,
    )


def _sequences(words: TextTokenizer, text: str, *, num_sequences: int, length: int) -> list[list[int]]:
    tokens = words.encode(read_text(text)[: num_sequences * length * 16], special=False)
    before = beginning(words.encode("x", special=True), words.encode("x", special=False))
    sequences = consecutive(tokens, before, length=length)[:num_sequences]
    if not sequences:
        raise InvalidInput(f"{text}: {len(tokens)} tokens are fewer than one sequence of {length}")
    return sequences


def _rows(
    mine: Reader, dense: Reader, sequence: list[int]
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Yield, in parts, the log-probabilities of both models and the tokens that follow, one fewer in the last part."""
    labels = torch.tensor(sequence[1:])
    parts = (log_probabilities(reader, sequence, num_rows=len(sequence)) for reader in (mine, dense))
    for one, other in zip(*parts, strict=True):
        yield one, other, labels[: len(one)]
        labels = labels[len(one) :]


def _sums(mine: torch.Tensor, dense: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return six sums over positions.

    They are KL, the negative log-likelihood, top-1 hits and agreement of `mine`, and the negative log-likelihood and
    top-1 hits of `dense`.
    """
    at, first = torch.arange(len(labels)), (mine[: len(labels)].argmax(-1), dense[: len(labels)].argmax(-1))
    return torch.tensor(
        [
            float((dense.exp() * (dense - mine)).sum(-1).double().sum()),
            -float(mine[at, labels].double().sum()),
            float((first[0] == labels).sum()),
            float((first[0] == first[1]).sum()),
            -float(dense[at, labels].double().sum()),
            float((first[1] == labels).sum()),
        ],
        dtype=torch.float64,
    )

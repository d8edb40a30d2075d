"""Data sets that are one long text, and their perplexity in windows, as papers on pruning report it."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dilap.backends import Reader
from dilap.core.errors import InvalidInput
from dilap.evaluation.scoring import log_probabilities
from dilap.evaluation.tokenizers import TextTokenizer

WINDOW_TOKENS = 2048


def joined_sentences(dataset: Any) -> Any:
    """Return a data set with one document: all sentences of `dataset`, joined by spaces."""
    return dataset.from_list([{"page": " ".join(row["sentence"].strip() for row in dataset)}])


def process_results(document: Mapping[str, str], results: Sequence[float]) -> dict[str, tuple[float, int]]:
    """Return for every metric the log-likelihood of a document and the number of words or bytes that share it."""
    (log_likelihood,) = results
    num_bytes = len(document["page"].encode("utf-8"))
    return {
        "word_perplexity": (log_likelihood, len(document["page"].split())),
        "byte_perplexity": (log_likelihood, num_bytes),
        "bits_per_byte": (log_likelihood, num_bytes),
    }


def wikitext(pages: Sequence[str]) -> str:
    """Return WikiText as its rows on the hub joined by blank lines: GPTQ's convention, which others follow.

    lm-eval's pages lack the line feed between two articles and the first, blank line of the raw file; they are put
    back.
    """
    lines = (" \n" + "\n".join(pages)).splitlines(keepends=True)
    return "\n\n".join(line if line.strip() else "" for line in lines)


def penn_treebank(pages: Sequence[str]) -> str:
    """Return the one document of the task `ptb`."""
    return " ".join(pages)


# The tasks that are one long text, each with the function that makes it from lm-eval's documents.
TEXTS: Mapping[str, Callable[[Sequence[str]], str]] = {"ptb": penn_treebank, "wikitext": wikitext}


@dataclass(frozen=True, kw_only=True)
class WindowPerplexity:
    """Perplexity of a text in windows: exp of the mean negative log-likelihood of all tokens but each window's first.

    `top1` is the share of these tokens that the model ranked first.
    """

    perplexity: float
    window_tokens: int
    num_windows: int
    top1: float


def window_perplexity(
    reader: Reader,
    words: TextTokenizer,
    text: str,
    *,
    name: str,
    window_tokens: int = WINDOW_TOKENS,
    progress: Callable[[int], None] = lambda _: None,
) -> WindowPerplexity:
    """Score the whole text in consecutive windows; a rest that fills no window is dropped, as papers do.

    Raises InvalidInput where the text is shorter than one window.
    """
    tokens = words.encode(text, special=True)
    num_windows = len(tokens) // window_tokens
    if num_windows == 0:
        raise InvalidInput(
            f"{name}: its text has {len(tokens)} tokens, and a window {window_tokens}; give more of it, a larger "
            "--limit, or a smaller --max-length"
        )
    reader.reserve(window_tokens)
    total, num_first = 0.0, 0
    for at in range(0, num_windows * window_tokens, window_tokens):
        window = tokens[at : at + window_tokens]
        labels = torch.tensor(window[1:])
        for part in log_probabilities(reader, window[:-1], num_rows=window_tokens - 1):
            wanted, labels = labels[: len(part)], labels[len(part) :]
            total -= float(part[torch.arange(len(part)), wanted].double().sum())
            num_first += int((part.argmax(-1) == wanted).sum())
        progress(window_tokens)
    count = num_windows * (window_tokens - 1)
    return WindowPerplexity(
        perplexity=math.exp(total / count),
        window_tokens=window_tokens,
        num_windows=num_windows,
        top1=num_first / count,
    )

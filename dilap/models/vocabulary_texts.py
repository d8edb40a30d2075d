"""Texts for which a vocabulary is cut: their tokens, and what becomes of them with fewer tokens."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import product

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from dilap.core.errors import VerificationFailed
from dilap.core.vocabulary import Growth
from dilap.models.text_samples import first_difference

Ids = NDArray[np.int32]
PIECE = 1_000_000  # characters that are split into tokens at once: the tokens of 100 MB would take gigabytes
# Put before a template, so that one that names the day gives the same vocabulary on every day.
_DAY = "{%- macro strftime_now(format) -%}26 Jul 2024{%- endmacro -%}"
_WORD = "a"  # what everybody says in a sample of a chat: its letters stay anyway
_CHATS = tuple(
    [{"role": role, "content": _WORD} for role in roles]
    for roles in (("system", "user", "assistant", "user"), ("user", "assistant", "user"))
)


def break_after(text: str, at: int) -> int:
    """Return where a document, else a line, else a word ends at `at` or after it."""
    ends = (text.find(mark, at) for mark in ("\n\n", "\n", " "))
    return next((end for end in ends if end >= 0), len(text))


def pieces(text: str) -> Iterator[str]:
    """Yield a text in pieces of about a million characters, each up to the end of a document, line or word."""
    while text:
        end = break_after(text, PIECE)
        yield text[:end]
        text = text[end:]


def ids_of(tokenizer: PreTrainedTokenizerBase, text: str) -> Ids:
    return np.array(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], np.int32)


def chats(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return samples of conversations as the chat templates write them, which have the templates' own words."""
    said, found = tokenizer.chat_template, []
    templates = said.values() if isinstance(said, dict) else () if said is None else (said,)
    for template, chat, prompt in product(templates, _CHATS, (True, False)):
        with suppress(Exception):  # of a template that refuses this chat, with any error
            keywords = {"chat_template": f"{_DAY}{template}", "add_generation_prompt": prompt, "tokenize": False}
            found.append(tokenizer.apply_chat_template(chat, **keywords))
    return found


def growth(whole: PreTrainedTokenizerBase, smaller: PreTrainedTokenizerBase, text: str, *, name: str) -> Growth:
    """Return how much longer `text` becomes. Raises VerificationFailed where the smaller tokenizer changes it."""
    counts = np.array([[len(ids) for ids in both_ids(whole, smaller, piece)] for piece in pieces(text)]).sum(0)
    words = Counter(text.split())
    space = "" if whole.tokenize("a")[0].startswith("▁") else " "  # most words follow a space
    lengths = (_lengths(one, [space + word for word in words]) for one in (whole, smaller))
    finer = sum(count for count, old, new in zip(words.values(), *lengths, strict=True) if new > old)
    return Growth(
        text=name,
        characters=len(text),
        whole_tokens=int(counts[0]),
        tokens=int(counts[1]),
        words=words.total(),
        finer=finer,
    )


def both_ids(whole: PreTrainedTokenizerBase, smaller: PreTrainedTokenizerBase, text: str) -> tuple[Ids, Ids]:
    """Split a text with both tokenizers. Raises VerificationFailed where the tokens do not say the same text."""
    before, after = ids_of(whole, text), ids_of(smaller, text)
    expected, got = whole.decode(before), smaller.decode(after)
    if got != expected:
        at = next((i for i, pair in enumerate(zip(got, expected, strict=False)) if pair[0] != pair[1]), len(got))
        raise VerificationFailed(
            f"the cut tokenizer changes a text: {got[at : at + 20]!r} stands where {expected[at : at + 20]!r} was"
        )
    return before, after


def require_same_tokens(smaller: PreTrainedTokenizerBase, text: str, expected: Ids) -> None:
    """Raise VerificationFailed where the smaller tokenizer does not split a text into the ids `expected`."""
    got = ids_of(smaller, text)
    if not np.array_equal(got, expected):
        at = first_difference(expected.tolist(), got.tolist())
        words = [smaller.convert_ids_to_tokens(ids[at : at + 5].tolist()) for ids in (got, expected)]
        raise VerificationFailed(f"the cut tokenizer splits a text into {words[0]} where the whole one has {words[1]}")


def _lengths(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[int]:
    """Return the number of tokens of each text."""
    ids = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"] if texts else []
    return [len(one) for one in ids]

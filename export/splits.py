"""How a runtime splits texts into tokens, compared with the tokenizer that was exported to it."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dilap.core.errors import VerificationFailed
from dilap.models.text_samples import first_difference

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True, kw_only=True)
class Split:
    """A text and the ids of its tokens; `normal` is the form of the text that the tokenizer splits."""

    text: str
    normal: str
    ids: Sequence[int]


def splits_of(
    reference: "PreTrainedTokenizerFast", texts: Iterable[str], *, add_special_tokens: bool = True
) -> Iterator[Split]:
    """Yield the texts as the tokenizer `reference` splits them."""
    for text in texts:
        ids = reference(text, add_special_tokens=add_special_tokens)["input_ids"]
        yield Split(text=text, normal=_normal(reference, text), ids=ids)


def normalises(reference: "PreTrainedTokenizerFast") -> bool:
    """Return whether a tokenizer brings texts into a normal form; SentencePiece's only put marks of their own there."""
    words = reference.backend_tokenizer
    return words.normalizer is not None and not getattr(words.model, "byte_fallback", False)


def require_alike(
    splits: Iterable[Split], tokens: Callable[[str], Sequence[int]], *, runtime: str, word: Callable[[int], str]
) -> list[str]:
    """Return what a reader must know of an exported tokenizer, which splits a text into `tokens` in `runtime`.

    That is the first text that is only split alike in its normal form. Raises VerificationFailed, with the text of the
    tokens (`word`), at the first one that is split differently in that form too.
    """
    raw = []
    for one in splits:
        if (got := tokens(one.normal)) != one.ids:
            raise VerificationFailed(_difference(one, got, runtime=runtime, word=word))
        if tokens(one.text) != one.ids:
            raw.append(one.text)
    return [
        f"{runtime} does not normalise texts as this tokenizer does: {text!r} is split alike only in normal form"
        for text in raw[:1]
    ]


def _normal(reference: "PreTrainedTokenizerFast", text: str) -> str:
    normal: str = reference.backend_tokenizer.normalizer.normalize_str(text) if normalises(reference) else text
    return normal


def _difference(split: Split, got: Sequence[int], *, runtime: str, word: Callable[[int], str]) -> str:
    at = first_difference(split.ids, got)
    theirs, ours = (f"{ids[at]} {word(ids[at])!r}" if at < len(ids) else "nothing more" for ids in (split.ids, got))
    return f"the exported tokenizer differs: {split.text!r} at token {at}: expected {theirs}, {runtime} gives {ours}"

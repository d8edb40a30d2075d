"""A BPE tokenizer with fewer tokens, which splits the texts that it was cut for as the whole one does.

BPE begins with the characters of a word (or of its bytes) and joins, over and over, the neighbours whose merge has the
lowest rank. Keep every token that such a course goes through, all merges whose parts and result are kept, and their
order. Then the smaller tokenizer takes the same course: the merge that the whole one takes next is kept, because its
parts stand in the text and its result will, and no other one comes before it, because all merges are the whole one's.
A merge that is not taken can therefore be kept or not. The course inside a token is the same in every text, because no
merge across the token's ends was taken before it was whole; so it is found from the token alone.
"""

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

from tokenizers import pre_tokenizers
from transformers import PreTrainedTokenizerBase

from dilap.core.errors import Unsupported

_BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))  # how SentencePiece writes them


@dataclass(frozen=True, kw_only=True)
class Bpe:
    """A BPE tokenizer: the content of its tokenizer.json, the ids of all its tokens, and its merges by rank."""

    document: Mapping[str, Any]
    ids: Mapping[str, int]
    merges: Sequence[tuple[str, str]]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> "Bpe":
        """Read a loaded tokenizer. Raises Unsupported, with the reason, for one whose tokens cannot be left out."""
        if not hasattr(tokenizer, "backend_tokenizer"):
            raise Unsupported(f"the vocabulary of a {type(tokenizer).__name__} cannot be cut: it has no tokenizer.json")
        document = json.loads(tokenizer.backend_tokenizer.to_str())
        _require_cuttable(document)
        model = document["model"]
        merges = [tuple(one.split(" ") if isinstance(one, str) else one) for one in model["merges"]]
        added = {one["content"]: one["id"] for one in document["added_tokens"]}
        return cls(document=document, ids=model["vocab"] | added, merges=merges)

    @property
    def always(self) -> set[int]:
        """The tokens that stay whatever the texts are: added ones (the special ones are), bytes, the unknown token."""
        model = self.document["model"]
        letters = _BYTES if model.get("byte_fallback") else pre_tokenizers.ByteLevel.alphabet()
        added = (one["id"] for one in self.document["added_tokens"])
        return {*added, *(self.ids[one] for one in (*letters, model.get("unk_token")) if one in self.ids)}

    def needed(self, tokens: Iterable[int]) -> set[int]:
        """Return the tokens that stay so that texts which consist of `tokens` are split as now.

        What `ignore_merges` takes whole, without any course, keeps its course: not every runtime ignores merges.
        """
        names, found = {index: name for name, index in self.ids.items()}, self.always
        for token in tokens:
            found.add(token)
            found.update(self.ids[part] for part in self._course(names[token]))
        return found

    def filled(self, kept: Collection[int], *, multiple: int) -> set[int]:
        """Return `kept` with so many more tokens that their number is a multiple, where there are enough.

        They are those of the first merges whose parts are there, which were the most frequent when BPE was trained.
        """
        found = set(kept)
        for left, right in self.merges:
            if len(found) % multiple == 0:
                break
            if self.ids[left] in found and self.ids[right] in found:
                found.add(self.ids[left + right])
        return found

    def cut(self, kept: Sequence[int]) -> dict[str, Any]:
        """Return the tokenizer.json with the tokens `kept` alone (ascending); their ids are their places in it."""
        new, model = {old: index for index, old in enumerate(kept)}, self.document["model"]
        vocabulary = {name: new[index] for name, index in model["vocab"].items() if index in new}
        triples = ((left, right, left + right) for left, right in self.merges)
        merges = [(left, right) for left, right, both in triples if vocabulary.keys() >= {left, right, both}]
        padding = self.document.get("padding")
        return {
            **self.document,
            "added_tokens": [{**one, "id": new[one["id"]]} for one in self.document["added_tokens"]],
            "post_processor": _renumbered(self.document["post_processor"], new),
            "padding": padding and {**padding, "pad_id": new.get(padding["pad_id"], 0)},
            "model": {**model, "vocab": vocabulary, "merges": merges},
        }

    @cached_property
    def _ranks(self) -> Mapping[tuple[str, str], int]:
        return {pair: rank for rank, pair in enumerate(self.merges)}

    def _course(self, token: str) -> set[str]:
        """Return the tokens that BPE goes through until it has `token`; none where merges do not lead to it."""
        symbols = list(token)
        found = set(symbols)
        while len(symbols) > 1:
            ranks = [self._ranks.get(pair, len(self.merges)) for pair in pairwise(symbols)]
            if (first := min(ranks)) == len(self.merges):
                return set()
            at = ranks.index(first)
            symbols[at : at + 2] = ["".join(symbols[at : at + 2])]
            found.add(symbols[at])
        return found if found <= self.ids.keys() else set()


def _require_cuttable(document: Mapping[str, Any]) -> None:
    """Raise Unsupported for a tokenizer that is no BPE, or that can lose text when tokens are left out."""
    model = document["model"]
    if (kind := model["type"]) != "BPE":
        raise Unsupported(f"the vocabulary of a {kind} tokenizer cannot be cut, only that of BPE")
    if mark := model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise Unsupported(f"the vocabulary of a BPE tokenizer that marks parts of words ({mark!r}) cannot be cut")
    has_bytes = model.get("byte_fallback") and model["vocab"].keys() >= set(_BYTES)
    if not has_bytes and "ByteLevel" not in _kinds({key: document[key] for key in ("normalizer", "pre_tokenizer")}):
        raise Unsupported(
            "the vocabulary of a tokenizer without bytes cannot be cut: it would lose the characters that the text "
            "does not have"
        )


def _kinds(part: Any) -> Iterator[str]:
    """Yield the types of all parts of a tokenizer.json."""
    inner = part.values() if isinstance(part, Mapping) else part if isinstance(part, list) else ()
    if isinstance(part, Mapping) and "type" in part:
        yield part["type"]
    for one in inner:
        yield from _kinds(one)


def _renumbered(processor: Any, new: Mapping[int, int]) -> Any:
    """Return a post-processor with the new ids of the tokens that it adds."""
    kind = processor and processor["type"]
    if kind == "Sequence":
        return {**processor, "processors": [_renumbered(one, new) for one in processor["processors"]]}
    if kind == "TemplateProcessing":
        special = processor["special_tokens"].items()
        renumbered = {name: {**one, "ids": [new[index] for index in one["ids"]]} for name, one in special}
        return {**processor, "special_tokens": renumbered}
    if kind in ("BertProcessing", "RobertaProcessing"):
        return processor | {key: [processor[key][0], new[processor[key][1]]] for key in ("sep", "cls")}
    return processor

"""Added tokens for which a model has no row in its embedding are left out of its tokenizer.

Gemma 3's text models come with the tokenizer of those that see images, whose token for a piece of an image is never
embedded; many fine-tuned models have a token for padding that was added to the tokenizer alone.
"""

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from dilap.core.errors import InvalidInput
from dilap.models.pretrained import from_pretrained
from dilap.models.vocabulary import TemporaryFolder, write_files_

_NEEDED = ("bos_token", "eos_token", "unk_token")


@dataclass(frozen=True, kw_only=True)
class Embedded:
    """A tokenizer all of whose tokens have a row, its files, and the tokens that were left out."""

    tokenizer: PreTrainedTokenizerBase
    folder: TemporaryFolder
    left_out: tuple[str, ...]

    @property
    def note(self) -> str:
        """What a reader must know."""
        names = ", ".join(self.left_out[:4]) + (f" and {len(self.left_out) - 4} more" if self.left_out[4:] else "")
        return f"tokens of the tokenizer for which the model has no embedding are left out: {names}"


def embedded(tokenizer: PreTrainedTokenizerBase, *, rows: int) -> Embedded | None:
    """Return a tokenizer without the added tokens beyond the `rows` of an embedding; None where there are none.

    Raises InvalidInput where other tokens are beyond them, or those with which a text begins or ends.
    """
    beyond = {token: index for token, index in tokenizer.get_vocab().items() if index >= rows}
    if not beyond:
        return None
    needed = {getattr(tokenizer, name) for name in _NEEDED}
    if needed & set(beyond) or not set(beyond.values()) <= set(tokenizer.added_tokens_decoder):
        raise InvalidInput(f"the tokenizer has {max(beyond.values()) + 1} tokens, the model {rows} embedding rows")
    folder = TemporaryFolder()
    write_files_(tokenizer, folder.path)
    _rewrite(folder.path / "tokenizer_config.json", beyond)
    _rewrite(folder.path / "tokenizer.json", beyond)
    return Embedded(
        tokenizer=from_pretrained(PreTrainedTokenizerFast, folder.path),
        folder=folder,
        left_out=tuple(sorted(beyond, key=beyond.__getitem__)),
    )


def _rewrite(path: Path, tokens: Collection[str]) -> None:
    """Leave the added tokens out of a file of a tokenizer, wherever it names or describes them."""
    document = json.loads(path.read_text(encoding="utf-8"))
    model = {"model": document.pop("model")} if "model" in document else {}  # has the other tokens and their merges
    path.write_text(json.dumps(_without(document, tokens) | model, ensure_ascii=False), encoding="utf-8")


def _without(value: Any, tokens: Collection[str]) -> Any:
    """Return a JSON value without the entries that are one of `tokens`, or that describe one."""

    def is_one(entry: Any) -> bool:
        name = entry.get("content") if isinstance(entry, dict) else entry
        return isinstance(name, str) and name in tokens

    if isinstance(value, dict):
        return {name: _without(one, tokens) for name, one in value.items() if not is_one(one)}
    return [_without(one, tokens) for one in value if not is_one(one)] if isinstance(value, list) else value

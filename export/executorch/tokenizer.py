"""The tokenizer beside an ExecuTorch program, written so that ExecuTorch's own reader splits texts alike."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dilap.backends.child import opened
from dilap.backends.executorch.tokenizer import ExecuTorchTokenizer
from dilap.core.errors import Unsupported, VerificationFailed
from dilap.export import hf_tokenizer
from dilap.export.splits import Split, normalises, require_alike, splits_of
from dilap.models.text_samples import SAMPLES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def read_tokenizer(source: Path, *, vocab_size: int) -> "PreTrainedTokenizerFast":
    """Read the tokenizer of a Hugging Face folder or a GGUF file. Raises InvalidInput, Unsupported."""
    words = hf_tokenizer.read_tokenizer(source, vocab_size=vocab_size)
    if not hasattr(words, "backend_tokenizer"):
        raise Unsupported(f"{source}: {type(words).__name__} has no tokenizer.json form")
    found: PreTrainedTokenizerFast = words
    return found


def save_tokenizer(words: "PreTrainedTokenizerFast", folder: Path) -> list[str]:
    """Write a tokenizer's files as ExecuTorch needs them, and return what a reader must know of them.

    A normal form that ExecuTorch does not make alike is left out, because it does worse with it: its NFC takes accents
    away, also from texts that are in normal form. Raises VerificationFailed where ExecuTorch splits a text differently.
    """
    words.save_pretrained(folder)
    path, splits = folder / "tokenizer.json", list(splits_of(words, SAMPLES, add_special_tokens=False))
    try:
        return _verify_tokenizer(path, words, splits)
    except VerificationFailed:
        if not normalises(words):
            raise
    document = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(document | {"normalizer": None}, ensure_ascii=False, indent=2), encoding="utf-8")
    return _verify_tokenizer(path, words, splits)


def _verify_tokenizer(path: Path, reference: "PreTrainedTokenizerFast", splits: Sequence[Split]) -> list[str]:
    """Return what a reader must know of how ExecuTorch splits texts with the file `path`. Raises VerificationFailed."""
    tokenizer = opened(ExecuTorchTokenizer, path, runtime="executorch")
    return require_alike(splits, tokenizer.tokens, runtime="ExecuTorch", word=reference.convert_ids_to_tokens)

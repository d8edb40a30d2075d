"""Tokenizers as Hugging Face's files: read from such a folder or from a GGUF file, and written."""

from pathlib import Path
from typing import TYPE_CHECKING

from dilap.core.errors import InvalidInput, VerificationFailed
from dilap.models.load import load_tokenizer
from dilap.models.text_samples import SAMPLES, first_difference

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def read_tokenizer(source: Path, *, vocab_size: int) -> "PreTrainedTokenizerBase":
    """Read the tokenizer of a Hugging Face folder or of a GGUF file.

    Raises InvalidInput where it cannot be read, or has more tokens than `vocab_size`.
    """
    folder, gguf_file = (source.parent, source.name) if source.is_file() else (source, None)
    try:
        tokenizer = load_tokenizer(folder, gguf_file=gguf_file, local_files_only=True)
    except InvalidInput as error:
        raise InvalidInput(f"{source}: transformers cannot load a tokenizer from it: {error}") from error
    if len(tokenizer) > vocab_size:
        raise InvalidInput(f"the tokenizer has {len(tokenizer)} tokens, the model {vocab_size} embedding rows")
    return tokenizer


def save_tokenizer(tokenizer: "PreTrainedTokenizerBase", folder: Path) -> None:
    """Write the files and read them back. Raises VerificationFailed at the first text that they split differently."""
    tokenizer.save_pretrained(folder)
    saved = load_tokenizer(folder, local_files_only=True)
    for text in SAMPLES:
        expected, got = (one(text)["input_ids"] for one in (tokenizer, saved))
        if expected != got:
            at = first_difference(expected, got)
            raise VerificationFailed(
                f"the exported tokenizer differs: {text!r} at token {at}: expected {expected[at:][:1]}, "
                f"got {got[at:][:1]}"
            )

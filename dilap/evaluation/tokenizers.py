"""Turn text into token ids, for each model with the tokenizer that it ships with."""

from pathlib import Path
from typing import Protocol

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dilap.backends.child import opened
from dilap.backends.llamacpp.file import Gguf
from dilap.core.errors import InvalidInput
from dilap.models.pretrained import from_pretrained


class TextTokenizer(Protocol):
    """A tokenizer.

    `prefix` is the token that is put before a text without other context: the one for the beginning of a text, or for
    its end where there is none. `prefix_text` is that token as text.
    """

    prefix: int
    prefix_text: str

    def encode(self, text: str, *, special: bool) -> list[int]:
        """Return token ids, with or without the special tokens that the tokenizer adds by itself."""


class HuggingFaceTokenizer:
    """A tokenizer of transformers."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raise InvalidInput for a tokenizer that has a token neither for the beginning nor for the end of a text."""
        self._tokenizer = tokenizer
        prefix = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        if prefix is None:
            raise InvalidInput("the tokenizer names neither a beginning nor an end of text: set its bos_token")
        self.prefix = int(prefix)
        self.prefix_text = str(tokenizer.decode(self.prefix))

    @classmethod
    def read(cls, folder: Path) -> "HuggingFaceTokenizer":
        """Read the tokenizer beside an artifact. Raises InvalidInput."""
        try:
            return cls(from_pretrained(AutoTokenizer, folder, local_files_only=True))
        except InvalidInput as error:
            raise InvalidInput(f"{folder}: the artifact has no tokenizer that transformers loads: {error}") from error

    def encode(self, text: str, *, special: bool) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
        return ids


class GgufTokenizer:
    """The tokenizer inside a GGUF file, through llama.cpp."""

    def __init__(self, path: Path) -> None:
        """Raise InvalidInput for a file without a tokenizer, or without a token for the beginning or end of a text."""
        self._file = opened(Gguf, path, runtime="llamacpp", vocab_only=True)
        prefix = self._file.beginning if self._file.has_vocabulary else None
        if prefix is None:
            raise InvalidInput(f"{path}: it holds no tokenizer with a beginning or an end of text")
        self.prefix, self.prefix_text = prefix, self._file.token_text(prefix)

    def encode(self, text: str, *, special: bool) -> list[int]:
        return self._file.tokens(text, add_special=special)

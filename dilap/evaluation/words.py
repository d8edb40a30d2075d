"""Text to tokens, each model with the tokenizer that it ships with."""

from pathlib import Path
from typing import Protocol

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dilap.backends.child import opened
from dilap.backends.llamacpp.file import Gguf
from dilap.core.errors import InvalidInput
from dilap.models.pretrained import from_pretrained


class Words(Protocol):
    """A tokenizer. `prefix` is the token that stands before a text that has no other context: its beginning, or else
    its end; `prefix_text` is how it is written."""

    prefix: int
    prefix_text: str

    def encode(self, text: str, *, special: bool) -> list[int]:
        """Token ids; with the special tokens that the tokenizer adds by itself, or without."""


class HuggingFaceWords:
    """A tokenizer of transformers."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raises InvalidInput for one that has neither a beginning nor an end."""
        self._tokenizer = tokenizer
        prefix = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        if prefix is None:
            raise InvalidInput("the tokenizer names neither a beginning nor an end of text: set its bos_token")
        self.prefix = int(prefix)
        self.prefix_text = str(tokenizer.decode(self.prefix))

    @classmethod
    def read(cls, folder: Path) -> "HuggingFaceWords":
        """The tokenizer beside an artifact. Raises InvalidInput."""
        try:
            return cls(from_pretrained(AutoTokenizer, folder, local_files_only=True))
        except InvalidInput as error:
            raise InvalidInput(f"{folder}: the artifact has no tokenizer that transformers loads: {error}") from error

    def encode(self, text: str, *, special: bool) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
        return ids


class GgufWords:
    """The tokenizer inside a GGUF file, through llama.cpp."""

    def __init__(self, path: Path) -> None:
        """Raises InvalidInput for a file without one, or of a model that has neither a beginning nor an end."""
        self._file = opened(Gguf, path, runtime="llamacpp", vocab_only=True)
        prefix = self._file.beginning if self._file.has_vocabulary else None
        if prefix is None:
            raise InvalidInput(f"{path}: it holds no tokenizer with a beginning or an end of text")
        self.prefix, self.prefix_text = prefix, self._file.token_text(prefix)

    def encode(self, text: str, *, special: bool) -> list[int]:
        return self._file.tokens(text, add_special=special)

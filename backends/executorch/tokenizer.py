"""ExecuTorch's own tokenizer, with which an exported tokenizer.json is checked."""

import importlib
from pathlib import Path

from dilap.core.errors import InvalidInput, Unavailable, reason_of


class ExecuTorchTokenizer:
    """A tokenizer.json as ExecuTorch's runner reads it."""

    def __init__(self, path: Path) -> None:
        """Read the file. Raises Unavailable without ExecuTorch's tokenizers, InvalidInput where they refuse it."""
        try:
            self._tokenizer = importlib.import_module("pytorch_tokenizers").CppHFTokenizer()
        except ImportError as error:
            reason = f"ExecuTorch's tokenizers are needed ({error}); pip install 'dilap[executorch]'"
            raise Unavailable(reason) from error
        try:
            self._tokenizer.load(str(path))
        except RuntimeError as error:
            raise InvalidInput(f"{path}: ExecuTorch cannot load the tokenizer: {reason_of(error)}") from error

    def tokens(self, text: str) -> list[int]:
        """Return the token ids of a text, without special tokens."""
        return [int(token) for token in self._tokenizer.encode(text, 0, 0)]

"""ExecuTorch's runtime as far as an exporter needs it: logits of a file, and its tokenizer."""

import importlib
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dilap.backends.executorch.bindings import bindings
from dilap.core.errors import InvalidInput, Unavailable, reason_of


class Pte:
    """One of a program's two methods, opened by ExecuTorch's runtime: `forward` gives the last position's logits,
    `score` every one's."""

    def __init__(self, path: Path, *, method: str) -> None:
        """Raises InvalidInput, in one line, where the file is damaged."""
        self._gives_all = method == "score"
        try:
            self._program: Any = bindings()._load_program(str(path))
            self._method: Any = self._program.load_method(method)
        except RuntimeError as error:
            raise InvalidInput(f"{path}: ExecuTorch cannot load it: {reason_of(error)}") from error

    def __enter__(self) -> "Pte":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._method = self._program = None

    def logits(self, token_ids: Sequence[int], *, incremental: bool) -> NDArray[np.float32]:
        """Logits (tokens x vocabulary); where a run gives the last position's, one pass is one for each prefix."""
        ids = list(token_ids)
        if self._gives_all and not incremental:
            return self._run(ids, 0)
        inputs = [([token], at) if incremental else (ids[: at + 1], 0) for at, token in enumerate(ids)]
        return np.concatenate([self._run(tokens, position) for tokens, position in inputs])

    def _run(self, tokens: list[int], position: int) -> NDArray[np.float32]:
        array: NDArray[np.float32] = self._method([torch.tensor([tokens]), torch.tensor([position])])[0].numpy()
        return array


class ExecuTorchTokenizer:
    """A tokenizer.json as ExecuTorch's runner reads it."""

    def __init__(self, path: Path) -> None:
        """Raises Unavailable, InvalidInput."""
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
        """Token ids, without special tokens."""
        return [int(token) for token in self._tokenizer.encode(text, 0, 0)]

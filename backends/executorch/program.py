"""The one way into an ExecuTorch program: a method of it, run on tokens at a position."""

import importlib
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dilap.backends.executorch.bindings import bindings
from dilap.core.errors import InvalidInput, reason_of


class Program:
    """One of a program's two methods: `forward` gives the last position's logits, `score` every one's."""

    def __init__(self, path: Path, *, method: str) -> None:
        """Raises InvalidInput, in one line, where the file is damaged or has no such method."""
        if not path.is_file():
            raise InvalidInput(f"{path}: no such file")
        self._gives_all = method == "score"
        try:
            self._program: Any = bindings()._load_program(str(path))
            names = {self._program.get_method_name(index) for index in range(self._program.num_methods())}
            if method not in names:
                raise InvalidInput(f"{path}: it has no method {method!r}; an earlier DiLAP wrote it: export it again")
            self._method: Any = self._program.load_method(method)
        except RuntimeError as error:
            raise InvalidInput(f"{path}: ExecuTorch cannot load it: {reason_of(error)}") from error

    def __enter__(self) -> "Program":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._method = self._program = None

    def constant(self, name: str) -> int:
        """What one of the methods without inputs gives: `get_vocab_size`, say."""
        return int(self._program.load_method(name)([])[0])

    def run(self, inputs: tuple[Any, Any]) -> None:
        """One run whose outputs nobody wants, as it is timed."""
        self._method(inputs, clone_outputs=False)

    def logits_at(self, tokens: Sequence[int], *, position: int) -> NDArray[np.float32]:
        """Logits (rows x vocabulary) after tokens that follow `position` others."""
        array: NDArray[np.float32] = self._method(inputs_of(tokens, position=position))[0].numpy()
        return array

    def logits(self, token_ids: Sequence[int], *, incremental: bool) -> NDArray[np.float32]:
        """Logits (tokens x vocabulary); where a run gives the last position's, one pass is one for each prefix."""
        ids = list(token_ids)
        if self._gives_all and not incremental:
            return self.logits_at(ids, position=0)
        inputs = [([token], at) if incremental else (ids[: at + 1], 0) for at, token in enumerate(ids)]
        return np.concatenate([self.logits_at(tokens, position=position) for tokens, position in inputs])


def inputs_of(tokens: Sequence[int], *, position: int) -> tuple[Any, Any]:
    """`tokens` (1 x count) and `input_pos` (1): torch tensors, which is all that the bindings take."""
    torch = importlib.import_module("torch")
    return torch.tensor([list(tokens)]), torch.tensor([position])

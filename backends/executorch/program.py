"""The only place that opens ExecuTorch programs: runs one method of a program on tokens at a position."""

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
    """One of a program's two methods: `forward` gives the last position's logits, `score` those of all positions."""

    def __init__(self, path: Path, *, method: str) -> None:
        """Open the file. Raises InvalidInput, in one line, where it is damaged or has no such method."""
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
        """Return what one of the methods without inputs gives, such as `get_vocab_size`."""
        return int(self._program.load_method(name)([])[0])

    def run(self, inputs: tuple[Any, Any]) -> None:
        """Run the method once without copying its outputs; this is what is timed."""
        self._method(inputs, clone_outputs=False)

    def logits_at(self, tokens: Sequence[int], *, position: int) -> NDArray[np.float32]:
        """Return the logits (rows x vocabulary) of tokens that follow `position` others: one row, or one per token."""
        array: NDArray[np.float32] = self._method(inputs_of(tokens, position=position))[0].numpy()
        return array

    def logits(self, token_ids: Sequence[int], *, incremental: bool) -> NDArray[np.float32]:
        """Return the logits (tokens x vocabulary) at all positions, token by token if `incremental`, else in one pass.

        A method that gives the last position's logits alone is run once for every prefix instead of in one pass.
        """
        ids = list(token_ids)
        if self._gives_all and not incremental:
            return self.logits_at(ids, position=0)
        inputs = [([token], at) if incremental else (ids[: at + 1], 0) for at, token in enumerate(ids)]
        return np.concatenate([self.logits_at(tokens, position=position) for tokens, position in inputs])


def inputs_of(tokens: Sequence[int], *, position: int) -> tuple[Any, Any]:
    """Return `tokens` (1 x count) and `input_pos` (1) as torch tensors, the only ones that the bindings take."""
    torch = importlib.import_module("torch")
    return torch.tensor([list(tokens)]), torch.tensor([position])

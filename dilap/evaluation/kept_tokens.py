"""Score a model with its whole vocabulary among the tokens of a smaller one."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dilap.backends import Reader


class KeptTokens:
    """A reader of a model with more tokens, which takes and gives only those at the ids `kept`, numbered from 0."""

    def __init__(self, reader: Reader, kept: NDArray[np.int64]) -> None:
        self._reader, self._kept = reader, kept
        self.max_tokens, self.vocab_size = reader.max_tokens, len(kept)

    def reserve(self, num_tokens: int) -> None:
        self._reader.reserve(num_tokens)

    def read(self, token_ids: Sequence[int], *, start: int, num_rows: int) -> NDArray[np.float32]:
        logits = self._reader.read(self._kept[list(token_ids)].tolist(), start=start, num_rows=num_rows)
        found: NDArray[np.float32] = logits[:, self._kept]
        return found

    def close(self) -> None:
        self._reader.close()

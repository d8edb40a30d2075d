"""A torch model that reads text like an artifact: with a KV cache, which keeps what a text shares with the last."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import DynamicCache, PreTrainedModel

from dilap.models.compute_device import HOST


class TorchReader:
    """The `dilap.backends.Reader` of a torch model; it computes in the type that the model's weights have."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model.eval()
        self._cache: Any = DynamicCache()
        self._num_read = 0
        self.max_tokens = int(model.config.max_position_embeddings)
        self.vocab_size = int(model.config.vocab_size)

    def reserve(self, num_tokens: int) -> None:  # noqa: ARG002 - the cache grows as it is read into
        self._cache = DynamicCache()

    @torch.inference_mode()
    def read(self, token_ids: Sequence[int], *, start: int, num_rows: int) -> NDArray[np.float32]:
        if start == 0:
            self._cache = DynamicCache()
        elif start < self._num_read:
            self._cache.crop(start - self._num_read)
        self._num_read = start + len(token_ids)
        tokens = torch.tensor([list(token_ids)], device=self._model.device)
        out = self._model(input_ids=tokens, past_key_values=self._cache, use_cache=True, logits_to_keep=num_rows)
        rows: NDArray[np.float32] = out.logits[0].float().to(HOST).numpy()
        return rows

    def close(self) -> None:
        self._cache = DynamicCache()

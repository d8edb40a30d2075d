"""An exported ONNX file in ONNX Runtime, to check its logits. Torch-free, for it runs in a process of its own."""

import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dilap.backends.inputs import num_together
from dilap.backends.onnxruntime.library import open_session

_NUMPY_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


class OnnxFile:
    """An exported file, run on the CPU by the names of its inputs and outputs, as any other program would run it."""

    def __init__(self, path: Path, *, optimised: bool = True) -> None:
        """Open the file. Raises InvalidInput, in one line, where ONNX Runtime refuses it."""
        self._session: Any = open_session(path, threads=max(1, (os.cpu_count() or 2) // 2), optimised=optimised)

    def __enter__(self) -> "OnnxFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._session = None

    def logits(self, token_ids: Sequence[int], *, incremental: bool) -> NDArray[np.float32]:
        """Return the logits (tokens x vocabulary), computed in one pass.

        If `incremental`, the last quarter of the tokens is run one by one through the KV cache instead.
        """
        cache = {
            value.name: np.zeros((1, value.shape[1], 0, value.shape[3]), _NUMPY_TYPES[value.type])
            for value in self._session.get_inputs()
            if value.name.startswith("past_key_values.")
        }
        together = num_together(len(token_ids), incremental=incremental)
        rows, start = [], 0
        for end in range(together, len(token_ids) + 1):
            logits, cache = self._run(token_ids[start:end], start, cache)
            rows.append(logits)
            start = end
        return np.concatenate(rows)

    def _run(
        self, token_ids: Sequence[int], start: int, cache: dict[str, NDArray[np.floating]]
    ) -> tuple[NDArray[np.float32], dict[str, NDArray[np.floating]]]:
        end = start + len(token_ids)
        feed = {
            "input_ids": np.array([token_ids], np.int64),
            "attention_mask": np.ones((1, end), np.int64),
            "position_ids": np.arange(start, end)[None],
            "logits_to_keep": np.array([len(token_ids)]),
        }
        wanted = {value.name for value in self._session.get_inputs()}
        feed = {name: value for name, value in feed.items() if name in wanted}
        names = [value.name for value in self._session.get_outputs()]
        outputs = dict(zip(names, self._session.run(names, feed | cache), strict=True))
        grown = {name: outputs[name.replace("past_key_values", "present")] for name in cache}
        return outputs["logits"][0].astype(np.float32), grown

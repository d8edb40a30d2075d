"""An image network or an encoder of texts in ONNX Runtime on the CPU: one batch in, logits or embeddings out."""

import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dilap.backends.inputs import arrays_of, batch_shape, in_batches, random_batch, reads_no_text
from dilap.backends.onnxruntime.library import library, open_session
from dilap.core.errors import InvalidInput


class OnnxNetwork:
    """One network with buffers for its inputs and output; random images or texts are timed."""

    def __init__(self, path: Path, *, threads: int, spinning: str = "on") -> None:
        """Open the file. Raises InvalidInput, in one line, where it is damaged or another network."""
        self._session: Any = open_session(path, threads=threads, spinning=spinning)
        inputs = {value.name: tuple(value.shape) for value in self._session.get_inputs()}
        self.shape = batch_shape(path, inputs)
        outputs = self._session.get_outputs()
        if len(outputs) != 1 or len(outputs[0].shape) != 2 or outputs[0].shape[0] != self.shape[0]:
            raise InvalidInput(f"{path}: not a network that DiLAP exported: its output is no batch of logits")
        self._inputs = arrays_of(random_batch(self.shape))
        self._logits = np.zeros(outputs[0].shape, np.float32)
        self._binding = self._session.io_binding()
        for name, array in zip(inputs, self._inputs, strict=True):
            self._binding.bind_ortvalue_input(name, library().OrtValue.ortvalue_from_numpy(array))
        self._binding.bind_ortvalue_output(outputs[0].name, library().OrtValue.ortvalue_from_numpy(self._logits))

    def sample(self) -> int:
        start = time.perf_counter_ns()
        self._session.run_with_iobinding(self._binding)
        return time.perf_counter_ns() - start

    def outputs(self, images: NDArray[Any]) -> NDArray[np.float32]:
        def run(arrays: list[NDArray[Any]]) -> NDArray[np.float32]:
            for buffer, array in zip(self._inputs, arrays, strict=True):
                buffer[:] = array
            self._session.run_with_iobinding(self._binding)
            return self._logits.copy()

        return in_batches(images, self.shape, run)

    def logits(self, token_ids: Sequence[int], *, incremental: bool) -> NDArray[np.float32]:  # noqa: ARG002
        raise reads_no_text()

    def __enter__(self) -> "OnnxNetwork":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._binding = self._session = None

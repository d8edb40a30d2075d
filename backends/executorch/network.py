"""An image network or an encoder of texts in ExecuTorch: one batch in, logits or embeddings out."""

import importlib
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dilap.backends.executorch.bindings import bindings
from dilap.backends.executorch.threads import hold_threads, release_threads, use_threads
from dilap.backends.inputs import arrays_of, batch_shape, in_batches, random_batch, reads_no_text
from dilap.core.errors import InvalidInput, reason_of


class ExecuTorchNetwork:
    """One network with buffers for its inputs; random images or texts are timed."""

    def __init__(self, path: Path, *, threads: int) -> None:
        """Open the file. Raises InvalidInput, in one line, where it is damaged or another network."""
        if not path.is_file():
            raise InvalidInput(f"{path}: no such file")
        use_threads(threads)
        try:
            self._program: Any = bindings()._load_program(str(path))
            self._method: Any = self._program.load_method("forward")
        except RuntimeError as error:
            raise InvalidInput(f"{path}: ExecuTorch cannot load it: {reason_of(error)}") from error
        meta = self._method.method_meta()
        inputs = {f"input {index}": tuple(meta.input_tensor_meta(index).sizes()) for index in range(meta.num_inputs())}
        self.shape = batch_shape(path, inputs)
        hold_threads(self)
        torch = importlib.import_module("torch")
        self._inputs = [torch.from_numpy(array) for array in arrays_of(random_batch(self.shape))]

    def sample(self) -> int:
        start = time.perf_counter_ns()
        self._method(self._inputs, clone_outputs=False)
        return time.perf_counter_ns() - start

    def outputs(self, images: NDArray[Any]) -> NDArray[np.float32]:
        def run(arrays: list[NDArray[Any]]) -> NDArray[np.float32]:
            for buffer, array in zip(self._inputs, arrays, strict=True):
                buffer.numpy()[:] = array
            logits: NDArray[np.float32] = self._method(self._inputs)[0].numpy()
            return logits

        return in_batches(images, self.shape, run)

    def logits(self, token_ids: Sequence[int], *, incremental: bool) -> NDArray[np.float32]:  # noqa: ARG002
        raise reads_no_text()

    def __enter__(self) -> "ExecuTorchNetwork":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        release_threads(self)
        self._method = self._program = None

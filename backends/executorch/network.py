"""An image network in ExecuTorch: one batch in, logits out."""

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
from dilap.backends.inputs import image_batch, in_batches, random_images, reads_no_text
from dilap.core.errors import InvalidInput, reason_of


class ExecuTorchNetwork:
    """One network with a buffer for its input; random images are timed."""

    def __init__(self, path: Path, *, threads: int) -> None:
        """Open the file. Raises InvalidInput, in one line, where it is damaged or no image network."""
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
        self.shape = image_batch(path, inputs)
        hold_threads(self)
        self._images = importlib.import_module("torch").from_numpy(random_images(self.shape))

    def sample(self) -> int:
        start = time.perf_counter_ns()
        self._method([self._images], clone_outputs=False)
        return time.perf_counter_ns() - start

    def outputs(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        def run(batch: NDArray[np.float32]) -> NDArray[np.float32]:
            self._images.numpy()[:] = batch
            logits: NDArray[np.float32] = self._method([self._images])[0].numpy()
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

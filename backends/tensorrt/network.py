"""An engine of an image network: one batch in, logits out."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dilap.backends.inputs import in_batches, random_images, reads_no_text
from dilap.backends.tensorrt.cuda import Cuda
from dilap.backends.tensorrt.launch import Launch
from dilap.backends.tensorrt.recipe import NetworkRecipe
from dilap.core.errors import Unsupported


class EngineNetwork:
    """One network with buffers on the GPU; random images are timed, without the copies to the GPU and back."""

    def __init__(self, engine: Any, cuda: Cuda, recipe: NetworkRecipe, *, engine_bytes: int) -> None:
        self._cuda, self.shape = cuda, recipe.shape
        self._context = engine.create_execution_context()
        self._logits = np.zeros((recipe.shape[0], recipe.num_classes), np.float32)
        images = random_images(recipe.shape)
        self._input, self._output = cuda.allocate(images.nbytes), cuda.allocate(self._logits.nbytes)
        cuda.to_device(self._input, images)
        self._context.set_tensor_address("images", self._input)
        self._context.set_tensor_address("logits", self._output)
        self._launch = Launch(cuda, self._enqueue)
        self.host_ns: list[int] = []
        self.device_bytes = engine_bytes + images.nbytes + self._logits.nbytes

    def sample(self) -> int:
        """Return the GPU's nanoseconds for one batch."""
        gpu, host = self._launch.sample()
        self.host_ns.append(host)
        return gpu

    def outputs(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        return in_batches(images, self.shape, self._run)

    def _run(self, arrays: list[NDArray[Any]]) -> NDArray[np.float32]:
        self._cuda.to_device(self._input, np.ascontiguousarray(arrays[0]))
        self._enqueue()
        self._cuda.synchronise()
        self._cuda.to_host(self._logits, self._output)
        return self._logits.copy()

    def _enqueue(self) -> None:
        if not self._context.execute_async_v3(self._cuda.stream):
            raise Unsupported("TensorRT failed on a batch of images")

    def logits(self, token_ids: Sequence[int], *, incremental: bool) -> NDArray[np.float32]:  # noqa: ARG002
        raise reads_no_text()

    def close(self) -> None:
        for pointer in (self._input, self._output) if self._context is not None else ():
            self._cuda.free(pointer)
        self._context = None

"""One run of an engine on the GPU, and its clock."""

import time
from collections.abc import Callable

from dilap.backends.tensorrt.cuda import Cuda
from dilap.core.errors import Unavailable


class Launch:
    """What `enqueue` puts on the stream, recorded as a CUDA graph, which spares the CPU the single launches."""

    def __init__(self, cuda: Cuda, enqueue: Callable[[], None]) -> None:
        self._cuda, self._enqueue = cuda, enqueue
        self._start, self._end = cuda.new_event(), cuda.new_event()
        self._graph: int | None = None
        enqueue()  # TensorRT sets itself up in the first run, which cannot be captured
        cuda.synchronise()
        try:
            self._graph = cuda.capture(enqueue)
        except Unavailable:  # parts of the engine run on the CPU: it is timed with its single launches
            self._graph = None

    def sample(self) -> tuple[int, int]:
        """Run once; return the nanoseconds of the GPU, measured by CUDA events, and those that the host saw."""
        begin = time.perf_counter_ns()
        self._cuda.record(self._start)
        if self._graph is None:
            self._enqueue()
        else:
            self._cuda.launch(self._graph)
        self._cuda.record(self._end)
        self._cuda.synchronise()
        return self._cuda.elapsed_ns(self._start, self._end), time.perf_counter_ns() - begin

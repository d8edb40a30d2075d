"""An engine under one workload: its buffers, its KV cache and its clock."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dilap.backends.tensorrt.cuda import Cuda
from dilap.backends.tensorrt.launch import Launch
from dilap.backends.tensorrt.recipe import SHAPE_INPUT, Profile, Recipe
from dilap.core.errors import Unsupported
from dilap.core.workload import Phase, Workload

_LOGITS = "logits"


class EngineSession:
    """Runs an engine. `host_ns` has the time that the host saw for every sample, beside the GPU's own time.

    The cache's inputs and outputs may not be the same memory (TensorRT gives wrong results then), so there are two sets
    of cache buffers, and what was written in one step is read in the next without a copy.
    """

    def __init__(
        self,
        engine: Any,
        cuda: Cuda,
        recipe: Recipe,
        profiles: Sequence[Profile],
        workload: Workload,
        *,
        engine_bytes: int,
    ) -> None:
        self._cuda, self._recipe, self._workload = cuda, recipe, workload
        self._phases: list[Phase] = [profile.phase for profile in profiles]
        self._context = engine.create_execution_context()
        self._outputs = [name for name in _tensor_names(engine) if name == _LOGITS or name.startswith("present.")]
        self._memory: dict[str, tuple[int, int]] = {}  # buffer -> address, bytes
        self._engine_bytes = engine_bytes
        self._kept = np.zeros(1, np.int64)  # lives as long as the context, which reads it on the host
        self._launch: Launch | None = None
        self._read, self._write = "a", "b"
        self.host_ns: list[int] = []

    @property
    def device_bytes(self) -> int:
        """The GPU's memory that is taken: weights, what runs need, and buffers."""
        return self._engine_bytes + sum(num_bytes for _, num_bytes in self._memory.values())

    def sample(self) -> int:
        """Return the GPU's nanoseconds for one run of the workload, measured by CUDA events."""
        self._launch = self._launch or self._prepared()
        gpu, host = self._launch.sample()
        self.host_ns.append(host)
        return gpu

    def logits(self, token_ids: Sequence[int], *, incremental: bool) -> NDArray[np.float32]:
        self._launch = None
        steps = [[token] for token in token_ids] if incremental else [list(token_ids)]
        rows, past = [], 0
        for step in steps:
            self._bind("decode" if incremental else "prefill", step, past=past, kept=len(step))
            self._enqueue()
            rows.append(self._read_logits(len(step)))
            self._read, self._write = self._write, self._read
            past += len(step)
        return np.concatenate(rows)

    def close(self) -> None:
        for pointer, _ in self._memory.values():
            self._cuda.free(pointer)
        self._memory.clear()
        self._context = None

    def _prepared(self) -> Launch:
        """Bind the workload's shapes and record one run."""
        work = self._workload
        decode = work.phase == "decode"
        draw = np.random.default_rng(0)
        tokens = draw.integers(0, self._recipe.vocab_size, 1 if decode else work.prompt_tokens).tolist()
        self._bind(work.phase, tokens, past=work.context if decode else 0, kept=1)
        return Launch(self._cuda, self._enqueue)

    def _bind(self, phase: Phase, tokens: Sequence[int], *, past: int, kept: int) -> None:
        """Give every input its shape and address, and every output its address."""
        if phase not in self._phases:
            raise Unsupported(f"this engine was built for {', '.join(self._phases)} only, asked for {phase}")
        context, cuda = self._context, self._cuda
        context.set_optimization_profile_async(self._phases.index(phase), cuda.stream)
        shapes = self._recipe.shapes(num_tokens=len(tokens), past=past, kept=kept)
        self._kept[0] = shapes.pop(SHAPE_INPUT)[0]
        for name, shape in shapes.items():
            context.set_input_shape(name, shape)
        context.set_tensor_address(SHAPE_INPUT, self._kept.ctypes.data)
        positions = range(past, past + len(tokens))
        for name, values in (("input_ids", tokens), ("position_ids", positions)):
            array = np.array(values, np.int64)
            pointer = self._buffer(name, array.nbytes)
            cuda.to_device(pointer, array)
            context.set_tensor_address(name, pointer)
        for one in self._recipe.cache:
            size = self._num_bytes(shapes[one.name])
            context.set_tensor_address(one.name, self._buffer(self._cache_buffer(one.name, self._read), size))
        if missing := context.infer_shapes():
            raise Unsupported(f"the engine has inputs that this recipe does not know: {', '.join(missing)}")
        for name in self._outputs:
            size = self._num_bytes(context.get_tensor_shape(name))
            buffer = name if name == _LOGITS else self._cache_buffer(name, self._write)
            context.set_tensor_address(name, self._buffer(buffer, size))

    def _enqueue(self) -> None:
        if not self._context.execute_async_v3(self._cuda.stream):
            raise Unsupported(f"TensorRT failed on {self._workload.describe()}")

    def _read_logits(self, count: int) -> NDArray[np.float32]:
        """Return `count` rows of logits as f32, whatever the engine's precision is."""
        raw = np.empty((count, self._recipe.vocab_size), _STORED[self._recipe.precision])
        self._cuda.synchronise()
        self._cuda.to_host(raw, self._memory[_LOGITS][0])
        return widened(raw, precision=self._recipe.precision)

    def _cache_buffer(self, name: str, side: str) -> str:
        """Return a cache buffer's name on `side` a or b: past_key_values.3.key and present.3.key share both buffers."""
        return f"{side}:{name.removeprefix('past_key_values.').removeprefix('present.')}"

    def _num_bytes(self, shape: Sequence[int]) -> int:
        return int(np.prod(tuple(shape))) * np.dtype(_STORED[self._recipe.precision]).itemsize

    def _buffer(self, name: str, num_bytes: int) -> int:
        """Return the address of the buffer `name`, of at least that size; a buffer that grows loses its content."""
        if name in self._memory and self._memory[name][1] >= num_bytes:
            return self._memory[name][0]
        if name in self._memory:
            self._cuda.free(self._memory[name][0])
        self._memory[name] = (self._cuda.allocate(num_bytes), num_bytes)
        return self._memory[name][0]


_STORED: dict[str, type[np.generic]] = {"f16": np.float16, "bf16": np.uint16, "f32": np.float32}


def widened(raw: NDArray[np.generic], *, precision: str) -> NDArray[np.float32]:
    """Return stored numbers as f32; a bf16 number, a type that numpy lacks, is the upper half of an f32."""
    if precision == "bf16":
        return (raw.astype(np.uint32) << 16).view(np.float32)
    return raw.astype(np.float32)


def _tensor_names(engine: Any) -> list[str]:
    return [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]

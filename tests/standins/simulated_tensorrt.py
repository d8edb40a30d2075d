"""A Jetson on this machine: CUDA's calls on host memory, and engines that ONNX Runtime executes.

Only the arithmetic is another one: shapes, addresses, cache buffers and files are in the hands of the code that a
device runs.
"""

import ctypes
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from dilap.backends.tensorrt.recipe import CacheInput, Recipe

GPU = "Orin sm_87"
RECIPE = Recipe(
    precision="f16",
    head_dim=16,
    vocab_size=96,
    cache=(
        CacheInput(name="past_key_values.0.key", num_kv_heads=2),
        CacheInput(name="past_key_values.1.key", num_kv_heads=1),
    ),
    max_past=1023,
    max_prompt=1024,
    files={"model.onnx": "0" * 64},
    reference="reference.npz",
    bound_db=20.0,
    tested=("TensorRT 10.3",),
)


class HostCuda:
    """`dilap.backends.tensorrt.cuda.Cuda` on host memory; a run takes 5 microseconds."""

    stream = 7

    def __init__(self) -> None:
        self.buffers: dict[int, Any] = {}
        self.events: list[int] = []
        self.work: dict[int, Callable[[], None]] = {}

    def gpu(self) -> str:
        return GPU

    def allocate(self, num_bytes: int) -> int:
        buffer = ctypes.create_string_buffer(max(256, num_bytes))
        self.buffers[ctypes.addressof(buffer)] = buffer
        return ctypes.addressof(buffer)

    def free(self, pointer: int) -> None:
        del self.buffers[pointer]

    def to_device(self, pointer: int, array: NDArray[np.generic]) -> None:
        ctypes.memmove(pointer, array.ctypes.data, array.nbytes)

    def to_host(self, array: NDArray[np.generic], pointer: int) -> None:
        ctypes.memmove(array.ctypes.data, pointer, array.nbytes)

    def synchronise(self) -> None:
        pass

    def new_event(self) -> int:
        self.events.append(0)
        return len(self.events)

    def record(self, event: int) -> None:
        self.events[event - 1] = 5000 * event

    def elapsed_ns(self, start: int, end: int) -> int:
        return self.events[end - 1] - self.events[start - 1]

    def capture(self, work: Callable[[], None]) -> int:
        self.work[1] = work
        return 1

    def launch(self, graph: int) -> None:
        self.work[graph]()


class Context:
    """An execution context: what it is told is checked as TensorRT checks it, then ONNX Runtime computes."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self.inputs = {one.name: one for one in session.get_inputs()}
        self.outputs = {one.name: one for one in session.get_outputs()}
        self.shapes: dict[str, tuple[int, ...]] = {"logits_to_keep": (1,)}
        self.addresses: dict[str, int] = {}
        self.profile = -1
        self.num_runs = 0

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self.profile = index
        return True

    def set_input_shape(self, name: str, shape: Sequence[int]) -> bool:
        declared = self.inputs[name].shape
        assert all(isinstance(size, str) or size == given for size, given in zip(declared, shape, strict=True))
        self.shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def infer_shapes(self) -> list[str]:
        return [name for name in self.inputs if name not in self.shapes or name not in self.addresses]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        if name == "logits":
            return (1, int(self._read("logits_to_keep")[0]), self.outputs[name].shape[2])
        batch, heads, past, head_dim = self.shapes[name.replace("present.", "past_key_values.")]
        return (batch, heads, past + self.shapes["input_ids"][1], head_dim)

    def execute_async_v3(self, stream: int) -> bool:
        self.num_runs += 1
        filled = {address for name, address in self.addresses.items() if name in self.inputs}
        written = {address for name, address in self.addresses.items() if name in self.outputs}
        assert not filled & written, "TensorRT's inputs and outputs may not be the same memory"
        results = self._session.run(list(self.outputs), {name: self._read(name) for name in self.inputs})
        for name, value in zip(self.outputs, results, strict=True):
            assert value.shape == self.get_tensor_shape(name)
            ctypes.memmove(self.addresses[name], value.ctypes.data, value.nbytes)
        return True

    def _read(self, name: str) -> NDArray[np.generic]:
        dtype = np.float16 if "float16" in self.inputs[name].type else np.int64
        array = np.empty(self.shapes[name], dtype)
        ctypes.memmove(array.ctypes.data, self.addresses[name], array.nbytes)
        return array


class Engine:
    device_memory_size_v2 = 4096

    def __init__(self, session: Any) -> None:
        self._session = session
        self._names = [one.name for one in (*session.get_inputs(), *session.get_outputs())]
        self.num_io_tensors = len(self._names)

    def get_tensor_name(self, index: int) -> str:
        name: str = self._names[index]
        return name

    def create_engine_inspector(self) -> SimpleNamespace:
        text = '{"Layers": [{"Name": "a", "LayerType": "gemm"}, {"Name": "b [profile 1]", "LayerType": "kgen"}]}'
        return SimpleNamespace(get_engine_information=lambda _: text)

    def create_execution_context(self) -> Context:
        return Context(self._session)


def open_engine(model: Path) -> Engine:
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: it executes simulated engines")
    return Engine(runtime.InferenceSession(model, providers=["CPUExecutionProvider"]))


class Runtime:
    """A serialised engine is the path of its model."""

    def __init__(self, logger: object) -> None:
        pass

    def deserialize_cuda_engine(self, plan: bytes) -> Engine | None:
        path = Path(bytes(plan).decode())
        return open_engine(path) if path.exists() else None


def module(version: str = "10.3.0") -> SimpleNamespace:
    """As much of the module `tensorrt` as loading an engine takes."""

    class Logger:
        ERROR = 1

        def __init__(self, severity: int) -> None:
            pass

    return SimpleNamespace(
        __version__=version, Runtime=Runtime, Logger=Logger, LayerInformationFormat=SimpleNamespace(JSON=1)
    )

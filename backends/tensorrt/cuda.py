"""The few calls of the CUDA runtime that running an engine takes, made to the library itself.

JetPack always brings libcudart, while cuda-python would have to be installed there in the version of JetPack's CUDA.
These functions and their signatures are the same from CUDA 11.4 to 13.
"""

import ctypes
import ctypes.util
import functools
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dilap.core.errors import Unavailable

_NAMES = ("libcudart.so.13", "libcudart.so.12", "libcudart.so", "/usr/local/cuda/lib64/libcudart.so")
_COMPUTE_CAPABILITY = (75, 76)  # cudaDevAttrComputeCapabilityMajor, ...Minor
_NAME_BYTES = 256  # of the name, with which cudaDeviceProp begins
_PROPERTIES_BYTES = 16384  # room for cudaDeviceProp, whose length changes with the version
_TO_DEVICE, _TO_HOST = 1, 2  # cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost
_CAPTURE_RELAXED = 2  # cudaStreamCaptureModeRelaxed: TensorRT may allocate while it is captured


def _libraries() -> Iterator[str]:
    """Yield where libcudart may be: in the system, then in NVIDIA's Python packages."""
    found = ctypes.util.find_library("cudart")
    yield from ([found] if found else [])
    yield from _NAMES
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        yield from (str(path) for path in sorted(Path(folder).glob("*/lib/libcudart.so.*")))


@functools.cache
def load() -> "Cuda":
    """Return the CUDA runtime, loaded once. Raises Unavailable where there is none, or no GPU."""
    for name in _libraries():
        try:
            library = ctypes.CDLL(name)
        except OSError:
            continue
        return Cuda(library)
    raise Unavailable("no CUDA runtime (libcudart) here; it comes with JetPack: apt-get install nvidia-jetpack")


class Cuda:
    """The CUDA runtime and one stream. Pointers, streams, events and graphs are integers."""

    def __init__(self, library: Any) -> None:
        """Make the stream. Raises Unavailable, in CUDA's own words, where no GPU can be used."""
        self._library = library
        library.cudaGetErrorString.restype = ctypes.c_char_p
        count = ctypes.c_int()
        status = library.cudaGetDeviceCount(ctypes.byref(count))
        if status != 0 or count.value == 0:
            words = library.cudaGetErrorString(status).decode() if status else "it counts no device"
            raise Unavailable(f"no NVIDIA GPU that CUDA can use here ({words}); run this on the Jetson")
        self.stream = self._made("cudaStreamCreate")

    def gpu(self) -> str:
        """Return the GPU's name and compute capability, such as `Orin sm_87`."""
        properties = ctypes.create_string_buffer(_PROPERTIES_BYTES)
        self._call("cudaGetDeviceProperties", properties, 0)
        name = properties.raw[:_NAME_BYTES].partition(b"\0")[0].decode()
        numbers = []
        for attribute in _COMPUTE_CAPABILITY:
            value = ctypes.c_int()
            self._call("cudaDeviceGetAttribute", ctypes.byref(value), attribute, 0)
            numbers.append(value.value)
        return f"{name} sm_{numbers[0]}{numbers[1]}"

    def allocate(self, num_bytes: int) -> int:
        """Return the address of zeroed device memory; it is never empty, as even an empty tensor needs an address."""
        pointer = self._made("cudaMalloc", ctypes.c_size_t(max(256, num_bytes)))
        self._call("cudaMemset", ctypes.c_void_p(pointer), 0, ctypes.c_size_t(max(256, num_bytes)))
        return pointer

    def free(self, pointer: int) -> None:
        self._call("cudaFree", ctypes.c_void_p(pointer))

    def to_device(self, pointer: int, array: NDArray[np.generic]) -> None:
        self._copy(pointer, array.ctypes.data, array.nbytes, _TO_DEVICE)

    def to_host(self, array: NDArray[np.generic], pointer: int) -> None:
        self._copy(array.ctypes.data, pointer, array.nbytes, _TO_HOST)

    def _copy(self, target: int, source: int, num_bytes: int, direction: int) -> None:
        size = ctypes.c_size_t(num_bytes)
        self._call("cudaMemcpy", ctypes.c_void_p(target), ctypes.c_void_p(source), size, direction)

    def synchronise(self) -> None:
        self._call("cudaStreamSynchronize", ctypes.c_void_p(self.stream))

    def new_event(self) -> int:
        return self._made("cudaEventCreate")

    def record(self, event: int) -> None:
        self._call("cudaEventRecord", ctypes.c_void_p(event), ctypes.c_void_p(self.stream))

    def elapsed_ns(self, start: int, end: int) -> int:
        """Return the nanoseconds between two events that have passed; the resolution is half a microsecond."""
        milliseconds = ctypes.c_float()
        self._call("cudaEventElapsedTime", ctypes.byref(milliseconds), ctypes.c_void_p(start), ctypes.c_void_p(end))
        return round(milliseconds.value * 1e6)

    def capture(self, work: Callable[[], None]) -> int:
        """Return a graph of what `work` puts on the stream, ready to be launched."""
        stream, graph = ctypes.c_void_p(self.stream), ctypes.c_void_p()
        self._call("cudaStreamBeginCapture", stream, _CAPTURE_RELAXED)
        try:
            work()
        finally:
            self._call("cudaStreamEndCapture", stream, ctypes.byref(graph))
        return self._made("cudaGraphInstantiateWithFlags", graph, ctypes.c_ulonglong(0))

    def launch(self, graph: int) -> None:
        self._call("cudaGraphLaunch", ctypes.c_void_p(graph), ctypes.c_void_p(self.stream))

    def _made(self, function: str, *arguments: Any) -> int:
        """Call a function that makes something, and return the handle that it writes to its first argument."""
        made = ctypes.c_void_p()
        self._call(function, ctypes.byref(made), *arguments)
        return made.value or 0

    def _call(self, function: str, *arguments: Any) -> None:
        status = getattr(self._library, function)(*arguments)
        if status != 0:
            words = self._library.cudaGetErrorString(status).decode()
            raise Unavailable(f"{function} failed: {words} ({status})")

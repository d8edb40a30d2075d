"""CUDA through its library: a stand-in that answers, and the real one where it is installed."""

import ctypes
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dilap.backends.tensorrt import cuda
from dilap.core.errors import Unavailable


class Function:
    """A C function: what it returns may depend on its arguments."""

    restype: Any = None

    def __init__(self, call: Any) -> None:
        self.call = call
        self.arguments: tuple[Any, ...] = ()

    def __call__(self, *arguments: Any) -> Any:
        self.arguments = arguments
        return self.call(*arguments)


def writes(value: float) -> Function:
    """Writes a number where its first argument points."""

    def call(pointer: Any, *_: Any) -> int:
        pointer._obj.value = value
        return 0

    return Function(call)


def library(**functions: Any) -> Any:
    words = Function(lambda status: f"error {status}".encode())
    made = {"cudaGetErrorString": words, "cudaGetDeviceCount": writes(1), "cudaStreamCreate": writes(7)}
    return SimpleNamespace(**made | functions)


def test_the_gpu_has_a_name_and_a_compute_capability() -> None:
    def properties(buffer: Any, device: int) -> int:
        buffer.raw = b"Orin\0" + b"x" * (len(buffer) - 5)
        return 0

    def attribute(pointer: Any, number: int, device: int) -> int:
        pointer._obj.value = {75: 8, 76: 7}[number]
        return 0

    functions = {"cudaGetDeviceProperties": Function(properties), "cudaDeviceGetAttribute": Function(attribute)}
    assert cuda.Cuda(library(**functions)).gpu() == "Orin sm_87"


def test_a_machine_without_a_gpu_is_told_in_cudas_own_words() -> None:
    with pytest.raises(Unavailable, match=r"no NVIDIA GPU that CUDA can use here \(error 100\)"):
        cuda.Cuda(library(cudaGetDeviceCount=Function(lambda _: 100)))


def test_a_failed_call_is_named() -> None:
    one = cuda.Cuda(library(cudaStreamSynchronize=Function(lambda _: 700)))
    with pytest.raises(Unavailable, match=r"cudaStreamSynchronize failed: error 700 \(700\)"):
        one.synchronise()


def test_elapsed_milliseconds_become_nanoseconds() -> None:
    one = cuda.Cuda(library(cudaEventElapsedTime=writes(1.25)))
    assert one.elapsed_ns(1, 2) == 1_250_000


def test_an_empty_tensor_gets_an_address_too() -> None:
    allocate = writes(4096)
    one = cuda.Cuda(library(cudaMalloc=allocate, cudaMemset=Function(lambda *_: 0)))
    assert one.allocate(0) == 4096
    assert allocate.arguments[1].value > 0


def test_a_capture_ends_also_where_the_work_fails() -> None:
    ended = Function(lambda *_: 0)
    one = cuda.Cuda(library(cudaStreamBeginCapture=Function(lambda *_: 0), cudaStreamEndCapture=ended))

    def fail() -> None:
        raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011
        one.capture(fail)
    assert ended.arguments


def test_the_real_library_has_every_function_that_is_called() -> None:
    called = set(re.findall(r'"(cuda[A-Z]\w+)"', Path(cuda.__file__).read_text(encoding="utf-8")))
    for name in cuda._libraries():
        try:
            found = ctypes.CDLL(name)
        except OSError:
            continue
        assert [function for function in sorted(called) if not hasattr(found, function)] == []
        return
    pytest.skip("libcudart is not installed: pip install nvidia-cuda-runtime has it")

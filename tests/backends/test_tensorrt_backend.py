"""What the TensorRT backend says where something is missing."""

from types import SimpleNamespace

import pytest
from standins import simulated_tensorrt as device

from dilap import backends
from dilap.backends.tensorrt import builder as tensorrt_build
from dilap.backends.tensorrt import cuda, trtexec
from dilap.backends.tensorrt import runtime as tensorrt
from dilap.backends.tensorrt.builder import Api, layers_of_inspector
from dilap.core.errors import Unavailable

NONE = ("no_such_module",)


@pytest.fixture
def no_python_module(monkeypatch: pytest.MonkeyPatch) -> None:
    find = tensorrt_build.find_api
    monkeypatch.setattr(tensorrt_build, "find_api", lambda: find(NONE))


def test_a_machine_without_a_gpu_says_so_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> cuda.Cuda:
        raise Unavailable("no NVIDIA GPU that CUDA can use here (driver too old); run this on the Jetson")

    monkeypatch.setattr(cuda, "load", none)
    assert str(backends.get("tensorrt").unavailable()).startswith("TensorRT is not usable here: no NVIDIA GPU")


@pytest.mark.usefixtures("no_python_module")
def test_a_gpu_without_tensorrt_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "load", device.HostCuda)
    monkeypatch.setattr(trtexec, "find", lambda: None)
    assert "apt-get install python3-libnvinfer" in str(tensorrt.TensorRT().unavailable())


@pytest.mark.usefixtures("no_python_module")
def test_trtexec_alone_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "load", device.HostCuda)
    monkeypatch.setattr(trtexec, "find", lambda: "/usr/src/tensorrt/bin/trtexec")
    assert tensorrt.TensorRT().unavailable() is None
    assert tensorrt.TensorRT().version().startswith("TensorRT through trtexec")


def test_the_build_names_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "load", device.HostCuda)
    assert tensorrt.TensorRT().build() == device.GPU


@pytest.mark.parametrize(
    ("flags", "expected"),
    [({"EXPLICIT_BATCH": 0, "STRONGLY_TYPED": 1}, 2), ({"STRONGLY_TYPED": 0}, 1), ({}, 0)],
    ids=["TensorRT 10", "TensorRT for RTX", "TensorRT without the flag"],
)
def test_networks_are_strongly_typed_in_every_version(flags: dict[str, int], expected: int) -> None:
    module = SimpleNamespace(__version__="1", NetworkDefinitionCreationFlag=SimpleNamespace(**flags))
    assert Api(module).network_flags == expected


class Config:
    """A builder config that refuses foreign timing caches."""

    def __init__(self) -> None:
        self.cache = b"none"

    def create_timing_cache(self, stored: bytes) -> bytes:
        return stored

    def set_timing_cache(self, cache: bytes, *, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        if cache == b"foreign":
            return False
        self.cache = cache
        return True


@pytest.mark.parametrize(("stored", "used"), [(b"mine", b"mine"), (b"foreign", b""), (b"", b"")])
def test_a_foreign_timing_cache_is_started_anew(stored: bytes, used: bytes) -> None:
    config = Config()
    Api(device.module()).timing_cache_(config, stored)
    assert config.cache == used


def test_layers_are_read_from_the_inspectors_json() -> None:
    text = """{"Layers": [
      {"Name": "_gemm_mha_v2_myl0_5", "LayerType": "kgen",
       "Metadata": "[ONNX Layer: node_MatMul_1]\\u001e[ONNX Layer: node_Softmax_2]\\u001e[ONNX Layer: node_MatMul_3]"},
      {"Name": "lm_head [profile 1]_myl1_9", "LayerType": "gemm", "Metadata": ""}], "Bindings": []}"""
    first, second = layers_of_inspector(text)
    assert first.nodes == ("node_MatMul_1", "node_Softmax_2", "node_MatMul_3")
    assert (first.profile, second.profile) == (0, 1)


def test_an_inspector_without_detail_gives_names() -> None:
    assert [layer.name for layer in layers_of_inspector('{"Layers": ["a", "b"]}')] == ["a", "b"]


def test_what_cannot_be_imported_is_told_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise ImportError("libnvinfer.so.10: cannot open shared object file")

    monkeypatch.setattr("importlib.import_module", broken)
    with pytest.raises(Unavailable, match=r"libnvinfer\.so\.10: cannot open"):
        tensorrt_build.find_api(("tensorrt_broken",))


@pytest.mark.parametrize(
    ("version", "usable"), [("8.6.2", False), ("10.3.0", True), ("10.16.2.10", True), ("11.1.0", True)]
)
def test_old_tensorrt_is_refused(version: str, usable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    find = tensorrt_build.find_api.__wrapped__  # past the cache
    monkeypatch.setattr("importlib.import_module", lambda name: device.module(version))
    if usable:
        assert find().version == f"TensorRT {version}"
    else:
        with pytest.raises(Unavailable, match=r"8\.6\.2 is older than 10\.3"):
            find()

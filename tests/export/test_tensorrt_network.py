"""What is written of image networks for TensorRT: compiled by TensorRT for RTX, run on a simulated device."""

import ctypes
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from numpy.typing import NDArray
from standins import simulated_tensorrt as device
from standins.networks import INPUT, random_pixels
from standins.networks import network as tiny_network

from dilap import export
from dilap.backends.tensorrt import builder as tensorrt_build
from dilap.backends.tensorrt import cuda
from dilap.backends.tensorrt import runtime as tensorrt
from dilap.backends.tensorrt.builder import Api, Built
from dilap.backends.tensorrt.network import EngineNetwork
from dilap.backends.tensorrt.recipe import read_network_recipe
from dilap.core.artifact import Artifact
from dilap.core.codec import encode, write_json
from dilap.core.errors import InvalidInput, Mismatch, Unavailable, Unsupported, VerificationFailed
from dilap.core.sqnr import sqnr_db
from dilap.core.workload import Workload
from dilap.models.network import TorchNetwork

pytest.importorskip("onnxscript", reason="onnxscript is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: it executes simulated engines")

import onnxruntime

from dilap.export.onnx import tensorrt_network as exporter

IMAGES = random_pixels(5)
FORWARD = Workload(phase="forward", precision="f16")


def exported(out: Path, *, precision: str = "f16", name: str = "plain") -> Artifact:
    images = IMAGES if precision == "int8" else None
    return export.get_network("tensorrt").export(
        tiny_network(name), input_=INPUT, precision=precision, images=images, plan_digest="", out=out
    )


def uncompiled(*_: object, **__: object) -> Any:
    raise Unavailable("no TensorRT in this test")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporter, "called", uncompiled)
        exported(out)
    return out


@pytest.mark.parametrize(("precision", "bound"), [("f16", 50), ("int8", 20)])
def test_tensorrt_for_rtx_compiles_networks(precision: str, bound: float, tmp_path: Path) -> None:
    try:
        tensorrt_build.find_api(("tensorrt_rtx_bindings",))
    except Unavailable:
        pytest.skip("TensorRT for RTX is not installed: pip install 'dilap[tensorrt]'")
    artifact = exported(tmp_path / "out", precision=precision)
    assert artifact.sqnr_db is not None
    assert artifact.sqnr_db > bound, f"{artifact.sqnr_db:.1f} dB"
    assert "for SM80, SM86, SM89 (compile_report.json)" in artifact.details["notes"][1]


def test_8_bits_have_no_zero_point_and_no_bias(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporter, "called", uncompiled)
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    artifact = exported(tmp_path / "out", precision="int8")
    graph = onnx.load(tmp_path / "out" / artifact.path).graph
    stored = {one.name: onnx.numpy_helper.to_array(one) for one in graph.initializer}
    quantisers = [node for node in graph.node if node.op_type == "QuantizeLinear"]
    assert len(quantisers) == 2 * 3  # the input and the weights of two convolutions and of the head
    assert all(stored[node.input[2]].dtype == np.int8 and not stored[node.input[2]].any() for node in quantisers)


class Engine:
    """An engine with the inputs and outputs of a network; ONNX Runtime computes."""

    device_memory_size_v2 = 4096

    def __init__(self, path: Path) -> None:
        self._session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        self.addresses: dict[str, int] = {}

    def create_execution_context(self) -> "Engine":
        return self

    def create_engine_inspector(self) -> SimpleNamespace:
        return SimpleNamespace(get_engine_information=lambda _: '{"Layers": [{"Name": "a", "LayerType": "conv"}]}')

    def set_tensor_address(self, name: str, address: int) -> None:
        self.addresses[name] = address

    def execute_async_v3(self, stream: int) -> bool:
        images: NDArray[np.float32] = np.empty(INPUT.shape, np.float32)
        ctypes.memmove(images.ctypes.data, self.addresses["images"], images.nbytes)
        logits = self._session.run(["logits"], {"images": images})[0]
        ctypes.memmove(self.addresses["logits"], logits.ctypes.data, logits.nbytes)
        return True


@pytest.fixture
def pushed(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A network on an Orin with TensorRT 10.3."""

    def build(onnx: Path, profiles: object, **_: object) -> Built:
        return Built(plan=str(onnx).encode(), num_bytes=1, seconds=1.0)

    monkeypatch.setattr(tensorrt_build, "find_api", lambda: Api(device.module()))
    monkeypatch.setattr(tensorrt_build, "build", build)
    monkeypatch.setattr(cuda, "load", device.HostCuda)
    monkeypatch.setattr(tensorrt, "_deserialised", lambda _, plan, __: Engine(Path(bytes(plan).decode())))
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    shutil.copytree(folder, tmp_path / "model")
    return tmp_path / "model" / "model.onnx"


def test_a_device_times_a_network_and_shows_it_images(pushed: Path) -> None:
    network = cast(EngineNetwork, tensorrt.TensorRT().load(pushed, FORWARD))
    assert network.sample() > 0
    sqnr = sqnr_db(TorchNetwork(tiny_network("plain")).outputs(IMAGES), network.outputs(IMAGES))
    assert sqnr > 50, f"{sqnr:.1f} dB"
    network.close()
    network.close()


def test_a_kept_engine_is_used_again(pushed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensorrt.TensorRT().load(pushed, FORWARD).close()
    monkeypatch.setattr(tensorrt_build, "build", None)
    tensorrt.TensorRT().load(pushed, FORWARD).close()


def test_a_miscompiled_engine_is_not_kept(pushed: Path) -> None:
    recipe = read_network_recipe(pushed.parent)
    with np.load(pushed.parent / "reference.npz") as stored:
        np.savez(pushed.parent / "reference.npz", images=stored["images"], logits=stored["logits"][:, ::-1])
    with pytest.raises(VerificationFailed, match="the TensorRT engine differs from the torch model: SQNR"):
        tensorrt.TensorRT().load(pushed, FORWARD)
    assert recipe.bound_db > 0
    assert not list(pushed.parent.glob("engines/*"))


def test_another_file_than_the_recipes_is_refused(pushed: Path) -> None:
    pushed.write_bytes(pushed.read_bytes() + b"x")
    with pytest.raises(Mismatch, match=r"not the file that recipe\.json was written for"):
        tensorrt.TensorRT().load(pushed, FORWARD)


def test_a_network_is_no_decoder_and_has_one_batch(pushed: Path) -> None:
    with pytest.raises(InvalidInput, match="expected a Recipe, got type 'NetworkRecipe'"):
        tensorrt.TensorRT().load(pushed, Workload())
    with pytest.raises(Unsupported, match="takes 1 images at once, and the workload has batch 4"):
        tensorrt.TensorRT().load(pushed, Workload(phase="forward", batch=4))


def test_trtexec_alone_runs_no_networks(pushed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> Api:
        raise Unavailable("no module")

    monkeypatch.setattr(tensorrt_build, "find_api", none)
    monkeypatch.setattr(tensorrt.TensorRT, "version", lambda self: "TensorRT through trtexec 10.3")
    with pytest.raises(Unsupported, match="python3-libnvinfer"):
        tensorrt.TensorRT().load(pushed, FORWARD)


def test_a_damaged_recipe_is_refused(pushed: Path) -> None:
    write_json(pushed.parent / "recipe.json", {**encode(read_network_recipe(pushed.parent)), "shape": "wide"})
    with pytest.raises(InvalidInput, match="damaged NetworkRecipe"):
        tensorrt.TensorRT().load(pushed, FORWARD)

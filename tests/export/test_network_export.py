"""Image networks in the real runtimes, compared with torch."""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from standins.networks import INPUT, random_pixels
from standins.networks import network as tiny_network
from torch import nn

from dilap import backends, export
from dilap.backends import Network
from dilap.core.artifact import Artifact
from dilap.core.codec import decode, read_json
from dilap.core.errors import InvalidInput, Unsupported, VerificationFailed
from dilap.core.images import ImageInput
from dilap.core.sqnr import sqnr_db
from dilap.core.workload import Workload
from dilap.export.graph_of_network import exported_graph
from dilap.models.convolutional.narrowing import Constant
from dilap.models.network import TorchNetwork
from tools.tiny_networks import NUM_CLASSES

if reason := backends.get("onnxruntime").unavailable():
    pytest.skip(reason, allow_module_level=True)
pytest.importorskip("onnxscript", reason="onnxscript is not installed")

IMAGES = random_pixels(5)
FORWARD = Workload(phase="forward", precision="f32")


def exported(
    model: nn.Module, out: Path, *, backend: str = "onnxruntime", precision: str = "f32", input_: ImageInput = INPUT
) -> Artifact:
    if reason := backends.get(backend).unavailable():
        pytest.skip(reason)
    images = None if precision == "f32" else IMAGES
    exporter = export.get_network(backend)
    return exporter.export(model, input_=input_, precision=precision, images=images, plan_digest="p", out=out)


@contextmanager
def opened(folder: Path, artifact: Artifact, *, batch: int = 1) -> Iterator[Network]:
    workload = Workload(phase="forward", precision=artifact.precision, batch=batch)
    session = cast(Any, backends.get(artifact.backend).load(folder / artifact.path, workload))
    with closing(session):
        yield session


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        *((name, "f32") for name in ("plain", "resnet_basic", "mobilenet_v2", "convnext")),
        ("plain", "int8"),
        ("convnext", "int8"),
    ],
)
def test_onnx_runtime_computes_what_torch_does(name: str, precision: str, tmp_path: Path) -> None:
    model = tiny_network(name)
    artifact = exported(model, tmp_path / "model", precision=precision)
    with opened(tmp_path / "model", artifact) as network:
        got = network.outputs(IMAGES)
    sqnr = sqnr_db(TorchNetwork(model).outputs(IMAGES), got)
    assert sqnr > {"f32": 100, "int8": 20}[precision], f"{sqnr:.1f} dB"


@pytest.mark.parametrize(("name", "precision"), [("plain", "int8"), ("resnet_basic", "f32")])
def test_executorch_computes_what_torch_does(name: str, precision: str, tmp_path: Path) -> None:
    model = tiny_network(name)
    artifact = exported(model, tmp_path / "model", backend="executorch", precision=precision)
    with opened(tmp_path / "model", artifact) as network:
        got = network.outputs(IMAGES)
    sqnr = sqnr_db(TorchNetwork(model).outputs(IMAGES), got)
    assert sqnr > {"f32": 100, "int8": 20}[precision], f"{sqnr:.1f} dB"
    assert artifact.details["operators_outside_xnnpack"] == {}


def test_what_a_relu6_clips_gets_its_8_bits_behind_it() -> None:
    """Before it, EfficientNet-Lite0 has 9 dB and not 21."""
    if reason := backends.get("executorch").unavailable():
        pytest.skip(reason)
    from dilap.export.graph_of_network import quietly  # noqa: PLC0415

    with quietly():
        from dilap.export.executorch.lowering import quantised as in_8_bits  # noqa: PLC0415

        graph = in_8_bits(tiny_network("plain"), INPUT, IMAGES).graph
    clips = [node for node in graph.nodes if "hardtanh" in str(node.target) or "relu6" in str(node.target)]
    assert ["conv" in str(clip.args[0].target) for clip in clips] == [True]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Artifact]:
    folder = tmp_path_factory.mktemp("plain") / "model"
    return folder, exported(tiny_network("plain"), folder, input_=ImageInput(channels=3, height=32, width=32, batch=2))


@pytest.fixture(scope="module")
def quantised(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Artifact]:
    folder = tmp_path_factory.mktemp("int8") / "model"
    return folder, exported(tiny_network("plain"), folder, precision="int8")


def test_the_sidecar_says_what_the_file_eats(quantised: tuple[Path, Artifact]) -> None:
    folder, artifact = quantised
    found = decode(Artifact, read_json(folder / "artifact.json"), source="test")
    assert (found, found.input, found.architecture, found.plan_digest) == (artifact, INPUT, None, "p")


def test_batch_norms_are_folded_and_matrices_have_8_bits(quantised: tuple[Path, Artifact]) -> None:
    folder, artifact = quantised
    onnx = pytest.importorskip("onnx")
    stored = {one.name: one.data_type for one in onnx.load(folder / artifact.path).graph.initializer}
    graph = onnx.load(folder / artifact.path).graph
    producers = {output: node for node in graph.node for output in node.output}
    matrices = [producers[node.input[1]] for node in graph.node if node.op_type in ("Conv", "Gemm")]
    assert "BatchNormalization" not in artifact.details["operators"]
    assert {(one.op_type, stored[one.input[0]]) for one in matrices} == {("DequantizeLinear", onnx.TensorProto.INT8)}


def test_the_stock_runtime_runs_the_file(quantised: tuple[Path, Artifact]) -> None:
    import onnxruntime  # noqa: PLC0415

    folder, artifact = quantised
    session = onnxruntime.InferenceSession(str(folder / artifact.path))
    stock = [session.run(["logits"], {"images": one[None]})[0][0] for one in IMAGES]
    with opened(folder, artifact) as network:
        np.testing.assert_array_equal(network.outputs(IMAGES), np.stack(stock))


def test_a_file_names_no_folder_of_this_machine(plain: tuple[Path, Artifact]) -> None:
    folder, artifact = plain
    assert str(Path(__file__).parents[2]).encode() not in (folder / artifact.path).read_bytes()


def test_a_forward_is_timed(plain: tuple[Path, Artifact]) -> None:
    with opened(*plain, batch=2) as network:
        assert min(cast(Any, network).sample() for _ in range(5)) > 0


@pytest.mark.parametrize(("window", "operator"), [(64, "GlobalAveragePool"), (16, "AveragePool")])
def test_an_average_over_more_than_there_is_is_one_over_everything(window: int, operator: str, tmp_path: Path) -> None:
    sides = -(-INPUT.height // window)
    pooling = nn.AvgPool2d(window, ceil_mode=True)
    artifact = exported(nn.Sequential(pooling, nn.Flatten(), nn.Linear(3 * sides**2, 7)).eval(), tmp_path / "out")
    assert artifact.details["operators"][operator] == 1
    assert (artifact.sqnr_db or 0) > 100


def test_what_led_to_a_removed_branch_is_not_computed() -> None:
    class Branched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = Constant(nn.Conv2d(3, 3, 1), (), torch.ones(3))

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = (images + self.last(images.sin())).mean((2, 3))
            return logits

    nodes = {str(node.target): node for node in exported_graph(Branched(), INPUT).graph.nodes}
    assert nodes["aten.add.Tensor"].users
    assert not nodes["aten.sin.default"].users  # exporters leave out what nothing uses


def test_images_that_do_not_fill_a_batch_are_shown_all_the_same(plain: tuple[Path, Artifact]) -> None:
    with opened(*plain, batch=2) as network:
        together, last = network.outputs(IMAGES), network.outputs(IMAGES[4:])
    np.testing.assert_allclose(together[4:], last, atol=1e-6)
    assert together.shape == (len(IMAGES), NUM_CLASSES)


def test_timing_goes_on_after_images_were_shown(plain: tuple[Path, Artifact]) -> None:
    with opened(*plain, batch=2) as network:
        before = network.outputs(IMAGES)
        cast(Any, network).sample()
        np.testing.assert_array_equal(network.outputs(IMAGES), before)


def test_another_batch_than_the_files_is_refused(plain: tuple[Path, Artifact]) -> None:
    folder, artifact = plain
    with pytest.raises(Unsupported, match="takes 2 images at once, and the workload has batch 1"):
        backends.get("onnxruntime").load(folder / artifact.path, FORWARD)


def test_images_of_another_size_are_refused(plain: tuple[Path, Artifact]) -> None:
    with opened(*plain, batch=2) as network, pytest.raises(InvalidInput, match=r"network takes \(3, 32, 32\)"):
        network.outputs(np.zeros((1, 3, 16, 16), np.float32))


def test_a_network_is_no_decoder(plain: tuple[Path, Artifact]) -> None:
    folder, artifact = plain
    with pytest.raises(InvalidInput, match="not a decoder that DiLAP exported"):
        backends.get("onnxruntime").load(folder / artifact.path, Workload(precision="f32"))
    with opened(folder, artifact, batch=2) as network, pytest.raises(Unsupported, match="reads no text"):
        cast(Any, network).logits([1, 2], incremental=False)


def test_llamacpp_refuses_networks_and_says_who_runs_them() -> None:
    with pytest.raises(Unsupported, match="llamacpp runs no image networks; use --backend executorch or"):
        export.get_network("llamacpp")


def test_another_precision_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="onnxruntime runs image networks in f32 and int8, not in 'int4'"):
        exported(tiny_network("plain"), tmp_path / "model", precision="int4")


def test_8_bits_without_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="int8 needs images"):
        export.get_network("onnxruntime").export(
            tiny_network("plain"), input_=INPUT, precision="int8", images=None, plan_digest="", out=tmp_path / "model"
        )


def test_a_module_that_does_not_take_such_images_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="does not take images of 3x32x32") as caught:
        exported(nn.Conv2d(4, 8, 3), tmp_path / "model")
    assert "\n" not in str(caught.value)


def test_a_module_without_logits_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="gives no logits"):
        exported(nn.Conv2d(3, 8, 3), tmp_path / "model")


def test_another_network_than_the_file_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = TorchNetwork(tiny_network("resnet_basic")).outputs(random_pixels(8))
    monkeypatch.setattr(TorchNetwork, "outputs", lambda self, images: expected[: len(images)])
    with pytest.raises(VerificationFailed, match=r"model.onnx in f32 differs from the torch model: SQNR"):
        exported(tiny_network("plain"), tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_model_is_left_as_it_was(tmp_path: Path) -> None:
    model = tiny_network("plain").train()
    model[1].eval()  # type: ignore[index]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    exported(model, tmp_path / "model", precision="int8")
    assert model.training
    assert model[2].training  # type: ignore[index]
    assert not model[1].training  # type: ignore[index]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_model_in_half_precision_is_written_in_f32(tmp_path: Path) -> None:
    model = tiny_network("plain").to(torch.bfloat16)
    artifact = exported(model, tmp_path / "model")
    assert artifact.details["torch_dtype"] == "torch.bfloat16"
    assert model[0].weight.dtype == torch.bfloat16  # type: ignore[index]

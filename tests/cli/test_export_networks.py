"""dilap-export of image networks: classifiers of transformers, a user's own module, and the built-in one."""

import json
import sys
from pathlib import Path

import pytest
from standins.fake_job import call, last_line
from standins.networks import INPUT, network, random_pixels, write_photograph
from transformers import ViTImageProcessorPil

from dilap import backends
from dilap.cli import export
from dilap.core.artifact import Artifact
from dilap.core.codec import decode, file_sha256, read_json
from dilap.job.networks import is_network
from dilap.models.convolutional.load import save_network

if reason := backends.get("onnxruntime").unavailable():
    pytest.skip(reason, allow_module_level=True)
pytest.importorskip("onnxscript", reason="onnxscript is not installed")
pytest.importorskip("PIL", reason="Pillow is not installed")


@pytest.fixture
def classifier(tmp_path: Path) -> Path:
    """The folder of an image classifier that says how it is fed."""
    folder = tmp_path / "resnet"
    save_network(network("resnet_basic"), folder)
    processor = ViTImageProcessorPil(size={"height": 32, "width": 32}, image_mean=[0.5] * 3, image_std=[0.25] * 3)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    for number in range(4):
        write_photograph(tmp_path / "photos" / f"class {number % 2}" / f"{number}.png", seed=number)
    return tmp_path / "photos"


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a user's own module."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "plain_module.py").write_text(
        "from standins.networks import network\n\ndef build():\n    return network('plain')\n"
    )
    monkeypatch.syspath_prepend(tmp_path / "code")
    monkeypatch.delitem(sys.modules, "plain_module", raising=False)
    return "plain_module:build"


def sidecar(folder: Path) -> Artifact:
    artifact = decode(Artifact, read_json(folder / "artifact.json"), source=str(folder))
    assert artifact.sha256 == file_sha256(folder / artifact.path)
    return artifact


def test_a_classifier_is_exported_with_its_own_preprocessing(classifier: Path) -> None:
    assert call(export.main, "--backend", "onnxruntime", classifier) == 0
    artifact = sidecar(classifier.with_name("resnet-onnxruntime-f32"))
    assert artifact.sqnr_db is not None
    assert artifact.sqnr_db > 100, f"{artifact.sqnr_db:.1f} dB"
    assert artifact.input is not None
    assert artifact.input.preprocessing is not None
    assert (str(artifact.input), artifact.input.preprocessing.resize) == ("3x32x32", (32, 32))
    assert artifact.input.preprocessing.std == pytest.approx((0.25 * 255,) * 3)


def test_another_size_is_resized_in_proportion(classifier: Path, tmp_path: Path) -> None:
    assert (
        call(export.main, "--backend", "onnxruntime", "--input", "3x48x48", "--out", tmp_path / "out", classifier) == 0
    )
    found = sidecar(tmp_path / "out").input
    assert found is not None
    assert found.preprocessing is not None
    assert (str(found), found.preprocessing.resize) == ("3x48x48", (48, 48))


def test_photographs_say_the_ranges_of_8_bits(classifier: Path, photographs: Path, tmp_path: Path) -> None:
    given = ["--precision", "int8", "--calib", photographs, "--out", tmp_path / "out"]
    assert call(export.main, "--backend", "onnxruntime", *given, classifier) == 0
    artifact = sidecar(tmp_path / "out")
    assert artifact.details["operators"]["QuantizeLinear"] > 0
    assert artifact.sqnr_db is not None
    assert artifact.sqnr_db > 15, f"{artifact.sqnr_db:.1f} dB"


def test_a_users_own_module_is_exported(own: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert call(export.main, "--backend", "onnxruntime", "--input", INPUT, own) == 0
    assert sidecar(tmp_path / "plain_module-build-onnxruntime-f32").input is not None


def test_a_users_own_module_is_fed_by_the_processor_that_is_given(
    own: str, classifier: Path, photographs: Path, tmp_path: Path
) -> None:
    given = ["--precision", "int8", "--calib", photographs, "--processor", classifier, "--out", tmp_path / "out"]
    assert call(export.main, "--backend", "onnxruntime", *given, own) == 0
    found = sidecar(tmp_path / "out").input
    assert found is not None
    assert found.preprocessing is not None


def test_stock_onnx_runtime_computes_what_transformers_does(classifier: Path, tmp_path: Path) -> None:
    """Without any of our code."""
    import onnxruntime  # noqa: PLC0415
    import torch  # noqa: PLC0415
    from transformers import AutoModelForImageClassification  # noqa: PLC0415

    assert call(export.main, "--backend", "onnxruntime", "--out", tmp_path / "out", classifier) == 0
    images = random_pixels(1)
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(["logits"], {"images": images})
    with torch.no_grad():
        expected = AutoModelForImageClassification.from_pretrained(classifier).eval()(torch.from_numpy(images)).logits
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--backend", "llamacpp"], "llamacpp runs no image networks; use --backend executorch or"),
        (["--backend", "onnxruntime", "--precision", "int8"], "give a folder as --calib"),
        (["--backend", "onnxruntime", "--precision", "int4"], "runs image networks in f32 and int8, not in 'int4'"),
        (
            ["--backend", "onnxruntime", "--precision", "head=f32"],
            "--precision PART= does not apply to the image network",
        ),
        (["--backend", "onnxruntime", "--vocabulary", "x"], "--vocabulary does not apply to the image network"),
        (["--backend", "onnxruntime", "--input", "224"], "write channels, height and width: 3x224x224"),
        (["--backend", "onnxruntime", "--processor", "nowhere"], "nowhere has no preprocessor_config.json"),
    ],
)
def test_what_does_not_apply_to_a_network_is_refused(
    given: list[str], words: str, classifier: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(export.main, *given, classifier) == 2
    assert words in last_line(capsys)


def test_a_decoder_takes_no_photographs(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(export.main, "--backend", "llamacpp", "--calib", "photos", checkpoint) == 2
    assert "--calib does not apply to" in last_line(capsys)


def test_a_decoder_is_no_image_classifier(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(export.main, "--backend", "onnxruntime", "--input", "3x32x32", checkpoint) == 2
    assert "transformers has no image classifier of the type" in last_line(capsys)


def test_networks_are_told_apart_from_decoders(classifier: Path, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text(json.dumps({"architectures": None}))
    names = [str(classifier), "efficientnet-lite0", "my_module:build", str(checkpoint), str(tmp_path / "odd"), "a/b"]
    assert [is_network(name) for name in names] == [True, True, True, False, False, False]

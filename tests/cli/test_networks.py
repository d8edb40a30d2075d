"""dilap-export and dilap-eval of image networks: classifiers of transformers, and a user's own module."""

import json
import re
import sys
from pathlib import Path

import pytest
from standins.cards import head_of, text_of
from standins.fake_job import call, last_line
from standins.networks import INPUT, network, random_pixels, write_photograph
from transformers import ViTImageProcessorPil

from dilap import backends
from dilap.cli import eval as evaluation
from dilap.cli import export
from dilap.core.artifact import Artifact
from dilap.core.codec import decode, file_sha256, read_json
from dilap.core.images import ImageInput
from dilap.evaluation.document import ImageEvaluation
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
    assert isinstance(artifact.input, ImageInput)
    assert artifact.input.preprocessing is not None
    assert (str(artifact.input), artifact.input.preprocessing.resize) == ("3x32x32", (32, 32))
    assert artifact.input.preprocessing.std == pytest.approx((0.25 * 255,) * 3)


def test_a_card_says_where_the_exported_classifier_comes_from(classifier: Path, tmp_path: Path) -> None:
    (classifier / "README.md").write_text("---\nlicense: apache-2.0\nbase_model: people/resnet\n---\n")
    assert call(export.main, "--backend", "onnxruntime", "--out", tmp_path / "out", classifier) == 0
    head, text = head_of(tmp_path / "out"), text_of(tmp_path / "out")
    assert (head.license, head.base_model, head.pipeline_tag) == (
        "apache-2.0",
        ["people/resnet"],
        "image-classification",
    )
    assert "command: `dilap-export --backend onnxruntime --precision f32 resnet`" in text
    assert "onnxruntime.InferenceSession(" in text


def test_another_size_is_resized_in_proportion(classifier: Path, tmp_path: Path) -> None:
    assert (
        call(export.main, "--backend", "onnxruntime", "--input", "3x48x48", "--out", tmp_path / "out", classifier) == 0
    )
    found = sidecar(tmp_path / "out").input
    assert isinstance(found, ImageInput)
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
    assert isinstance(found, ImageInput)
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
        (["--backend", "onnxruntime", "--input", "224"], "takes images, and not 224 tokens"),
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


@pytest.fixture
def exported(classifier: Path) -> Path:
    assert call(export.main, "--backend", "onnxruntime", classifier) == 0
    return classifier.with_name("resnet-onnxruntime-f32")


def label_(photographs: Path, classifier: Path) -> None:
    """Put photographs into the folders of the classes that a classifier prefers; of the last one, of another."""
    from dilap.evaluation.image_subject import open_image_subject  # noqa: PLC0415
    from dilap.models.images import read_images  # noqa: PLC0415

    subject = open_image_subject(str(classifier))
    images = read_images(str(photographs), labelled=False)
    preferred = subject.network.outputs(images.all_pixels(subject.input)).argmax(1).tolist()
    preferred[-1] = (preferred[-1] + 1) % 7
    for picture, label in zip(images.pictures, preferred, strict=True):
        (photographs / str(label)).mkdir(exist_ok=True)
        (photographs / picture.name).rename(photographs / str(label) / Path(picture.name).name)
    for folder in photographs.glob("class *"):
        folder.rmdir()


def test_an_artifact_is_shown_photographs_beside_the_dense_network(
    exported: Path, classifier: Path, photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    label_(photographs, classifier)
    given = ["--images", photographs, "--reference", classifier, "--out", tmp_path / "kept.json"]
    assert call(evaluation.main, exported, *given) == 0
    found = decode(ImageEvaluation, read_json(tmp_path / "kept.json"), source="kept.json")
    assert (found.backend, found.precision, found.digest) == ("onnxruntime", "f32", sidecar(exported).sha256)
    assert (found.quality.top1, found.quality.reference_top1, found.quality.agreement) == (0.75, 0.75, 1.0)
    assert found.quality.kl == pytest.approx(0, abs=1e-6)
    assert re.search(r"top-1 75\.0% \[[\d.]+%, [\d.]+%\] \(75\.0% of ", capsys.readouterr().out)


def test_a_classifier_in_torch_needs_no_reference(
    classifier: Path, photographs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    label_(photographs, classifier)
    assert call(evaluation.main, classifier, "--images", photographs, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["backend"], found["quality"]["top1"], found["quality"]["kl"]) == ("torch", 0.75, None)


def test_photographs_without_labels_need_a_reference(
    classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_photograph(tmp_path / "unlabelled" / "0.png")
    assert call(evaluation.main, classifier, "--images", tmp_path / "unlabelled") == 2
    assert "no photograph has a label; give labels, or a --reference" in last_line(capsys)


def test_a_damaged_artifact_is_not_scored(
    exported: Path, photographs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (exported / "model.onnx").open("ab") as file:
        file.write(b"x")
    assert call(evaluation.main, exported, "--images", photographs) == 2
    assert "is of another model than" in last_line(capsys)


def test_texts_and_photographs_are_for_different_models(
    exported: Path, photographs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"--tasks": "piqa", "--costs": "", "--precision": "f16", "--limit": "3"}.items():
        assert call(evaluation.main, exported, "--images", photographs, name, *filter(None, [value])) == 2
        assert f"{name} does not apply to an image network" in last_line(capsys)
    assert call(evaluation.main, exported, "--reference", exported) == 2
    assert "is no decoder, and one is needed here" in last_line(capsys)

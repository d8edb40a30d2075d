"""What image networks take, as values."""

import pytest

from dilap.core.artifact import Artifact
from dilap.core.codec import decode, encode
from dilap.core.errors import InvalidInput, Unsupported
from dilap.core.images import ImageInput, Preprocessing

PREPROCESSING = Preprocessing(resize=(256,), mean=(127.0,) * 3, std=(128.0,) * 3)
INPUT = ImageInput(channels=3, height=224, width=192, batch=4, preprocessing=PREPROCESSING)


def artifact(**changes: object) -> Artifact:
    fields = {
        "path": "model.onnx", "format": "onnx", "backend": "onnxruntime", "precision": "int8", "plan_digest": "",
        "architecture": None, "input": INPUT, "sha256": "0", "num_bytes": 1, "sqnr_db": 20.0,
    }  # fmt: skip
    return Artifact(**fields | changes)  # type: ignore[arg-type]


def test_a_size_is_parsed() -> None:
    found = ImageInput.parse("3x224x192")
    assert (found.shape, str(found), found.preprocessing) == ((1, 3, 224, 192), "3x224x192", None)


@pytest.mark.parametrize("text", ["224", "3x224", "3x0x224", "3x224x224x1", "3x99999x224", "axbxc", "1e3x2x2"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput, match="input"):
        ImageInput.parse(text)


def test_a_networks_sidecar_survives_a_round_trip() -> None:
    assert decode(Artifact, encode(artifact()), source="test") == artifact()


def test_a_sidecar_of_before_networks_is_read() -> None:
    from standins.fabricated import tiny_llama  # noqa: PLC0415

    document = encode(artifact(architecture=tiny_llama(), input=None)) | {"version": 1}
    del document["input"]
    assert decode(Artifact, document, source="test").decoder == tiny_llama()


def test_a_network_has_no_decoders_architecture() -> None:
    with pytest.raises(Unsupported, match="is no decoder, and one is needed here"):
        _ = artifact().decoder


def test_an_artifact_is_of_a_decoder_or_a_network() -> None:
    with pytest.raises(ValueError, match="architecture of a decoder or the input of another network"):
        artifact(input=None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"resize": (1, 2, 3)}, "one side or to height and width"),
        ({"resize": ()}, "one side or to height and width"),
        ({"std": (1.0, 0.0, 1.0)}, "positive std"),
        ({"mean": (1.0,)}, "for every channel"),
    ],
)
def test_a_wrong_preprocessing_is_refused(change: dict[str, tuple[float, ...]], message: str) -> None:
    fields = {"resize": (256,), "mean": (127.0,) * 3, "std": (128.0,) * 3}
    with pytest.raises(ValueError, match=message):
        Preprocessing(**fields | change)  # type: ignore[arg-type]


def test_means_are_of_as_many_channels_as_the_input_has() -> None:
    with pytest.raises(ValueError, match="1 channels, but means of 3"):
        ImageInput(channels=1, height=8, width=8, preprocessing=PREPROCESSING)

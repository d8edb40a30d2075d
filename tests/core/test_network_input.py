"""What encoders of texts take, as it is written on a command line and in files."""

import pytest

from dilap.core.artifact import Artifact
from dilap.core.codec import decode, encode
from dilap.core.errors import InvalidInput
from dilap.core.images import ImageInput
from dilap.core.network_input import NetworkInput, TokenInput, input_names, of_images, parse_input


def artifact(input_: NetworkInput) -> Artifact:
    return Artifact(
        path="model.onnx",
        format="onnx",
        backend="onnxruntime",
        precision="f32",
        plan_digest="",
        architecture=None,
        sha256="",
        num_bytes=1,
        sqnr_db=None,
        input=input_,
    )


def test_a_number_is_tokens_and_three_are_an_image() -> None:
    assert parse_input(" 128") == TokenInput(length=128)
    assert parse_input("3x24x32") == ImageInput(channels=3, height=24, width=32)
    assert (str(parse_input("128")), str(parse_input("3x24x32"))) == ("128 tokens", "3x24x32")


@pytest.mark.parametrize("text", ["0", "99999999", "-3", "12 tokens", ""])
def test_what_is_neither_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput, match="input"):
        parse_input(text)


def test_the_arrays_of_a_batch_are_those_of_transformers() -> None:
    input_ = TokenInput(length=16, batch=2)
    assert (input_.shape, input_.size) == ((2, 3, 16), (3, 16))
    assert input_names(input_) == ("input_ids", "attention_mask", "token_type_ids")
    assert input_names(ImageInput.parse("3x8x8")) == ("images",)


@pytest.mark.parametrize("input_", [TokenInput(length=16), ImageInput(channels=3, height=8, width=8, batch=2)])
def test_a_sidecar_tells_images_from_texts(input_: NetworkInput) -> None:
    assert decode(Artifact, encode(artifact(input_)), source="test").input == input_


def test_an_input_that_is_neither_is_damaged() -> None:
    document = encode(artifact(TokenInput(length=16)))
    document["input"] = {"length": 16, "height": 3}
    with pytest.raises(InvalidInput, match="input"):
        decode(Artifact, document, source="test")


def test_an_encoder_of_texts_is_shown_no_images() -> None:
    with pytest.raises(InvalidInput, match="mine takes texts of 16 tokens, and is shown no images"):
        of_images(TokenInput(length=16), name="mine")

"""The code of cards that runs networks in ExecuTorch; that of the other runtimes is run on finished jobs."""

from pathlib import Path
from typing import Any

import pytest
from standins import encoders
from standins.networks import INPUT, network

from dilap import backends, export
from dilap.core.images import ImageInput, Preprocessing
from dilap.core.network_input import NetworkInput, TokenInput
from dilap.job import loading

IN_EXECUTORCH = pytest.mark.filterwarnings(
    "ignore:::torch", "ignore:::torchao", "ignore:::executorch", "ignore:::copyreg"
)


def outputs_of_code(model: Any, input_: NetworkInput, folder: Path) -> Any:
    """Export a network, and run the code of its card in its folder."""
    if reason := backends.get("executorch").unavailable():
        pytest.skip(reason)
    artifact = export.get_network("executorch").export(
        model, input_=input_, precision="f32", images=None, plan_digest="", out=folder / "out"
    )
    if isinstance(input_, TokenInput):
        encoders.write_tokenizer(folder / "out")
    variables: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder / "out")
        exec(loading.of_artifact(artifact), variables)
    return variables["outputs"]


@IN_EXECUTORCH
def test_images_are_classified(tmp_path: Path) -> None:
    assert outputs_of_code(network("lite"), INPUT, tmp_path).shape == (1, 7)


@IN_EXECUTORCH
def test_texts_are_embedded(tmp_path: Path) -> None:
    assert outputs_of_code(encoders.encoder(), encoders.INPUT, tmp_path).shape == (1, 32)


@pytest.mark.parametrize(
    ("input_", "words"),
    [
        (TokenInput(length=12, batch=2), "a batch of 2, each a text of 12 tokens; a shorter one is filled"),
        (ImageInput(channels=3, height=32, width=24), "each an image of 3x32x24 in f32; how photographs become that"),
        (INPUT, "resized to a shorter side of 36 (bicubic), its middle is taken"),
        (
            ImageInput(
                channels=1,
                height=8,
                width=8,
                preprocessing=Preprocessing(resize=(8, 9), mean=(0.0,), std=(255.0,), resample="bilinear"),
            ),
            "resized to 8x9 (bilinear), its middle is taken, and of values from 0 to 255 every channel becomes "
            "(value - mean) / std with the means 0 and the stds 255",
        ),
    ],
)
def test_an_input_is_said_in_words(input_: NetworkInput, words: str) -> None:
    assert words in loading.input_in_words(input_)

"""Encoders of texts and of images in the real runtimes, compared with torch."""

from contextlib import closing
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from standins.encoders import INPUT, encoder, shape, texts
from standins.networks import INPUT as IMAGE
from standins.networks import network, random_pixels
from torch import nn

from dilap import backends, export
from dilap.core.artifact import Artifact
from dilap.core.codec import decode, read_json
from dilap.core.network_input import TokenInput
from dilap.core.plan import Plan, full_plan
from dilap.core.sqnr import sqnr_db
from dilap.core.workload import Workload
from dilap.models.convolutional.cut import shrink_network_
from dilap.models.network import TorchNetwork

if reason := backends.get("onnxruntime").unavailable():
    pytest.skip(reason, allow_module_level=True)
pytest.importorskip("onnxscript", reason="onnxscript is not installed")

TEXTS = cast(NDArray[np.int64], texts(5).numpy())  # of 12 tokens and fewer: all but the first are padded


def pruned() -> nn.Module:
    """Unequal widths, a layer without attention and one without a feed-forward network."""
    kept = {"encoder.layer.0.heads": (1, 3), "encoder.layer.0.channels": (), "encoder.layer.1.heads": ()}
    made = Plan(base="", architecture=shape(), kept=full_plan(shape(), base="").kept | kept)
    return shrink_network_(encoder(), made)


def exported(
    model: nn.Module, out: Path, *, backend: str = "onnxruntime", precision: str = "f32", input_: TokenInput = INPUT
) -> Artifact:
    if reason := backends.get(backend).unavailable():
        pytest.skip(reason)
    images = None if precision == "f32" else TEXTS
    exporter = export.get_network(backend)
    return exporter.export(model, input_=input_, precision=precision, images=images, plan_digest="", out=out)


def shown(folder: Path, artifact: Artifact, examples: NDArray[Any], *, batch: int = 1) -> NDArray[np.float32]:
    workload = Workload(phase="forward", precision=artifact.precision, batch=batch)
    session = cast(Any, backends.get(artifact.backend).load(folder / artifact.path, workload))
    with closing(session):
        assert session.sample() > 0
        return cast(NDArray[np.float32], session.outputs(examples))


@pytest.mark.parametrize("backend", ["onnxruntime", "executorch"])
@pytest.mark.parametrize(("precision", "bound"), [("f32", 100), ("int8", 15)])
def test_a_runtime_computes_the_embeddings_that_torch_does(
    backend: str, precision: str, bound: float, tmp_path: Path
) -> None:
    model = pruned()
    artifact = exported(model, tmp_path / "model", backend=backend, precision=precision)
    sqnr = sqnr_db(TorchNetwork(model).outputs(TEXTS), shown(tmp_path / "model", artifact, TEXTS))
    assert sqnr > bound, f"{sqnr:.1f} dB"


@pytest.mark.parametrize(("backend", "name"), [("onnxruntime", "deit"), ("executorch", "vit")])
def test_encoders_of_images_are_exported_as_other_classifiers_are(backend: str, name: str, tmp_path: Path) -> None:
    if reason := backends.get(backend).unavailable():
        pytest.skip(reason)
    model, images = network(name), random_pixels(3)
    artifact = export.get_network(backend).export(
        model, input_=IMAGE, precision="f32", images=None, plan_digest="", out=tmp_path / "model"
    )
    sqnr = sqnr_db(TorchNetwork(model).outputs(images), shown(tmp_path / "model", artifact, images))
    assert sqnr > 100, f"{sqnr:.1f} dB"


def test_a_classifier_of_texts_gives_logits(tmp_path: Path) -> None:
    model = encoder("classifier")
    artifact = exported(model, tmp_path / "model")
    assert shown(tmp_path / "model", artifact, TEXTS).shape == (5, 3)


def test_the_stock_runtime_takes_what_a_tokenizer_gives(tmp_path: Path) -> None:
    import onnxruntime  # noqa: PLC0415

    artifact = exported(encoder(), tmp_path / "model", input_=TokenInput(length=12, batch=5))
    session = onnxruntime.InferenceSession(str(tmp_path / "model" / artifact.path))
    names = ("input_ids", "attention_mask", "token_type_ids")
    arrays = {name: np.ascontiguousarray(TEXTS[:, index]) for index, name in enumerate(names)}
    stock = session.run(["sentence_embedding"], arrays)[0]
    np.testing.assert_array_equal(shown(tmp_path / "model", artifact, TEXTS, batch=5), stock)


def test_a_padded_text_has_the_embedding_of_the_text_alone(tmp_path: Path) -> None:
    model = encoder()
    artifact = exported(model, tmp_path / "model")
    found = shown(tmp_path / "model", artifact, TEXTS)
    alone = [TorchNetwork(model).outputs(one[None, :, : one[1].sum()])[0] for one in TEXTS]
    np.testing.assert_allclose(found, np.stack(alone), atol=1e-5)


def test_the_sidecar_says_how_many_tokens_the_file_takes(tmp_path: Path) -> None:
    artifact = exported(encoder(), tmp_path / "model")
    found = decode(Artifact, read_json(tmp_path / "model" / "artifact.json"), source="test")
    assert found == artifact
    assert found.input == INPUT


def test_nothing_is_computed_for_sublayers_that_are_gone(tmp_path: Path) -> None:
    products = ("MatMul", "Gemm", "Softmax")
    dense, narrow = (exported(one, tmp_path / str(index)) for index, one in enumerate((encoder(), pruned())))
    counts = [sum(one.details["operators"].get(name, 0) for name in products) for one in (dense, narrow)]
    # Two layers of four products, two of attention and a softmax, and two of the feed-forward network.
    assert counts == [18, 9]


def test_a_length_that_the_model_has_no_positions_for_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="does not take tokens of 3x40") as caught:
        exported(encoder(), tmp_path / "model", input_=TokenInput(length=40))
    assert "\n" not in str(caught.value)
    assert torch.is_grad_enabled()

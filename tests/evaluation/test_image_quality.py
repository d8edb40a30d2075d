"""Quality of image networks on photographs."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from standins.networks import INPUT, write_photograph
from standins.networks import network as tiny_network

from dilap import backends, export
from dilap.backends.readers import open_network
from dilap.core.errors import Mismatch, Unavailable, Unsupported
from dilap.evaluation.image_quality import compare_on_images, image_quality
from dilap.models.images import ImageSet, Picture, read_images
from dilap.models.network import TorchNetwork


def images_of(labels: tuple[int, ...] | None, count: int = 4) -> ImageSet:
    pictures = tuple(Picture(name=str(number), content=lambda: b"") for number in range(count))
    return ImageSet(name="four", pictures=pictures, labels=labels)


def logits(*preferred: int, num_classes: int = 8) -> NDArray[np.float32]:
    """Logits that fall from a preferred class on, around the circle of classes."""
    rows = [np.roll(-np.arange(num_classes, dtype=np.float32), one) for one in preferred]
    return np.stack(rows)


def test_top_1_top_5_and_agreement_are_counted() -> None:
    found = image_quality(logits(0, 1, 2, 3), logits(0, 1, 2, 4), images_of((0, 5, 7, 4)))
    assert (found.top1, found.top5, found.agreement) == (1 / 4, 3 / 4, 3 / 4)
    assert (found.reference_top1, found.reference_top5) == (2 / 4, 3 / 4)


def test_kl_is_from_the_dense_network_in_nats_an_image() -> None:
    p, q = np.array([0.5, 0.25, 0.25]), np.array([0.25, 0.5, 0.25])
    found = image_quality(np.log(q)[None].astype(np.float32), np.log(p)[None].astype(np.float32), images_of(None, 1))
    assert found.kl == pytest.approx(0.25 * np.log(2), rel=1e-5)  # 0.5 log 2 - 0.25 log 2


def test_without_labels_no_accuracy_is_claimed() -> None:
    found = image_quality(logits(0, 1, 2, 3), logits(0, 1, 2, 3), images_of(None))
    assert (found.top1, found.top5, found.reference_top1, found.kl) == (None, None, None, 0.0)


def test_networks_of_other_classes_are_a_mismatch() -> None:
    with pytest.raises(Mismatch, match="logits of 8 and 9"):
        image_quality(logits(0), logits(0, num_classes=9), images_of(None, 1))


def test_a_runtime_and_torch_are_shown_the_same_photographs(tmp_path: Path) -> None:
    pytest.importorskip("PIL", reason="Pillow is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    if reason := backends.get("onnxruntime").unavailable():
        pytest.skip(reason)
    for number in range(5):
        write_photograph(tmp_path / "photos" / f"class {number % 2}" / f"{number}.png", seed=number)
    images = read_images(str(tmp_path / "photos"), num_classes=2)
    model = tiny_network("plain")
    artifact = export.get_network("onnxruntime").export(
        model, input_=INPUT, precision="int8", images=images.all_pixels(INPUT), plan_digest="", out=tmp_path / "model"
    )
    network = open_network("onnxruntime", tmp_path / "model" / artifact.path, threads=1)
    shown: list[int] = []
    found = compare_on_images(network, TorchNetwork(model), images, input_=INPUT, progress=shown.append)
    network.close()
    assert (sum(shown), found.num_images, found.images_sha256) == (5, 5, images.sha256)
    assert found.kl is not None
    assert 0 < found.kl < 0.05
    assert found.top1 is not None


def test_a_runtime_without_networks_is_refused() -> None:
    with pytest.raises((Unsupported, Unavailable)):
        open_network("llamacpp", Path("model.gguf"), threads=1)

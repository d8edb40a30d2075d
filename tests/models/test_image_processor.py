"""What transformers' image processors do, as plain numbers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from standins.networks import write_photograph

pytest.importorskip("PIL", reason="Pillow is not installed: pip install 'dilap[images]'")
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.convnext.image_processing_pil_convnext import ConvNextImageProcessorPil
from transformers.models.efficientnet.image_processing_pil_efficientnet import EfficientNetImageProcessorPil
from transformers.models.mobilenet_v2.image_processing_pil_mobilenet_v2 import MobileNetV2ImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from dilap.core.errors import InvalidInput, Unsupported
from dilap.models.image_processor import read_preprocessing
from dilap.models.images import pillow, read_images

PROCESSORS = [
    BitImageProcessorPil(),
    ConvNextImageProcessorPil(size={"shortest_edge": 224}),
    ConvNextImageProcessorPil(size={"shortest_edge": 384}),
    EfficientNetImageProcessorPil(),  # divides by std twice
    EfficientNetImageProcessorPil(rescale_offset=True, rescale_factor=1 / 127.5, include_top=False),
    MobileNetV2ImageProcessorPil(),
    ViTImageProcessorPil(),
]


@pytest.mark.parametrize("processor", PROCESSORS, ids=lambda one: f"{type(one).__name__}-{one.size}")
def test_photographs_become_what_the_processor_makes_of_them(processor: Any, tmp_path: Path) -> None:
    processor.save_pretrained(tmp_path / "model")
    path = write_photograph(tmp_path / "photos" / "one.png", height=300, width=431)
    input_ = read_preprocessing(tmp_path / "model")
    assert input_ is not None
    assert input_.preprocessing is not None
    expected = np.array(processor(pillow().open(path))["pixel_values"][0])
    found = read_images(str(path.parent)).all_pixels(input_)[0]
    step = 1 / np.array(input_.preprocessing.std)[:, None, None]  # of 255; resized values are rounded to whole steps
    assert float((np.abs(found - expected) / step).max()) < 1.01


def test_a_processor_that_pads_instead_is_unsupported(tmp_path: Path) -> None:
    BitImageProcessorPil(do_resize=False, do_center_crop=True).save_pretrained(tmp_path)
    with pytest.raises(Unsupported, match="does not resize to one size"):
        read_preprocessing(tmp_path)


def test_a_model_without_a_processor_has_no_preprocessing(tmp_path: Path) -> None:
    assert read_preprocessing(tmp_path) is None


def test_damaged_settings_are_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(InvalidInput, match="transformers cannot read it") as caught:
        read_preprocessing(tmp_path)
    assert "\n" not in str(caught.value)

"""Tiny image networks with random weights, and photographs that are made here."""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
)

from dilap.core.images import ImageInput, Preprocessing

NUM_CLASSES = 10
PREPROCESSING = Preprocessing(resize=(36,), mean=(127.0, 120.0, 100.0), std=(128.0, 64.0, 64.0))
INPUT = ImageInput(channels=3, height=32, width=32, preprocessing=PREPROCESSING)


def plain_network() -> nn.Module:
    """Convolutions of all kinds: with a batch norm, depthwise, with a bias; no transformers around them."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU6(),
        nn.Conv2d(8, 8, 3, groups=8, padding=1),
        nn.BatchNorm2d(8),
        nn.Hardswish(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, NUM_CLASSES),
    )


def resnet() -> nn.Module:
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    model: nn.Module = ResNetForImageClassification(ResNetConfig(**sizes, num_labels=NUM_CLASSES))
    return model


def mobilenet() -> nn.Module:
    config = MobileNetV2Config(depth_multiplier=0.25, image_size=32, num_labels=NUM_CLASSES)
    model: nn.Module = MobileNetV2ForImageClassification(config)
    return model


def convnext() -> nn.Module:
    sizes = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "patch_size": 2}
    model: nn.Module = ConvNextForImageClassification(ConvNextConfig(**sizes, num_labels=NUM_CLASSES))
    return model


NETWORKS: Mapping[str, Callable[[], nn.Module]] = {
    "plain": plain_network,
    "resnet": resnet,
    "mobilenet": mobilenet,
    "convnext": convnext,
}


@torch.no_grad()
def tiny_network(name: str = "plain") -> nn.Module:
    """A network whose batch norms change what they get, and whose signals do not fade, as in trained ones."""
    torch.manual_seed(0)
    model = NETWORKS[name]().eval()
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
    return model


def random_pixels(count: int, *, seed: int = 1) -> NDArray[np.float32]:
    """Preprocessed images of noise."""
    return np.random.default_rng(seed).standard_normal((count, 3, 32, 32), np.float32)


def write_photograph(path: Path, *, seed: int = 0, height: int = 40, width: int = 60) -> Path:
    """Write a file of coloured noise."""
    from PIL import Image  # noqa: PLC0415

    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)
    return path

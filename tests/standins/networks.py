"""Tiny networks of convolutions with random weights, for images of 32 x 32, and photographs that are made here."""

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from dilap.core.graph import Network
from dilap.core.images import ImageInput, Preprocessing
from dilap.models.convolutional.network import traced
from dilap.models.convolutional.proof import stand_in
from dilap.models.network import outputs_of
from tools.tiny_networks import (
    NUM_CLASSES,
    bottleneck,
    convnext,
    deit,
    efficientnet,
    mobilenet,
    regnet,
    resnet,
    vit,
)

PREPROCESSING = Preprocessing(resize=(36,), mean=(127.0, 120.0, 100.0), std=(128.0, 64.0, 64.0))
INPUT = ImageInput(channels=3, height=32, width=32, preprocessing=PREPROCESSING)
INPUT_SIZE = INPUT.size


def plain() -> nn.Module:
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


class InvertedResidual(nn.Module):
    """A block of EfficientNet-Lite: expansion, depthwise convolution, projection; ReLU6, no squeeze and excitation."""

    def __init__(self, inputs: int, outputs: int, *, stride: int) -> None:
        super().__init__()
        self.expand, self.expand_norm = nn.Conv2d(inputs, 4 * inputs, 1, bias=False), nn.BatchNorm2d(4 * inputs)
        self.depthwise = nn.Conv2d(4 * inputs, 4 * inputs, 3, stride, 1, groups=4 * inputs, bias=False)
        self.norm = nn.BatchNorm2d(4 * inputs)
        self.project, self.project_norm = nn.Conv2d(4 * inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        self.has_shortcut = stride == 1 and inputs == outputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = nn.functional.relu6(self.expand_norm(self.expand(x)))
        inner = nn.functional.relu6(self.norm(self.depthwise(inner)))
        inner = self.project_norm(self.project(inner))
        made: torch.Tensor = inner + x if self.has_shortcut else inner
        return made


class Lite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8)
        self.blocks = nn.Sequential(
            InvertedResidual(8, 8, stride=1), InvertedResidual(8, 16, stride=2), InvertedResidual(16, 16, stride=1)
        )
        self.head = nn.Linear(16, NUM_CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.blocks(nn.functional.relu6(self.stem_norm(self.stem(x))))
        logits: torch.Tensor = self.head(features.mean((2, 3)))
        return logits


class UNet(nn.Module):
    """Down twice and up twice; what comes up is concatenated with what went down."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 12, 3, stride=2, padding=1)
        self.third = nn.Conv2d(12, 16, 3, stride=2, padding=1)
        self.up_second, self.up_first = nn.ConvTranspose2d(16, 12, 2, stride=2), nn.ConvTranspose2d(20, 8, 2, stride=2)
        self.after_second, self.after_first = nn.Conv2d(24, 20, 3, padding=1), nn.Conv2d(16, 10, 3, padding=1)
        self.out = nn.Conv2d(10, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = self.first(x).relu()
        second = self.second(first).relu()
        up = self.up_second(self.third(second).relu())
        up = self.up_first(self.after_second(torch.cat([up, second], 1)).relu())
        mask: torch.Tensor = self.out(self.after_first(torch.cat([up, first], 1)).relu())
        return mask


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "plain": plain,
    "resnet_basic": resnet,
    "resnet_bottleneck": bottleneck,
    "regnet": regnet,
    "mobilenet_v2": mobilenet,
    "efficientnet": efficientnet,
    "convnext": convnext,
    "vit": vit,
    "deit": deit,
    "lite": Lite,
    "unet": UNet,
}


def network(name: str) -> nn.Module:
    """Return a network in which every tensor matters, statistics of batch norms and scales of layers included."""
    torch.manual_seed(0)
    return stand_in(NETWORKS[name]()).float()


def shape_of(model: nn.Module) -> Network:
    return traced(model, input_size=INPUT_SIZE, name="tiny").network


@functools.cache
def shape(name: str) -> Network:
    """Return the shape of a network of NETWORKS, traced once."""
    return shape_of(network(name))


@torch.no_grad()
def output(model: nn.Module, *, seed: int = 1) -> torch.Tensor:
    return outputs_of(model, torch.from_numpy(random_pixels(2, seed=seed)))[0]


def random_pixels(count: int, *, seed: int = 1) -> NDArray[np.float32]:
    """Preprocessed images of noise."""
    return np.random.default_rng(seed).standard_normal((count, *INPUT_SIZE), np.float32)


def write_photograph(path: Path, *, seed: int = 0, height: int = 40, width: int = 60) -> Path:
    """Write a file of coloured noise."""
    from PIL import Image  # noqa: PLC0415

    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)
    return path

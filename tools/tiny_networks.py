"""Tiny image networks and encoders of texts with random weights, on which the tools try things out."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    ConvNextConfig,
    ConvNextForImageClassification,
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    EfficientNetConfig,
    EfficientNetForImageClassification,
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    RegNetConfig,
    RegNetForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    RobertaConfig,
    RobertaModel,
    ViTConfig,
    ViTForImageClassification,
    XLMRobertaConfig,
    XLMRobertaModel,
)

from dilap.core.graph import Network
from dilap.core.images import ImageInput
from dilap.core.network_input import NetworkInput, TokenInput
from dilap.core.plan import Plan
from dilap.models.convolutional.cut import shrink_network_
from dilap.models.convolutional.network import traced
from dilap.models.convolutional.proof import halves, stand_in, without

NUM_CLASSES = 7
_PIXELS, _TOKENS = ImageInput(channels=3, height=32, width=32), TokenInput(length=12)
TEXT_SIZES: Mapping[str, Any] = {
    "vocab_size": 57,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 16,
}


def resnet(kind: str = "basic", **changes: Any) -> Any:
    sizes = {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [2, 2], "num_labels": NUM_CLASSES}
    return ResNetForImageClassification(ResNetConfig(layer_type=kind, **sizes | changes))


def bottleneck() -> Any:
    return resnet("bottleneck")


def regnet() -> Any:
    """Two and four groups of 8 channels."""
    sizes = {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [2, 2], "groups_width": 8}
    return RegNetForImageClassification(RegNetConfig(num_labels=NUM_CLASSES, **sizes))


def mobilenet() -> Any:
    return MobileNetV2ForImageClassification(
        MobileNetV2Config(depth_multiplier=0.25, image_size=32, num_labels=NUM_CLASSES)
    )


def efficientnet() -> Any:
    return EfficientNetForImageClassification(
        EfficientNetConfig(
            image_size=32,
            width_coefficient=0.25,
            depth_coefficient=1.0,
            depth_divisor=4,
            hidden_dim=320,
            in_channels=[32, 16],
            out_channels=[16, 24],
            strides=[1, 2],
            expand_ratios=[1, 6],
            kernel_sizes=[3, 5],
            num_block_repeats=[1, 2],
            depthwise_padding=[],
            num_labels=NUM_CLASSES,
        )
    )


def convnext() -> Any:
    sizes = {"hidden_sizes": [8, 16], "depths": [2, 1], "num_stages": 2, "image_size": 32}
    return ConvNextForImageClassification(ConvNextConfig(num_labels=NUM_CLASSES, **sizes))


_ENCODER = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


def vit() -> Any:
    return ViTForImageClassification(ViTConfig(image_size=32, patch_size=8, num_labels=NUM_CLASSES, **_ENCODER))


def deit() -> Any:
    """With the head of the distillation token."""
    config = DeiTConfig(image_size=32, patch_size=8, num_labels=NUM_CLASSES, **_ENCODER)
    return DeiTForImageClassificationWithTeacher(config)


def bert() -> Any:
    return BertModel(BertConfig(**TEXT_SIZES))


def roberta() -> Any:
    """Its position numbers begin behind that of the padding."""
    return RobertaModel(RobertaConfig(**TEXT_SIZES, type_vocab_size=1))


def xlm_roberta() -> Any:
    return XLMRobertaModel(XLMRobertaConfig(**TEXT_SIZES, type_vocab_size=1))


TEXTS: Mapping[str, Callable[[], Any]] = {"bert": bert, "roberta": roberta, "xlm-roberta": xlm_roberta}
IMAGES: Mapping[str, Callable[[], Any]] = {
    "convnext": convnext,
    "deit": deit,
    "efficientnet": efficientnet,
    "mobilenet_v2": mobilenet,
    "regnet": regnet,
    "resnet": bottleneck,
    "vit": vit,
}


def input_of(family: str) -> NetworkInput:
    """Return what the tiny network of a family takes."""
    return _TOKENS if family in TEXTS else _PIXELS


def narrow_network(family: str) -> nn.Module:
    """Return a tiny network of a family with half of the units in every group, and without its first branch."""
    torch.manual_seed(0)
    model = stand_in({**TEXTS, **IMAGES}[family]()).float()
    network = traced(model, input_size=input_of(family).size, name=family).network
    return shrink_network_(model, Plan(base="", architecture=network, kept=_narrowest(network)))


def _narrowest(network: Network) -> dict[str, tuple[int, ...]]:
    left, kept = without(network, network.branches[:1]), halves(network)
    return {name: kept[name] if units else () for name, units in left.items()}

"""Let the class and the config of a transformers model say what its tensors are."""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from dilap.models.convolutional.encoders import encoder_parts, equal_widths
from dilap.models.convolutional.narrowing import Removed, narrowed_class, record_of

_WITH_STAGES = ("resnet", "regnet")  # their configs say the width of the stem and of every stage, and nothing else
_OWN = ("narrowed", "auto_map", "architectures")  # entries of the configs of narrowed models


def describe_(model: PreTrainedModel) -> None:
    """Set class and config to those of a stock model where one has these shapes, else to the narrowed class."""
    stock = stock_class(type(model))
    document = {key: value for key, value in model.config.to_dict().items() if key not in _OWN}
    changes = _widths(model)
    if changes is not None and _describes(
        config := type(model.config).from_dict({**document, **changes}), stock, model
    ):
        model.config, model.__class__ = config, stock
        return
    config = type(model.config).from_dict(document)
    config.narrowed = record_of(model, built(stock, config))
    model.config, model.__class__ = config, narrowed_class(stock)
    config.architectures = [type(model).__name__]


def _describes(config: PreTrainedConfig, stock: Any, model: nn.Module) -> bool:
    """Return whether the stock model of a config has the shapes of `model`."""
    try:
        record = record_of(model, built(stock, config))
    except (ValueError, ZeroDivisionError):  # groups of a convolution that do not divide such a width
        return False
    return not any(record.values())


def stock_class(kind: Any) -> Any:
    """Return the transformers class that `kind` is or is derived from."""
    return next(one for one in kind.__mro__ if one.__module__.startswith("transformers."))


def built(stock: Any, config: PreTrainedConfig) -> nn.Module:
    """Return the model that a config describes, without values."""
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of widths of 0, which no model is given
        made: nn.Module = stock(config)
    return made


def _widths(model: PreTrainedModel) -> Mapping[str, Any] | None:
    """Return the entries of a config that say the widths of stages or layers; None where they cannot say them.

    A family whose config says no widths has none to change.
    """
    if encoder_parts(model) is not None:
        return equal_widths(model)
    if model.config.model_type not in _WITH_STAGES:
        return {}
    network: Any = model.base_model
    ends = [stage.layers[-1].layer[-1].convolution for stage in network.encoder.stages]
    if any(isinstance(end, Removed) for end in ends):
        return None
    stem = network.embedder.embedder.convolution
    return {"embedding_size": stem.out_channels, "hidden_sizes": [end.out_channels for end in ends]}

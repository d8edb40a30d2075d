"""An image network in torch: what it gives for images, however they and its outputs are packed."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from dilap.core.errors import Unsupported, reason_of
from dilap.models.compute_device import HOST

_IMAGES_AT_ONCE = 16  # the activations of ResNet-50 at 224x224 take about 100 MB an image


class Logits(nn.Module):
    """A network with its logits as the only output: transformers' models give an object that has them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        found = outputs_of(self.model, images)
        if not found or found[0].dim() != 2:
            raise Unsupported("the model gives no logits (images x classes): it is no network that classifies images")
        return found[0]


def outputs_of(model: nn.Module, inputs: torch.Tensor) -> list[torch.Tensor]:
    """Return all tensors that a network gives, in whatever containers they are; logits are the first of them."""
    return list(_tensors_in(model(inputs)))


def _tensors_in(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value] if value.is_floating_point() else []
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return [tensor for part in parts for tensor in _tensors_in(part)]


def batches_of(images: NDArray[np.float32], size: int, *, model: nn.Module) -> Iterator[torch.Tensor]:
    """Yield preprocessed images, `size` at a time, where the weights of `model` are and in their type."""
    weight = next(model.parameters())
    for few in torch.from_numpy(np.ascontiguousarray(images)).split(size):
        yield few.to(weight.device, weight.dtype)


class TorchNetwork:
    """The `dilap.backends.Network` of a torch model; it computes in the type that the weights have."""

    def __init__(self, model: nn.Module) -> None:
        self._logits = Logits(model)

    def outputs(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the logits (images x classes) in f32. Raises Unsupported for images that the model does not take."""
        rows: list[NDArray[np.float32]] = []
        with evaluating(self._logits), torch.inference_mode():
            for few in batches_of(images, _IMAGES_AT_ONCE, model=self._logits):
                try:
                    found = self._logits(few)
                except (RuntimeError, ValueError, TypeError) as error:
                    size = "x".join(map(str, images.shape[1:]))
                    raise Unsupported(f"the model does not take images of {size}: {reason_of(error)}") from error
                rows.append(found.float().to(HOST).numpy())
        return np.concatenate(rows)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Let a model and all its parts evaluate; in the end everything that trained before trains again."""
    trained = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in trained:
            module.training = True


def in_f32(model: nn.Module) -> nn.Module:
    """Return the model on the CPU in f32: itself, or a copy where it is anything else."""
    tensors = [*model.parameters(), *model.buffers()]
    if all(one.device == HOST and (one.dtype == torch.float32 or not one.is_floating_point()) for one in tensors):
        return model
    return copy.deepcopy(model).to(HOST, torch.float32)

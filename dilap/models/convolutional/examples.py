"""Inputs on which a network is calibrated, and the statistics of batch norms measured on them."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from dilap.core.errors import InvalidInput


@dataclass(frozen=True, kw_only=True)
class Examples:
    """Inputs of a network (examples x channels x height x width), with `labels` (examples) where they are known."""

    inputs: torch.Tensor
    labels: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if self.labels is not None and len(self.labels) != len(self.inputs):
            raise InvalidInput(f"{len(self.inputs)} inputs have {len(self.labels)} labels")
        if not len(self.inputs):
            raise InvalidInput("there are no inputs to calibrate on; give more images")

    def __len__(self) -> int:
        return len(self.inputs)

    def batches(self, size: int) -> "Iterator[Examples]":
        """Yield the examples, `size` at a time, in their order."""
        for start in range(0, len(self), size):
            part = slice(start, start + size)
            yield Examples(inputs=self.inputs[part], labels=None if self.labels is None else self.labels[part])


@torch.no_grad()
def recalibrate_(model: nn.Module, examples: Examples, *, batch_size: int = 32) -> nn.Module:
    """Measure the means and variances of all batch norms of `model` again, in place, and return it.

    After channels are removed, what norms see is no longer what they were trained on. The statistics are the means over
    batches; nothing else is trained, and dropout stays off.
    """
    norms = [one for one in model.modules() if isinstance(one, _BatchNorm) and one.track_running_stats]
    before = [(norm, norm.momentum, norm.training) for norm in norms]
    training = model.training
    model.eval()
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the mean over all batches, and not mostly the last ones
            norm.training = True
        for batch in examples.batches(batch_size):
            if len(batch) > 1:  # one vector alone has no variance
                model(batch.inputs)
    finally:
        model.train(training)
        for norm, momentum, was_training in before:
            norm.momentum, norm.training = momentum, was_training
    return model

"""The statistics of batch norms of a pruned network, without what the images at hand get wrong about the dense one.

A few hundred images say the means and variances of a network less well than its training did: EfficientNet-Lite0 whose
norms are measured again on 96 photographs gives other probabilities than before (a KL of 0.7), without any pruning. So
the statistics of a pruned network are those of the dense one's training, changed as measured: on the same images, in
the dense network and in the pruned one.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from dilap.models.convolutional.recalibration import recalibrate_
from dilap.models.network import Examples

Indices = Mapping[tuple[str, int], NDArray[np.int64]]  # that stay, by tensor and axis
_CONSTANT = 1e-3  # of what a norm adds to variances
_NONE: Indices = MappingProxyType({})


@dataclass(frozen=True, kw_only=True)
class NormStatistics:
    """Means and variances (2 x channels) of a dense network's batch norms, by name: those it came with, and `measured`.

    The latter are those on `images`.
    """

    images: Examples
    own: Mapping[str, torch.Tensor]
    measured: Mapping[str, torch.Tensor]

    @staticmethod
    @torch.no_grad()
    def of(model: nn.Module, images: Examples) -> "NormStatistics":
        """Measure those of the dense network, which is left as it was. Raises InvalidInput for one image."""
        norms = _norms(model)
        own = {name: _read(norm) for name, norm in norms.items()}
        before = [buffer.clone() for norm in norms.values() for buffer in norm.buffers()]
        recalibrate_(model, images)
        measured = {name: _read(norm) for name, norm in norms.items()}
        for buffer, value in zip((one for norm in norms.values() for one in norm.buffers()), before, strict=True):
            buffer.copy_(value)
        return NormStatistics(images=images, own=own, measured=measured)

    @torch.no_grad()
    def put_(self, model: nn.Module, kept: Indices = _NONE) -> None:
        """Measure the batch norms of a pruned network, in place; `kept` are the channels that are left of the dense."""
        recalibrate_(model, self.images)
        for name, norm in _norms(model).items():
            stays = kept.get((f"{name}.running_mean", 0))
            both = (self.own[name], self.measured[name])
            own, measured = both if stays is None else (one[:, torch.from_numpy(stays)] for one in both)
            now = _read(norm)
            growth = (now[1] + norm.eps) / (measured[1] + norm.eps)
            mean = now[0] + (own[0] - measured[0]) * growth.sqrt()
            variance = ((own[1] + norm.eps) * growth - norm.eps).clamp_min(0)
            varies = now[1] > _CONSTANT * norm.eps  # what a removed branch adds does not, on any images
            _write_(norm, torch.where(varies, torch.stack([mean, variance]), now))


def _norms(model: nn.Module) -> dict[str, _BatchNorm]:
    return {name: one for name, one in model.named_modules() if isinstance(one, _BatchNorm) and one.track_running_stats}


def _read(norm: _BatchNorm) -> torch.Tensor:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return torch.stack([norm.running_mean, norm.running_var])


def _write_(norm: _BatchNorm, both: torch.Tensor) -> None:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.running_mean.copy_(both[0])
    norm.running_var.copy_(both[1])

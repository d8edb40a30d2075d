"""The statistics of batch norms of a pruned network, without what the images at hand get wrong about the dense one.

A few hundred images say the means and variances of a network less well than its training did: EfficientNet-Lite0 whose
norms are measured again on 96 photographs gives other probabilities than before (a KL of 0.7), without any pruning. So
the statistics of a pruned network are those of the dense one's training, changed by as much as what the norm sees is
changed: in the pruned network from the dense one, on the same images.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from dilap.core.errors import InvalidInput
from dilap.models.network import Examples, batches_of, evaluating, outputs_of

Indices = Mapping[tuple[str, int], NDArray[np.int64]]  # that stay, by tensor and axis
_AT_ONCE = 32  # images
_CONSTANT = 1e-3  # of what a norm adds to variances
_NONE: Indices = MappingProxyType({})


@dataclass(frozen=True, kw_only=True)
class NormStatistics:
    """Means and variances (2 x channels) of a dense network's batch norms, by name: its own, and those of `images`.

    `seen` has the latter for every batch of images.
    """

    images: Examples
    own: Mapping[str, torch.Tensor]
    seen: Sequence[Mapping[str, torch.Tensor]]

    @staticmethod
    @torch.no_grad()
    def of(model: nn.Module, images: Examples) -> "NormStatistics":
        """Measure those of the dense network, which is left as it is. Raises InvalidInput for one image."""
        norms = _norms(model)
        if norms and len(images) < 2:  # one vector alone has no variance
            raise InvalidInput(f"batch norms are measured on several images, got {len(images)}; give more")
        seen: list[dict[str, torch.Tensor]] = []
        with evaluating(model), _watched(norms, lambda name, now: seen[-1].update({name: now})):
            for batch in _batches(model, images, norms):
                seen.append({})
                outputs_of(model, batch)
        return NormStatistics(images=images, own={name: _read(norm) for name, norm in norms.items()}, seen=seen)

    @torch.no_grad()
    def put_(self, model: nn.Module, kept: Indices = _NONE) -> None:
        """Give the batch norms of a pruned network their statistics; `kept` are the channels left of the dense one."""
        norms = _norms(model)
        found = {name: torch.zeros_like(_read(norm)) for name, norm in norms.items()}
        weights = dict.fromkeys(norms, 0)
        number = size = 0

        def follow(name: str, now: torch.Tensor) -> None:
            stays = kept.get((f"{name}.running_mean", 0))
            both = (self.own[name], self.seen[number][name])
            own, seen = both if stays is None else (one[:, torch.from_numpy(stays)] for one in both)
            statistics = _followed(now, own=own, seen=seen, eps=norms[name].eps)
            _write_(norms[name], statistics)  # so that what comes after it sees what it will see
            found[name] += size * statistics
            weights[name] += size

        with evaluating(model), _watched(norms, follow):
            for number, batch in enumerate(_batches(model, self.images, norms)):  # noqa: B007
                size = len(batch)
                outputs_of(model, batch)
        for name, norm in norms.items():
            if weights[name]:
                _write_(norm, found[name] / weights[name])


def _followed(now: torch.Tensor, *, own: torch.Tensor, seen: torch.Tensor, eps: float) -> torch.Tensor:
    """Return the statistics of a norm (2 x channels) whose inputs have those of `now`.

    In the dense network the norm has its `own`, and its inputs those of `seen`.
    """
    growth = (now[1] + eps) / (seen[1] + eps)
    mean = now[0] + (own[0] - seen[0]) * growth.sqrt()
    variance = ((own[1] + eps) * growth - eps).clamp_min(0)
    varies = now[1] > _CONSTANT * eps  # what a removed branch adds does not, on any images
    return torch.where(varies, torch.stack([mean, variance]), now)


@contextmanager
def _watched(norms: Mapping[str, _BatchNorm], see: Callable[[str, torch.Tensor], Any]) -> Iterator[None]:
    """Call `see` with the mean and variance of what every norm is given, before it computes."""

    def hook(name: str, inputs: torch.Tensor) -> None:
        axes = [axis for axis in range(inputs.ndim) if axis != 1]
        see(name, torch.stack([inputs.mean(axes), inputs.var(axes, correction=0)]))

    hooks = [
        norm.register_forward_pre_hook(lambda _, inputs, name=name: hook(name, inputs[0]))
        for name, norm in norms.items()
    ]
    try:
        yield
    finally:
        for one in hooks:
            one.remove()


def _batches(model: nn.Module, images: Examples, norms: Mapping[str, _BatchNorm]) -> Iterator[torch.Tensor]:
    """Yield images, some at a time and never one; none where there are no norms."""
    if norms:
        yield from (batch for batch in batches_of(images, _AT_ONCE, model=model) if len(batch) > 1)


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

"""Recovery of image networks by distillation: the pruned network learns what the dense one says about photographs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from dilap.models.network import evaluating, outputs_of
from dilap.models.recovery.options import rate_at
from dilap.models.recovery.trainable import size_of

NetworkMode = Literal["none", "full"]
_IMAGES_AT_ONCE = 8  # in a forward and backward pass: the activations of ResNet-50 at 224x224 take 100 MB an image


@dataclass(frozen=True, kw_only=True)
class NetworkRecovery:
    """Settings of training all parameters with AdamW on KL(dense || pruned), `batch_images` photographs a step.

    Both networks see random crops, which have at least `least_area` of a photograph, and mirror images of half of them.
    A step moves the numbers of a tensor by about `rate` times their root mean square. `warmup` is the share of the
    steps in which the rate rises.
    """

    mode: NetworkMode = "none"
    steps: int = 60
    batch_images: int = 32
    least_area: float = 0.35
    rate: float = 1.6e-3
    warmup: float = 0.1
    seed: int = 0


def distil_network(
    model: nn.Module,
    dense: nn.Module,
    images: NDArray[np.float32],
    options: NetworkRecovery,
    *,
    progress: Callable[[float], None] = lambda _: None,
) -> list[float]:
    """Train `model` in place to give what the `dense` one gives for crops of preprocessed `images`.

    Return the KL of every step, in nats an image, which `progress` gets too. The statistics of batch norms stay: what
    is trained is what is shipped.
    """
    parameters = [one for one in model.parameters() if one.is_floating_point()]
    kept = [(one, one.dtype, one.requires_grad) for one in parameters]
    model.float().requires_grad_(True)
    groups = [{"params": [one], "lr": options.rate * size_of(one)} for one in parameters]
    adam = torch.optim.AdamW(groups, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        adam, lambda step: rate_at(step, steps=options.steps, warmup=options.warmup)
    )
    draw, losses = np.random.default_rng(options.seed), list[float]()
    with evaluating(model), evaluating(dense):
        while len(losses) < options.steps:
            rows = draw.permutation(len(images))[: options.batch_images]
            adam.zero_grad()
            losses.append(_accumulate_gradients_(model, dense, cropped(images[rows], draw, options.least_area)))
            nn.utils.clip_grad_norm_(parameters, 1.0)
            adam.step()
            schedule.step()
            progress(losses[-1])
    for parameter, dtype, was_required in kept:
        parameter.data = parameter.data.to(dtype)
        parameter.grad = None
        parameter.requires_grad_(was_required)
    return losses


def cropped(images: NDArray[np.float32], draw: np.random.Generator, least_area: float) -> torch.Tensor:
    """Return a random crop of every image, in the images' own size, half of them mirrored."""
    height, width = images.shape[2:]
    found = []
    for image in torch.from_numpy(images):
        share = draw.uniform(least_area, 1) ** 0.5  # of both sides
        rows, columns = max(1, round(share * height)), max(1, round(share * width))
        top, left = draw.integers(height - rows + 1), draw.integers(width - columns + 1)
        part = image[None, :, top : top + rows, left : left + columns]
        part = functional.interpolate(part, size=(height, width), mode="bilinear", antialias=True)
        found.append(part.flip(3) if draw.random() < 0.5 else part)
    return torch.cat(found)


def _accumulate_gradients_(model: nn.Module, dense: nn.Module, images: torch.Tensor) -> float:
    """Run images forward and backward, a few at a time, and return their mean KL."""
    weight, total = next(model.parameters()), 0.0
    taught = next(dense.parameters()).dtype
    for few in images.to(weight.device).split(_IMAGES_AT_ONCE):
        with torch.no_grad():
            wanted = outputs_of(dense, few.to(taught))[0].float().log_softmax(1)
        found = outputs_of(model, few)[0].log_softmax(1)
        loss = functional.kl_div(found, wanted, reduction="sum", log_target=True) / len(images)
        loss.backward()
        total += float(loss.detach())
    return total

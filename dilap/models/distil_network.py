"""Recovery of networks that are no decoders by distillation: the pruned one learns what the dense one gives.

That are logits for photographs, or the embeddings of sentences.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from dilap.models.convolutional.cut import tensors_of
from dilap.models.convolutional.recalibration import normalising_by_batches, recalibrate_
from dilap.models.network import Examples, difference, evaluating, outputs_of
from dilap.models.recovery.options import rate_at
from dilap.models.recovery.trainable import size_of

NetworkMode = Literal["none", "full"]
_AT_ONCE = 8  # in a forward and backward pass: the activations of ResNet-50 at 224x224 take 100 MB an image


@dataclass(frozen=True, kw_only=True)
class NetworkRecovery:
    """Settings of training all parameters with AdamW on the `difference` from the dense network.

    A step sees `batch_images` photographs or sentences.

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
    examples: Examples,
    options: NetworkRecovery,
    *,
    progress: Callable[[float], None] = lambda _: None,
) -> list[float]:
    """Train `model` in place to give what the `dense` one gives for `examples`, of images for random crops.

    Return the difference in every step, which `progress` gets too: the KL in nats an image, or the cosine distance.
    Batch norms use the statistics of the batches that they see, and at the end these are measured again on all
    examples: an EfficientNet-Lite0 whose statistics stayed was further from the dense network than before.
    """
    parameters = [one for one in model.parameters() if one.is_floating_point()]
    types = {name: tensor.dtype for name, tensor in tensors_of(model).items()}
    required = [(one, one.requires_grad) for one in parameters]
    model.float().requires_grad_(True)
    groups = [{"params": [one], "lr": options.rate * size_of(one)} for one in parameters]
    adam = torch.optim.AdamW(groups, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        adam, lambda step: rate_at(step, steps=options.steps, warmup=options.warmup)
    )
    draw, losses = np.random.default_rng(options.seed), list[float]()
    with normalising_by_batches(model), evaluating(dense):
        while len(losses) < options.steps:
            rows = draw.permutation(len(examples))[: options.batch_images]
            adam.zero_grad()
            losses.append(_accumulate_gradients_(model, dense, _seen(examples[rows], draw, options.least_area)))
            nn.utils.clip_grad_norm_(parameters, 1.0)
            adam.step()
            schedule.step()
            progress(losses[-1])
    recalibrate_(model, examples)
    for name, tensor in tensors_of(model).items():
        tensor.data = tensor.data.to(types[name])
    for parameter, was_required in required:
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


def _seen(examples: Examples, draw: np.random.Generator, least_area: float) -> torch.Tensor:
    """Return what both networks see of examples: crops of images, and texts as they are."""
    if examples.dtype == np.float32:
        return cropped(examples.astype(np.float32, copy=False), draw, least_area)
    return torch.from_numpy(examples)


def _accumulate_gradients_(model: nn.Module, dense: nn.Module, examples: torch.Tensor) -> float:
    """Run examples forward and backward, a few at a time, and return their mean difference."""
    weight, total = next(model.parameters()), 0.0
    taught = next(dense.parameters()).dtype
    for few in examples.to(weight.device).chunk(-(-len(examples) // _AT_ONCE)):  # none alone: norms need several
        with torch.no_grad():
            wanted = outputs_of(dense, few.to(taught) if few.is_floating_point() else few)[0].float()
        loss = difference(model, outputs_of(model, few)[0], wanted) * len(few) / len(examples)
        loss.backward()
        total += float(loss.detach())
    return total

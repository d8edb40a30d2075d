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

from dilap.models.network import Examples, difference, evaluating, outputs_of
from dilap.models.recovery.options import rate_at
from dilap.models.recovery.trainable import size_of

NetworkMode = Literal["none", "full"]
_AT_ONCE = 8  # in a forward and backward pass: the activations of ResNet-50 at 224x224 take 100 MB an image


@dataclass(frozen=True, kw_only=True)
class NetworkRecovery:
    """Settings of training all parameters with AdamW on the `difference` from the dense network.

    A step sees `batch_images` photographs or sentences, and moves the numbers of a tensor by about `rate` times their
    root mean square. `warmup` is the share of the steps in which the rate rises.
    """

    mode: NetworkMode = "none"
    steps: int = 60
    batch_images: int = 32
    rate: float = 1.6e-3
    warmup: float = 0.1
    seed: int = 0


def distil_network(
    model: nn.Module,
    examples: Examples,
    answers: NDArray[np.float32],
    options: NetworkRecovery,
    *,
    progress: Callable[[float], None] = lambda _: None,
) -> list[float]:
    """Train `model` in place to give `answers`, the dense network's outputs, for `examples` as the network takes them.

    Return the difference in every step, which `progress` gets too: the KL in nats an image, or the cosine distance. The
    statistics of batch norms stay: what is trained is what is shipped.
    """
    parameters = [one for one in model.parameters() if one.is_floating_point()]
    kept = [(one, one.dtype, one.requires_grad) for one in parameters]
    model.float().requires_grad_(True)
    groups = [{"params": [one], "lr": options.rate * size_of(one)} for one in parameters]
    adam = torch.optim.AdamW(groups, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        adam, lambda step: rate_at(step, steps=options.steps, warmup=options.warmup)
    )
    generator, losses = torch.Generator().manual_seed(options.seed), list[float]()
    with evaluating(model):
        while len(losses) < options.steps:
            rows = torch.randperm(len(examples), generator=generator)[: options.batch_images].numpy()
            adam.zero_grad()
            losses.append(_accumulate_gradients_(model, examples[rows], answers[rows]))
            nn.utils.clip_grad_norm_(parameters, 1.0)
            adam.step()
            schedule.step()
            progress(losses[-1])
    for parameter, dtype, was_required in kept:
        parameter.data = parameter.data.to(dtype)
        parameter.grad = None
        parameter.requires_grad_(was_required)
    return losses


def _accumulate_gradients_(model: nn.Module, examples: Examples, answers: NDArray[np.float32]) -> float:
    """Run examples forward and backward, a few at a time, and return their mean difference from the answers."""
    device, total = next(model.parameters()).device, 0.0
    for few in np.array_split(np.arange(len(examples)), -(-len(examples) // _AT_ONCE)):
        seen, wanted = (torch.from_numpy(one[few]).to(device) for one in (examples, answers))
        loss = difference(model, outputs_of(model, seen)[0], wanted) * (len(few) / len(examples))
        loss.backward()
        total += float(loss.detach())
    return total

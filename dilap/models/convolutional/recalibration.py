"""The statistics of batch norms, measured again after a network was cut."""

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from dilap.core.errors import InvalidInput
from dilap.models.network import Examples, batches_of, evaluating


@torch.no_grad()
def recalibrate_(model: nn.Module, images: Examples, *, batch_size: int = 32) -> nn.Module:
    """Measure the means and variances of all batch norms of `model` again, in place, and return it.

    After channels are removed, what norms see is no longer what they were trained on. The statistics are the means over
    batches of preprocessed `images`; nothing else is trained, and dropout stays off. A network without batch norms, as
    encoders are, is left as it is. Raises InvalidInput for one image.
    """
    norms = [one for one in model.modules() if isinstance(one, _BatchNorm) and one.track_running_stats]
    if not norms:
        return model
    if len(images) < 2:  # one vector alone has no variance
        raise InvalidInput(f"batch norms are measured on several images, got {len(images)}; give more")
    momenta = [norm.momentum for norm in norms]
    with evaluating(model):
        try:
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # the mean over all batches, and not mostly the last ones
                norm.training = True
            for batch in batches_of(images, batch_size, model=model):
                if len(batch) > 1:
                    model(batch)
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum, norm.training = momentum, False
    return model

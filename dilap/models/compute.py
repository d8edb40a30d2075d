"""Run calibration text through a model fast: in batches, and with bf16 matrix products where the hardware has them."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from dilap.models.compute_device import has_fast_bf16


def batches(tokens: torch.Tensor, *, batch_tokens: int, device: torch.device) -> Iterator[torch.Tensor]:
    """Yield rows of `tokens` (sequences x length) on a device, as many at a time as `batch_tokens` has room for.

    There is at least one row in each.
    """
    for few in tokens.split(max(1, batch_tokens // tokens.shape[1])):
        yield few.to(device)


def shuffled_rows(tokens: torch.Tensor, *, batch_tokens: int, seed: int) -> Iterator[torch.Tensor]:
    """Yield indices of rows of `tokens` (sequences x length) in batches without end, in a new order every epoch."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(tokens), generator=generator)
        yield from order.split(max(1, batch_tokens // tokens.shape[1]))


def compute_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context in which a device's products are in bf16 where it has them in hardware.

    Elsewhere they are in the model's type.
    """
    # On AVX512-bf16 they are 5 times as fast as f32.
    return torch.autocast(device.type, dtype=torch.bfloat16) if has_fast_bf16(device) else nullcontext()


def product_type(own: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the type to which a matrix of type `own` should be converted before many products are made with it."""
    return torch.bfloat16 if has_fast_bf16(device) else own

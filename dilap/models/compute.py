"""Run calibration text through a model fast: in batches, and with bf16 matrix products where the CPU has them."""

from collections.abc import Iterator

import torch


def batches(tokens: torch.Tensor, *, batch_tokens: int) -> Iterator[torch.Tensor]:
    """Yield rows of `tokens` (sequences x length), as many at a time as `batch_tokens` has room for, at least one."""
    yield from tokens.split(max(1, batch_tokens // tokens.shape[1]))


def shuffled_rows(tokens: torch.Tensor, *, batch_tokens: int, seed: int) -> Iterator[torch.Tensor]:
    """Yield indices of rows of `tokens` (sequences x length) in batches without end, in a new order every epoch."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(tokens), generator=generator)
        yield from order.split(max(1, batch_tokens // tokens.shape[1]))


def compute_precision() -> torch.autocast:
    """Return a context in which products are in bf16 where the CPU has them in hardware, else in the model's type."""
    # On AVX512-bf16 they are 5 times as fast as f32.
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=has_fast_bf16())


def product_type(own: torch.dtype) -> torch.dtype:
    """Return the type to which a matrix of type `own` should be converted before many products are made with it."""
    return torch.bfloat16 if has_fast_bf16() else own


def has_fast_bf16() -> bool:
    """Return whether the CPU multiplies bf16 matrices in hardware."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())

"""How calibration text goes through a model: in batches, and in the fastest products that the CPU has."""

from collections.abc import Iterator

import torch


def batches(tokens: torch.Tensor, *, batch_tokens: int) -> Iterator[torch.Tensor]:
    """Rows of `tokens`, as many at a time as make up `batch_tokens`, at least one."""
    yield from tokens.split(max(1, batch_tokens // tokens.shape[1]))


def compute_precision() -> torch.autocast:
    """bf16 products where the CPU has them in hardware (5 times f32 on AVX512-bf16), the model's own type elsewhere."""
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=has_fast_bf16())


def product_type(own: torch.dtype) -> torch.dtype:
    """The type to convert matrices to that many products read, whose own type is `own`."""
    return torch.bfloat16 if has_fast_bf16() else own


def has_fast_bf16() -> bool:
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())

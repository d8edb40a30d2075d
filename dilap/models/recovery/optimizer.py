"""AdamW for a recovery: its two states of every weight in 32 bits, or in 8 with torchao's."""

import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from dilap.core.errors import Unavailable, reason_of
from dilap.models.compute_device import HOST


def require_8bit_states() -> None:
    """Raise Unavailable where the library for states of 8 bits is missing."""
    _adamw_8bit()


def adamw(groups: Sequence[dict[str, Any]], *, has_8bit_states: bool) -> torch.optim.Optimizer:
    """Return AdamW without weight decay for groups of parameters, each with its learning rate.

    With 8 bits, a block of 256 numbers of a state shares a scale; tensors of fewer than 4096 keep 32 bits.
    """
    made: torch.optim.Optimizer = (_adamw_8bit() if has_8bit_states else torch.optim.AdamW)(groups, weight_decay=0.0)
    return made


def set_rate_(group: dict[str, Any], rate: float) -> None:
    """Set the learning rate of a group, which torchao keeps in a tensor."""
    if isinstance(group["lr"], torch.Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


def stepping(device: torch.device, *, has_8bit_states: bool) -> AbstractContextManager[Any]:
    """Return the context of a step: torchao compiles it, which needs a C++ compiler on the host and saves little."""
    is_eager = has_8bit_states and device == HOST
    return torch.compiler.set_stance("force_eager") if is_eager else nullcontext()


def _adamw_8bit() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what torchao and torch deprecate among themselves
            from torchao.optim import AdamW8bit  # noqa: PLC0415 - it may be missing
    except ImportError as error:
        raise Unavailable(
            f"optimiser states of 8 bits need torchao: pip install torchao ({reason_of(error)})"
        ) from error
    return AdamW8bit

"""What torch computes on: the CPU or an accelerator. This is the only place that names one.

Tensors that need not be beside the model (text, answers of the dense model, level libraries, statistics that are kept)
lie in the memory of the `HOST`. Everything else is made where the tensors are that it meets.
"""

import psutil
import torch

from dilap.core.errors import InvalidInput

HOST = torch.device("cpu")
AUTO = "auto"


def compute_device(asked: str = AUTO) -> torch.device:
    """Return the device of that name, with or without a number; `auto` is an accelerator where torch has one.

    Raises InvalidInput, with what there is, for a device that this machine or this build of torch does not have.
    """
    there = [*_accelerators(), HOST]
    if asked == AUTO:
        return there[0]
    for one in there:
        if asked in (str(one), one.type):
            return one
    found = ", ".join(map(str, there))
    raise InvalidInput(f"torch has no device {asked!r:.40} to compute on here; it has {found}: name one, or auto")


def _accelerators() -> list[torch.device]:
    kind = torch.accelerator.current_accelerator(check_available=True)
    return [] if kind is None else [torch.device(kind.type, index) for index in range(torch.accelerator.device_count())]


def memory_of(device: torch.device) -> int:
    """Return the bytes of memory that a device has; those of the host where it does not say."""
    asked = None if device.type == HOST.type else getattr(torch.get_device_module(device), "mem_get_info", None)
    return psutil.virtual_memory().total if asked is None else int(asked(device)[1])


def has_fast_bf16(device: torch.device) -> bool:
    """Return whether a device multiplies bf16 matrices in hardware."""
    if device.type == HOST.type:
        known = torch.cpu.get_capabilities()
        return bool(known.get("avx512_bf16") or known.get("amx_tile"))
    supports = getattr(torch.get_device_module(device), "is_bf16_supported", None)
    return supports is not None and bool(supports(including_emulation=False))


def widest_float(device: torch.device) -> torch.dtype:
    """Return f64, or f32 for a device that has no f64 (Apple's)."""
    try:
        torch.empty(0, dtype=torch.float64, device=device)
    except TypeError:
        return torch.float32
    return torch.float64

"""Keep named tensors on disk, so that nothing is computed twice."""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from dilap.core.codec import written_aside
from dilap.core.errors import InvalidInput, reason_of

Tensors = Mapping[str, torch.Tensor]


def save_tensors(path: Path, tensors: Tensors) -> None:
    """Write a safetensors file, whole or not at all."""
    with written_aside(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)


def load_tensors(path: Path) -> Tensors:
    """Read a safetensors file. Raises InvalidInput where it is damaged."""
    try:
        found: Tensors = load_file(path)
    except Exception as error:  # safetensors raises its own type for damaged files
        raise InvalidInput(f"{path}: damaged tensors ({reason_of(error)}); remove the file and run again") from error
    return found


def computed_once(path: Path | None, compute: Callable[[], Tensors]) -> Tensors:
    """Return the tensors kept in `path`; compute and keep them where they are missing. Without a path, compute them."""
    if path is None:
        return compute()
    if not path.exists():
        save_tensors(path, compute())
    return load_tensors(path)

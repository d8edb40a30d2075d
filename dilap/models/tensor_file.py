"""Keep named tensors on disk, so that nothing is computed twice."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from dilap.core.codec import written_aside
from dilap.core.errors import InvalidInput, reason_of
from dilap.models.compute_device import HOST

Tensors = Mapping[str, torch.Tensor]


def save_tensors(path: Path, tensors: Tensors, *, metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file, whole or not at all."""
    contiguous = {name: tensor.to(HOST).contiguous() for name, tensor in tensors.items()}
    with written_aside(path) as temporary:
        save_file(contiguous, temporary, metadata=None if metadata is None else dict(metadata))


@contextmanager
def opened_tensors(path: Path, *, what: str) -> Iterator[Any]:
    """Open a safetensors file to read tensors and metadata of it.

    Raises InvalidInput, which calls the file `what`, where it or anything that is read of it is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except Exception as error:  # safetensors raises its own type for damaged files
        raise InvalidInput(f"{path}: damaged {what} ({reason_of(error)}); remove the file and run again") from error


def load_tensors(path: Path) -> Tensors:
    """Read a safetensors file. Raises InvalidInput where it is damaged."""
    with opened_tensors(path, what="tensors") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)


def computed_once(path: Path | None, compute: Callable[[], Tensors]) -> Tensors:
    """Return the tensors kept in `path`; compute and keep them where they are missing. Without a path, compute them.

    They are in the host's memory in any case.
    """
    if path is None:
        return {name: tensor.to(HOST) for name, tensor in compute().items()}
    if not path.exists():
        save_tensors(path, compute())
    return load_tensors(path)

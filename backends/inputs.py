"""What the sessions of all runtimes share: what is fed to a model that is timed, and what the switches are set to."""

import random
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dilap.core.errors import InvalidInput, Unsupported
from dilap.core.network_input import TOKEN_INPUTS
from dilap.core.workload import Workload

_IMAGE_DIMENSIONS = 4  # of a batch: images, channels, height, width


def random_tokens(count: int, *, vocab_size: int) -> list[int]:
    """Return random token ids, the same ones at every call."""
    draw = random.Random(0)
    return [draw.randrange(vocab_size) for _ in range(count)]


def random_images(shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Return a batch of random images, the same at every call."""
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def random_batch(shape: tuple[int, ...]) -> NDArray[Any]:
    """Return random images, or texts (texts x 3 x tokens) without padding, whose words any vocabulary has."""
    if len(shape) == _IMAGE_DIMENSIONS:
        return random_images(shape)
    tokens = np.zeros(shape, np.int64)
    tokens[:, 0] = np.random.default_rng(0).integers(0, 2, (shape[0], shape[-1]))
    tokens[:, 1] = 1
    return tokens


def arrays_of(batch: NDArray[Any]) -> list[NDArray[Any]]:
    """Return what a file takes of a batch: the images, or the arrays TOKEN_INPUTS of texts (texts x 3 x tokens)."""
    if batch.ndim == _IMAGE_DIMENSIONS:
        return [batch]
    return [np.ascontiguousarray(array) for array in batch.swapaxes(0, 1)]


def batch_shape(path: Path, shapes: Mapping[str, tuple[object, ...]]) -> tuple[int, ...]:
    """Return the shape of the one batch of images or texts that a file takes, given those of all its inputs by name.

    Raises InvalidInput for a file that takes anything else.
    """
    first = next(iter(shapes.values()), ())
    sizes = tuple(int(size) for size in first if isinstance(size, int))
    if len(sizes) == len(first) and set(shapes.values()) == {first}:
        if len(shapes) == 1 and len(sizes) == _IMAGE_DIMENSIONS:
            return sizes
        if len(shapes) == len(TOKEN_INPUTS) and len(sizes) == 2:
            return sizes[0], len(shapes), sizes[1]
    found = ", ".join(f"{name} {'x'.join(map(str, one))}" for name, one in shapes.items())
    raise InvalidInput(f"{path}: not an image network or encoder that DiLAP exported: its inputs are {found:.200}")


def require_batch(path: Path, shape: tuple[int, ...], workload: Workload) -> None:
    """Raise Unsupported where the file takes another number of images at once than the workload has."""
    if shape[0] != workload.batch:
        kind = "images" if len(shape) == _IMAGE_DIMENSIONS else "texts"
        raise Unsupported(
            f"{path}: it takes {shape[0]} {kind} at once, and the workload has batch {workload.batch}: export it with "
            "that batch"
        )


def whole_batches(images: NDArray[Any], shape: tuple[int, ...]) -> Iterator[NDArray[Any]]:
    """Yield all images or texts in batches of the given shape; the last one is filled with the first ones again.

    Raises InvalidInput for those of another size.
    """
    if images.shape[1:] != tuple(shape[1:]):
        raise InvalidInput(f"inputs are {images.shape[1:]}, and the network takes {tuple(shape[1:])}")
    for start in range(0, len(images), shape[0]):
        yield images[np.arange(start, start + shape[0]) % len(images)]


def in_batches(
    images: NDArray[Any], shape: tuple[int, ...], run: Callable[[list[NDArray[Any]]], NDArray[np.float32]]
) -> NDArray[np.float32]:
    """Return what `run` gives for all images or texts, the arrays of a batch at a time. Raises InvalidInput."""
    return np.concatenate([run(arrays_of(batch)) for batch in whole_batches(images, shape)])[: len(images)]


def reads_no_text() -> Unsupported:
    """Return the error of a session of a network that is asked for the logits of tokens, as a decoder is."""
    return Unsupported("a network that is no decoder reads no text token by token: ask for its outputs")


def setting(workload: Workload, switches: Mapping[str, tuple[str, ...]], name: str) -> str:
    """Return the value of a switch: the runtime's own default, its first, where the workload does not name it."""
    return workload.switches.get(name, switches[name][0])


def num_together(count: int, *, incremental: bool) -> int:
    """Return how many of `count` tokens are run in one pass: all, or all but a last quarter that is run one by one."""
    return count - (-(-count // 4) if incremental else 0)

"""What the sessions of all runtimes share: what is fed to a model that is timed, and what the switches are set to."""

import random
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dilap.core.errors import InvalidInput, Unsupported
from dilap.core.workload import Workload


def random_tokens(count: int, *, vocab_size: int) -> list[int]:
    """Return random token ids, the same ones at every call."""
    draw = random.Random(0)
    return [draw.randrange(vocab_size) for _ in range(count)]


def random_images(shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Return a batch of random images, the same at every call."""
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def image_batch(path: Path, shapes: Mapping[str, tuple[object, ...]]) -> tuple[int, ...]:
    """Return the shape of the one batch of images that a file takes, given the shapes of all its inputs by name.

    Raises InvalidInput for a file that takes anything else.
    """
    shape = next(iter(shapes.values()), ())
    if len(shapes) != 1 or len(shape) != 4 or not all(isinstance(size, int) for size in shape):
        found = ", ".join(f"{name} {'x'.join(map(str, one))}" for name, one in shapes.items())
        raise InvalidInput(f"{path}: not an image network that DiLAP exported: its inputs are {found:.200}")
    return tuple(int(str(size)) for size in shape)


def require_batch(path: Path, shape: tuple[int, ...], workload: Workload) -> None:
    """Raise Unsupported where the file takes another number of images at once than the workload has."""
    if shape[0] != workload.batch:
        raise Unsupported(
            f"{path}: it takes {shape[0]} images at once, and the workload has batch {workload.batch}: export it with "
            "that batch"
        )


def whole_batches(images: NDArray[np.float32], shape: tuple[int, ...]) -> Iterator[NDArray[np.float32]]:
    """Yield all images in batches of the given shape; the last one is filled with the first images again.

    Raises InvalidInput for images of another size.
    """
    if images.shape[1:] != tuple(shape[1:]):
        raise InvalidInput(f"images are {images.shape[1:]}, and the network takes {tuple(shape[1:])}")
    for start in range(0, len(images), shape[0]):
        yield images[np.arange(start, start + shape[0]) % len(images)]


def in_batches(
    images: NDArray[np.float32], shape: tuple[int, ...], run: Callable[[NDArray[np.float32]], NDArray[np.float32]]
) -> NDArray[np.float32]:
    """Return what `run` gives for all images, a batch of the given shape at a time. Raises InvalidInput."""
    return np.concatenate([run(batch) for batch in whole_batches(images, shape)])[: len(images)]


def reads_no_text() -> Unsupported:
    """Return the error of a session of an image network that is asked for the logits of tokens."""
    return Unsupported("an image network reads no text: ask for its outputs on images")


def setting(workload: Workload, switches: Mapping[str, tuple[str, ...]], name: str) -> str:
    """Return the value of a switch: the runtime's own default, its first, where the workload does not name it."""
    return workload.switches.get(name, switches[name][0])


def num_together(count: int, *, incremental: bool) -> int:
    """Return how many of `count` tokens are run in one pass: all, or all but a last quarter that is run one by one."""
    return count - (-(-count // 4) if incremental else 0)

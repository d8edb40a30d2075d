"""What an image network takes, and how photographs become that."""

import re
from dataclasses import dataclass
from typing import Literal

from dilap.core.bounds import MAX_BATCH, MAX_SIDE
from dilap.core.errors import InvalidInput

Filter = Literal["nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"]


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How a photograph becomes a network's input.

    It is resized with a filter of Pillow: to `resize` as height and width, or, where that is one number, until its
    shorter side has so many pixels. Of the result the middle is taken, of the size of the input (black where there is
    none). Every channel, whose values are 0 to 255, then becomes (value - mean) / std.
    """

    resize: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resample: Filter = "bicubic"

    def __post_init__(self) -> None:
        if len(self.resize) not in (1, 2) or not all(0 < side <= MAX_SIDE for side in self.resize):
            raise ValueError(f"a photograph is resized to one side or to height and width, got {self.resize}")
        if len(self.mean) != len(self.std) or not all(one > 0 for one in self.std):
            raise ValueError(f"a mean and a positive std are needed for every channel, got {self.mean} and {self.std}")


@dataclass(frozen=True, kw_only=True)
class ImageInput:
    """What an image network takes: `batch` images of channels x height x width, as f32.

    An artifact is made for one size and one batch. `preprocessing` is None where nobody said how photographs become
    inputs: such a network can be timed, and not be shown any.
    """

    channels: int
    height: int
    width: int
    batch: int = 1
    preprocessing: Preprocessing | None = None

    def __post_init__(self) -> None:
        if not all(0 < one <= MAX_SIDE for one in (self.channels, self.height, self.width)):
            raise ValueError(f"channels, height and width are between 1 and {MAX_SIDE:,}, got {self}")
        if not 0 < self.batch <= MAX_BATCH:
            raise ValueError(f"a batch is between 1 and {MAX_BATCH:,}, got {self.batch}")
        if self.preprocessing is not None and len(self.preprocessing.mean) != self.channels:
            raise ValueError(f"{self.channels} channels, but means of {len(self.preprocessing.mean)}")

    @classmethod
    def parse(cls, text: str) -> "ImageInput":
        """Parse channels, height and width, as in `3x224x224`. Raises InvalidInput."""
        sizes = re.fullmatch(r"(\d{1,9})x(\d{1,9})x(\d{1,9})", text.strip())
        if sizes is None:
            raise InvalidInput(f"input {text!r:.80} is not understood; write channels, height and width: 3x224x224")
        channels, height, width = map(int, sizes.groups())
        try:
            return cls(channels=channels, height=height, width=width)
        except ValueError as error:
            raise InvalidInput(f"input {text!r}: {error}") from error

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """The shape of a batch: batch x channels x height x width."""
        return self.batch, self.channels, self.height, self.width

    @property
    def size(self) -> tuple[int, int, int]:
        """The shape of one image: channels x height x width."""
        return self.channels, self.height, self.width

    def __str__(self) -> str:
        return "x".join(map(str, self.size))

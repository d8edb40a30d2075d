"""What a network takes that is no decoder: images, or texts as tokens."""

import re
from dataclasses import dataclass

from dilap.core.bounds import MAX_BATCH, MAX_TOKENS
from dilap.core.errors import InvalidInput
from dilap.core.images import ImageInput

TOKEN_INPUTS = ("input_ids", "attention_mask", "token_type_ids")  # the names that transformers has for them


@dataclass(frozen=True, kw_only=True)
class TokenInput:
    """What an encoder of texts takes: `batch` texts of `length` tokens, as the i64 arrays TOKEN_INPUTS.

    An artifact is made for one length and one batch, and takes arrays of batch x length. A shorter text is filled with
    padding, whose mask is 0. In DiLAP the arrays of many texts are one, of texts x 3 x length.
    """

    length: int
    batch: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.length <= MAX_TOKENS or not 0 < self.batch <= MAX_BATCH:
            raise ValueError(f"1 to {MAX_TOKENS:,} tokens in a batch of 1 to {MAX_BATCH:,}, got {self}")

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape of a batch: batch x 3 x length."""
        return self.batch, *self.size

    @property
    def size(self) -> tuple[int, int]:
        """The shape of one text: 3 x length."""
        return len(TOKEN_INPUTS), self.length

    def __str__(self) -> str:
        return f"{self.length} tokens"


NetworkInput = ImageInput | TokenInput


def parse_input(text: str) -> NetworkInput:
    """Parse channels, height and width, as in `3x224x224`, or a number of tokens, as in `128`. Raises InvalidInput."""
    if not re.fullmatch(r"\d{1,9}", text.strip()):
        return ImageInput.parse(text)
    try:
        return TokenInput(length=int(text))
    except ValueError as error:
        raise InvalidInput(f"input {text!r}: {error}") from error


def of_images(input_: NetworkInput, *, name: str) -> ImageInput:
    """Return the input of an image network. Raises InvalidInput, with its `name`, for an encoder of texts."""
    if isinstance(input_, TokenInput):
        raise InvalidInput(f"{name} takes texts of {input_}, and is shown no images")
    return input_


def input_names(input_: NetworkInput) -> tuple[str, ...]:
    """Return the names of the inputs of a file for such an input."""
    return TOKEN_INPUTS if isinstance(input_, TokenInput) else ("images",)

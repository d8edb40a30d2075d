"""Weights as the formats of the runtimes store them: in blocks of 32 along a matrix's rows that share one scale.

`rounded` gives, in torch and to the last bit, the values that a runtime's own quantiser stores.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

from dilap.core.errors import InvalidInput

BLOCK = 32  # weights that share a scale
_CHUNK = 1 << 12  # blocks that are rounded at a time, so that they stay in the processor's cache
_BELOW_HALF = 0.49999997  # the largest f32 under 0.5
_IQ4_NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_NUM_TRIES = 7  # scales that llama.cpp tries on either side of the one that gives the largest weight the code -127
_TINIEST = 1e-15  # a block whose weights are all smaller becomes zeros in iq4_nl

Nearest = Callable[[torch.Tensor], torch.Tensor]  # weights divided by their scale -> codes, not yet limited


def _upwards(x: torch.Tensor, *, shift: float) -> torch.Tensor:
    """Round to integers, halves upwards, as llama.cpp does it: it cuts off the fraction of x + shift + 0.5."""
    return (x + (shift + 0.5)).floor() - shift


def _away_from_zero(x: torch.Tensor, *, shift: float = 0.0) -> torch.Tensor:
    """Round to integers as C's `roundf` does x + shift: halves away from zero."""
    x = x + shift
    return (x + torch.full_like(x, _BELOW_HALF).copysign_(x)).trunc() - shift


def _nearest_iq4_nl(x: torch.Tensor) -> torch.Tensor:
    """Return the nearest codes of iq4_nl, the upper one of two; where they change, twice `x` is an integer."""
    low, high = 2 * _IQ4_NL[0], 2 * _IQ4_NL[-1]
    return _iq4_nl_of_half(low, high)[(2 * x).floor().clamp_(low, high).sub_(low).int()]


def _iq4_nl_of_half(low: int, high: int) -> torch.Tensor:
    """Return the code of every half-open interval [n / 2, (n + 1) / 2)."""
    codes = torch.tensor(_IQ4_NL, dtype=torch.float32)
    return codes[torch.bucketize(torch.arange(low, high + 1), codes[1:] + codes[:-1], right=True)]


@dataclass(frozen=True, kw_only=True)
class Format:
    """How weights are stored: every one as a code between `least` and `most`, times the scale of its block.

    The scale is the largest weight (of either sign) divided by one of `divisors`: the first where that weight is
    positive, the second where it is negative. Where two are equally large, it is the first of them or the negative one
    (`of_equal`). With `searched`, other scales near it are tried. Weights are divided by that scale, but it is stored
    as a `scale_type`. A block is a `whole_row`, or 32 weights; a matrix whose rows these do not divide is stored in
    the format `unfilled`, or filled up with zeros where that is empty.
    """

    least: float
    most: float
    nearest: Nearest
    divisors: tuple[float, float]
    scale_type: torch.dtype
    of_equal: Literal["first", "negative"] = "first"
    searched: bool = False
    whole_row: bool = False
    unfilled: str = ""

    def codes(self, blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """Return the codes of weights (blocks x weights) for the scales of their blocks (blocks x 1)."""
        return self.nearest(blocks * _reciprocals(scales)).clamp_(self.least, self.most)

    def scales(self, blocks: torch.Tensor) -> torch.Tensor:
        """Return the scale of every block (blocks x 1), not yet as it is stored."""
        if self.searched:
            return _searched_scales(blocks)
        positive, negative = self.divisors
        largest = _first_largest(blocks) if self.of_equal == "first" else _lower_largest(blocks)
        return largest / torch.where(largest < 0, negative, positive)

    def rounded(self, blocks: torch.Tensor) -> torch.Tensor:
        scales = self.scales(blocks)
        stored = scales.to(self.scale_type).float()
        return self.codes(blocks, scales) * stored


_GGUF = partial(Format, scale_type=torch.float16, unfilled="f16")
_ONNX = partial(Format, scale_type=torch.float32, of_equal="negative")

FORMATS: Mapping[str, Format] = {
    # llama.cpp
    "q8_0": _GGUF(least=-127, most=127, nearest=_away_from_zero, divisors=(127, -127)),
    "q5_0": _GGUF(least=-16, most=15, nearest=partial(_upwards, shift=16), divisors=(-16, -16)),
    "q4_0": _GGUF(least=-8, most=7, nearest=partial(_upwards, shift=8), divisors=(-8, -8)),
    "iq4_nl": _GGUF(least=-127, most=113, nearest=_nearest_iq4_nl, divisors=(-127, -127), searched=True),
    # ONNX Runtime
    "int8": _ONNX(least=-128, most=127, nearest=partial(_away_from_zero, shift=128), divisors=(-128, -128)),
    "int4": _ONNX(least=-8, most=7, nearest=partial(_away_from_zero, shift=8), divisors=(-8, -8)),
    # ExecuTorch
    "8da4w": Format(
        least=-8, most=7, nearest=torch.round, divisors=(7.5, -7.5), scale_type=torch.bfloat16, unfilled="8da8w"
    ),
    "8da8w": Format(
        least=-128,
        most=127,
        nearest=torch.round,
        divisors=(127.5, -127.5),
        scale_type=torch.float32,
        whole_row=True,
    ),
}
FLOATS: Mapping[str, torch.dtype] = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


@torch.no_grad()
def rounded(weight: torch.Tensor, precision: str) -> torch.Tensor:
    """Return a matrix (outputs x inputs) in f32 with the values that the runtime's quantiser stores in a precision.

    They are equal to the last bit, but for two things. The search of iq4_nl adds up in f32, and is imitated as it is
    compiled for x86-64; where a compiler fuses multiplications with additions (Arm), it may choose the neighbouring
    scale once in a while. And in blocks of weights below 1e-36 a scale is no normal number in f32. GGUF files are
    written in f16 before llama.cpp quantises them: round to f16 first for what such a file holds.
    Raises InvalidInput for an unknown precision.
    """
    if precision in FLOATS:
        return weight.to(FLOATS[precision]).float()
    form = format_of(precision)
    num_columns = weight.shape[-1]
    if form.unfilled and num_columns % BLOCK:
        return rounded(weight, form.unfilled)
    padded = weight.float() if form.whole_row else torch.nn.functional.pad(weight.float(), (0, -num_columns % BLOCK))
    blocks = padded.reshape(-1, num_columns if form.whole_row else BLOCK)
    done = torch.cat([form.rounded(chunk) for chunk in blocks.split(_CHUNK)])
    return done.reshape(padded.shape)[..., :num_columns]


def format_of(precision: str) -> Format:
    """Return a format by its name. Raises InvalidInput, listing the names, for an unknown one."""
    if precision not in FORMATS:
        raise InvalidInput(f"cannot round to {precision!r}; use one of {', '.join((*FLOATS, *FORMATS))}")
    return FORMATS[precision]


def _reciprocals(scales: torch.Tensor) -> torch.Tensor:
    """Return 1 / scale, 0 where that is not finite."""
    inverse = 1 / scales
    return torch.where(inverse.isfinite(), inverse, 0.0)


def _first_largest(blocks: torch.Tensor) -> torch.Tensor:
    return blocks.gather(1, blocks.abs().argmax(1, keepdim=True))


def _lower_largest(blocks: torch.Tensor) -> torch.Tensor:
    low, high = blocks.amin(1, keepdim=True), blocks.amax(1, keepdim=True)
    return torch.where(high > -low, high, low)


def _searched_scales(blocks: torch.Tensor) -> torch.Tensor:
    """Return the scales of iq4_nl as llama.cpp finds them.

    For each of a few scales around that which gives the largest weight x the code -127, and for one that gives it 127,
    take the codes q, and the scale sum(w q x) / sum(w q q) that suits them best, with the weights' squares w as their
    importance. The best of them all has the largest sum(w q x)^2 / sum(w q q). llama.cpp adds up one after the other,
    so it is done here for many blocks at a time.
    """
    largest = _first_largest(blocks).T
    is_zero = largest.abs() < _TINIEST
    largest = torch.where(is_zero, 1.0, largest)
    columns = blocks.T.contiguous()  # 32 x blocks
    importance = columns * columns

    def fit(inverse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        codes = _nearest_iq4_nl(columns * inverse)
        weighted = importance * codes
        return _added_up(weighted * columns), _added_up(weighted * codes)

    products, squares = fit(1 / (largest / -_IQ4_NL[0]))
    found = products / squares
    best = found * products
    for shift in range(-_NUM_TRIES, _NUM_TRIES + 1):
        products, squares = fit((shift + _IQ4_NL[0]) / largest)
        better = (squares > 0) & (products * products > best * squares)
        found = torch.where(better, products / squares, found)
        best = torch.where(better, found * products, best)
    return torch.where(is_zero, 0.0, found).T


def _added_up(rows: torch.Tensor) -> torch.Tensor:
    """Return the sum of the rows (1 x columns), added up one after the other from 0."""
    total = torch.zeros_like(rows[:1])
    for row in rows:
        total += row
    return total

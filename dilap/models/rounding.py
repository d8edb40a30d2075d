"""Weights as the formats of the runtimes store them: in blocks of 32 along a matrix's rows that share one scale.

`rounded` gives, in torch and to the last bit, the values that a runtime's own quantiser stores. `compensated` gives
better ones of the same format, for which that quantiser finds the same scales and codes again: a model that is rounded
with it is exported as any other, and loses nothing more.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn import functional

from dilap.core.errors import InvalidInput
from dilap.models.compute_device import widest_float

BLOCK = 32  # weights that share a scale
_CHUNK = 1 << 12  # blocks that are rounded at a time, so that they stay in the processor's cache
_BELOW_HALF = 0.49999997  # the largest f32 under 0.5
_IQ4_NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_NUM_TRIES = 7  # scales that llama.cpp tries on either side of the one that gives the largest weight the code -127
_TINIEST = 1e-15  # a block whose weights are all smaller becomes zeros in iq4_nl
_ROWS = 1 << 11  # rows of a matrix that are compensated at a time, to bound the memory of all scales that are tried
# Scales that `compensated` tries, relative to that which stores a block's largest weight without a change. Error of
# projections of SmolLM2-135M in q4_0 relative to 1.0 alone: 1.0 to 0.8 in five steps 0.89 to 0.91, 1.05 to 0.72 in nine
# 0.87 to 0.89; a down projection with outliers 0.79 and 0.77.
SHARES = (1.05, 1.0, 0.95, 0.9, 0.85, 0.8, 0.75)

Nearest = Callable[[torch.Tensor], torch.Tensor]  # weights divided by their scale -> codes, not yet limited
Pair = tuple[float, float]  # for a positive, for a negative weight


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
    return _iq4_nl_of_half(low, high).to(x.device)[(2 * x).floor().clamp_(low, high).sub_(low).int()]


@functools.cache
def _iq4_nl_of_half(low: int, high: int) -> torch.Tensor:
    """Return the code of every half-open interval [n / 2, (n + 1) / 2)."""
    codes = torch.tensor(_IQ4_NL, dtype=torch.float32)
    return codes[torch.bucketize(torch.arange(low, high + 1), codes[1:] + codes[:-1], right=True)]


@dataclass(frozen=True, kw_only=True)
class Format:
    """How weights are stored: every one as a code between `least` and `most`, times the scale of its block.

    The runtime's quantiser divides the largest positive or the largest negative weight of a block by the one of
    `divisors` that belongs to its sign, whichever gives the larger scale (where both do, the weight that comes first if
    `first_of_equal`, else the negative one). With `searched`, it tries other scales near that one. Weights are divided
    by this scale, but it is stored as a `scale_type`. A block is a `whole_row`, or 32 weights; a matrix whose rows
    these do not divide is stored in the format `unfilled`, or filled up with zeros where that is empty.

    Where no code is as large as a divisor, a quantiser that is given what it stored finds another scale. So weights
    that lie on a grid already, whose divisors are then `grid_divisors`, are quantised with these.
    """

    least: float
    most: float
    nearest: Nearest
    divisors: Pair
    grid_divisors: Pair | None = None
    scale_type: torch.dtype
    first_of_equal: bool = False
    searched: bool = False
    whole_row: bool = False
    unfilled: str = ""

    @property
    def anchors(self) -> Pair:
        """The codes one of which a block must have, so that the quantiser finds its scale again."""
        return self.grid_divisors or self.divisors

    def codes(self, weights: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        return self.nearest(weights * _reciprocals(scales)).clamp_(self.least, self.most)

    def stored(self, blocks: torch.Tensor, divisors: Pair) -> torch.Tensor:
        """Return what weights (blocks x weights) are stored as."""
        largest, divisor = self._largest(blocks, divisors)
        scales = _searched_scales(blocks, largest) if self.searched else largest / divisor
        return self.codes(blocks, scales) * scales.to(self.scale_type).float()

    def _largest(self, blocks: torch.Tensor, divisors: Pair) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the weight of every block that sets its scale (blocks x 1), and what it is divided by."""
        high, low = blocks.amax(1, keepdim=True).clamp_(min=0), blocks.amin(1, keepdim=True).clamp_(max=0)
        by_high, by_low = (high / divisors[0]).abs(), (low / divisors[1]).abs()
        is_high = by_high > by_low
        if self.first_of_equal:
            is_first = blocks.argmax(1, keepdim=True) < blocks.argmin(1, keepdim=True)
            is_high |= (by_high == by_low) & is_first
        return torch.where(is_high, high, low), torch.where(is_high, *divisors)

    def keeps(self, blocks: torch.Tensor) -> torch.Tensor:
        """Return which blocks are stored without a change (blocks)."""
        kept = (self.stored(blocks, self.anchors) == blocks).all(1)
        if self.scale_type == torch.float16:  # GGUF files are written in f16 before they are quantised, what fits there
            halves = blocks.half().float()
            halves = torch.where(halves.isfinite(), halves, blocks)
            kept &= (self.stored(halves, self.anchors) == blocks).all(1)
        return kept

    def blocks_of(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the blocks of a matrix (blocks x weights), filled up with zeros."""
        num_columns = weight.shape[-1]
        if self.whole_row:
            return weight.float().reshape(-1, num_columns)
        return functional.pad(weight.float(), (0, -num_columns % BLOCK)).reshape(-1, BLOCK)


_GGUF = partial(Format, scale_type=torch.float16, unfilled="f16", first_of_equal=True)
_ONNX = partial(Format, scale_type=torch.float32)
_TORCHAO = partial(Format, nearest=torch.round)
FORMATS: Mapping[str, Format] = {
    # llama.cpp
    "q8_0": _GGUF(least=-127, most=127, nearest=_away_from_zero, divisors=(127, -127)),
    "q5_0": _GGUF(least=-16, most=15, nearest=partial(_upwards, shift=16), divisors=(-16, -16)),
    "iq4_nl": _GGUF(least=-127, most=113, nearest=_nearest_iq4_nl, divisors=(-127, -127), searched=True),
    "q4_0": _GGUF(least=-8, most=7, nearest=partial(_upwards, shift=8), divisors=(-8, -8)),
    # ONNX Runtime
    "int8": _ONNX(least=-128, most=127, nearest=partial(_away_from_zero, shift=128), divisors=(-128, -128)),
    "int4": _ONNX(least=-8, most=7, nearest=partial(_away_from_zero, shift=8), divisors=(-8, -8)),
    # ExecuTorch
    "8da4w": _TORCHAO(
        least=-8, most=7, divisors=(7.5, -7.5), grid_divisors=(7, -8), scale_type=torch.bfloat16, unfilled="8da8w"
    ),
    "8da8w": _TORCHAO(least=-128, most=127, divisors=(127.5, -127.5), scale_type=torch.float32, whole_row=True),
}
FLOATS: Mapping[str, torch.dtype] = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


@torch.no_grad()
def rounded(weight: torch.Tensor, precision: str) -> torch.Tensor:
    """Return a tensor (... x inputs) in f32 with the values that the runtime's quantiser stores in a precision.

    They are equal to the last bit, but for two things. The search of iq4_nl adds up in f32, and is imitated as it is
    compiled for x86-64; where a compiler fuses multiplications with additions (Arm), it may choose the neighbouring
    scale once in a while. And in blocks of weights below 1e-36 a scale is no normal number in f32. GGUF files are
    written in f16 before llama.cpp quantises them: round to f16 first for what such a file holds. Raises InvalidInput
    for an unknown precision.
    """
    if precision in FLOATS:
        return weight.to(FLOATS[precision]).float()
    form = format_of(precision)
    if form.unfilled and weight.shape[-1] % BLOCK:
        return rounded(weight, form.unfilled)
    if form.grid_divisors and is_on_grid(weight, precision):
        return weight.float()
    chunks = form.blocks_of(weight).split(_CHUNK)
    done = torch.cat([form.stored(chunk, form.divisors) for chunk in chunks])
    return done.reshape(*weight.shape[:-1], -1)[..., : weight.shape[-1]]


def is_on_grid(weight: torch.Tensor, precision: str) -> bool:
    """Return whether the quantiser of a format of blocks stores a matrix without a change."""
    form = format_of(precision)
    return all(bool(form.keeps(chunk).all()) for chunk in form.blocks_of(weight).split(_CHUNK))


def format_of(precision: str) -> Format:
    """Return a format by its name. Raises InvalidInput, listing the names, for an unknown one."""
    if precision not in FORMATS:
        raise InvalidInput(f"cannot round to {precision!r}; use one of {', '.join((*FLOATS, *FORMATS))}")
    return FORMATS[precision]


@torch.no_grad()
def compensated(weight: torch.Tensor, gram: torch.Tensor, precision: str, *, damping: float = 0.01) -> torch.Tensor:
    """Return a matrix W (outputs x inputs) rounded to R, so that tr((W - R) G (W - R)') is small.

    G (`gram`, inputs x inputs) is the Gram matrix of the inputs up to a factor, so this is the squared error of the
    outputs. Columns are rounded one after the other, and those that are left make up for what was lost (GPTQ,
    arXiv 2210.17323): in whole blocks, those of the largest inputs first, and within them likewise. The scale of a
    block is set when its turn comes: of several it is the one with the least error of the block, compensated as it will
    be. Its largest weight keeps the largest code, so that the runtime's quantiser finds every scale again, through f16
    where it comes between: `rounded` leaves the result as it is, bit for bit. Damping, relative to the mean of G's
    diagonal, limits how much columns make up for that their inputs hardly vary with. What is no format of blocks is
    rounded as `rounded` does.
    """
    gram, form = gram.to(weight.device), FORMATS.get(precision)
    if form is None or form.whole_row or (form.unfilled and weight.shape[1] % BLOCK):
        return rounded(weight, precision)
    filling = -weight.shape[1] % BLOCK
    gram = functional.pad(gram, (0, filling, 0, filling))
    order = _order(gram.diagonal())
    root = _root_of_inverse(gram[order][:, order], damping=damping)
    padded = functional.pad(weight.float(), (0, filling))
    done = torch.empty_like(padded)
    for rows, into in zip(padded.split(_ROWS), done.split(_ROWS), strict=True):
        into[:, order] = _compensated_rows(rows[:, order], root, order % BLOCK, form)
    return done[:, : weight.shape[1]]


def _order(importance: torch.Tensor) -> torch.Tensor:
    """Return the columns by falling importance, those of a block together."""
    blocks = importance.reshape(-1, BLOCK)
    order = blocks.mean(1).argsort(dim=0, descending=True, stable=True)
    within = blocks[order].argsort(dim=1, descending=True, stable=True)
    return (order[:, None] * BLOCK + within).flatten()


def _root_of_inverse(gram: torch.Tensor, *, damping: float) -> torch.Tensor:
    """Return the upper triangular U with U'U = (G + damping)^-1, in f32.

    Rows and columns in reverse order, it is the inverse of a Cholesky factor.
    """
    damped = gram.flip(0, 1).to(widest_float(gram.device))
    mean = damped.diagonal().mean()
    damped.diagonal().add_(damping * mean if mean > 0 else 1.0)
    lower = torch.linalg.cholesky(damped).float()
    identity = torch.eye(len(lower), device=lower.device)
    inverse: torch.Tensor = torch.linalg.solve_triangular(lower, identity, upper=False)
    return inverse.flip(0, 1)


def _compensated_rows(rest: torch.Tensor, root: torch.Tensor, places: torch.Tensor, form: Format) -> torch.Tensor:
    """Return the rounded columns of `rest`, which is used up; `places` are those of the columns in their blocks."""
    done = torch.empty_like(rest)
    for start in range(0, rest.shape[1], BLOCK):
        stop = start + BLOCK
        values, errors = _compensated_block(
            rest[:, start:stop].T, root[start:stop, start:stop], places[start:stop].argsort(), form
        )
        done[:, start:stop] = values.T
        rest[:, stop:].addmm_(errors.T, root[start:stop, stop:], alpha=-1)
    return done


def _compensated_block(
    columns: torch.Tensor, root: torch.Tensor, own_order: torch.Tensor, form: Format
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rounded weights of one block of columns (32 x rows), and the errors of each, divided by U's diagonal.

    `own_order` puts the columns back into the order that they have in the matrix.
    """
    scales, anchors, codes = _candidates(columns, form)
    left = columns[:, None].repeat(1, len(scales), 1)  # 32 x candidates x rows
    values, errors = torch.empty_like(left), torch.empty_like(left)
    for j in range(BLOCK):
        code = torch.where(anchors == j, codes, form.codes(left[j], scales))
        torch.mul(code, scales, out=values[j])
        torch.div(left[j] - values[j], root[j, j], out=errors[j])
        left[j + 1 :] -= root[j, j + 1 :, None, None] * errors[j]
    losses = errors.square().sum(0)
    best = losses.argmin(0)
    unsettled = rows = torch.arange(len(best), device=best.device)
    while len(unsettled):
        found = values[:, best[unsettled], unsettled][own_order]
        unsettled = unsettled[~form.keeps(found.T.contiguous())]
        losses[best[unsettled], unsettled] = torch.inf
        unsettled = unsettled[losses[:, unsettled].isfinite().any(0)]
        best[unsettled] = losses[:, unsettled].argmin(0)
    return values[:, best, rows], errors[:, best, rows]


def _candidates(columns: torch.Tensor, form: Format) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return scales to try for every row, the column that sets them, and its code (candidates x rows).

    That column has the largest positive or the largest negative weight. A scale of four bits makes every value one of
    f16, and so is always found again after a cast.
    """
    high, low = columns.max(0), columns.min(0)
    codes = torch.tensor(form.anchors, device=columns.device)[:, None]
    whole = torch.stack([high.values, low.values]) / codes
    mantissas, exponents = torch.frexp(whole)
    shared = [share * whole for share in SHARES]
    scales = torch.cat([*shared, torch.ldexp((16 * mantissas).round(), exponents - 4)])
    anchors = torch.stack([high.indices, low.indices])
    num_scales = len(SHARES) + 1
    return scales.to(form.scale_type).float(), anchors.repeat(num_scales, 1), codes.repeat(num_scales, 1)


def _reciprocals(scales: torch.Tensor) -> torch.Tensor:
    """Return 1 / scale, 0 where that is not finite."""
    inverse = 1 / scales
    return torch.where(inverse.isfinite(), inverse, 0.0)


def _searched_scales(blocks: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    """Return the scales of iq4_nl as llama.cpp finds them, given the largest weight of every block (blocks x 1).

    For each of a few scales around that which gives the largest weight x the code -127, and for the one that gives it
    127, take the codes q, and the scale sum(w q x) / sum(w q q) that suits them best, with the weights' squares w as
    their importance. The best of them all has the largest sum(w q x)^2 / sum(w q q). llama.cpp adds up one weight after
    the other; here that is done for many blocks at a time.
    """
    is_zero = largest.abs().T < _TINIEST
    largest = torch.where(is_zero, 1.0, largest.T)
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

"""How far numbers are from what they should be, in decibels; torch-free, as devices check their engines with it."""

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


def sqnr_db(reference: "NDArray[np.floating]", other: "NDArray[np.floating]") -> float:
    """Signal to quantisation noise of logits, rows centred first: a constant added to a row is no difference."""
    signal = reference.astype(np.float64) - reference.mean(axis=-1, keepdims=True, dtype=np.float64)
    noise = signal - (other.astype(np.float64) - other.mean(axis=-1, keepdims=True, dtype=np.float64))
    if not np.isfinite(noise).all():
        return -np.inf
    power = float(np.square(noise).sum())
    return 10 * float(np.log10(np.square(signal).sum() / power)) if power else np.inf

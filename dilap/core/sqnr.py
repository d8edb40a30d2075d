"""Measures of how far logits are from what they should be, without torch, because devices check their models so."""

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


def sqnr_db(reference: "NDArray[np.floating]", other: "NDArray[np.floating]") -> float:
    """Return the ratio of signal to quantisation noise of logits in dB; infinite where they are equal.

    Rows are centred first, because a constant added to a row changes nothing.
    """
    signal = reference.astype(np.float64) - reference.mean(axis=-1, keepdims=True, dtype=np.float64)
    noise = signal - (other.astype(np.float64) - other.mean(axis=-1, keepdims=True, dtype=np.float64))
    if not np.isfinite(noise).all():
        return -np.inf
    power = float(np.square(noise).sum())
    return 10 * float(np.log10(np.square(signal).sum() / power)) if power else np.inf


def kl_divergence(reference: "NDArray[np.floating]", other: "NDArray[np.floating]") -> float:
    """Return the mean over rows of KL(softmax(reference) || softmax(other)), in nats."""
    p, q = (_log_softmax(logits.astype(np.float64)) for logits in (reference, other))
    return float((np.exp(p) * (p - q)).sum(axis=-1).mean())


def _log_softmax(logits: "NDArray[np.float64]") -> "NDArray[np.float64]":
    shifted: NDArray[np.float64] = logits - logits.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted

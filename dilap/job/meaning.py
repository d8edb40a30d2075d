"""What the numbers of a result mean, in words for people who have seen no other such numbers."""

import math
from collections.abc import Sequence

# KL of SmolLM2-135M to itself in other formats, in nats a token: 8 bits 0.005, 4 bits 0.13 rounded well and 0.6 as the
# runtimes round; pruned to 70 % of its latency 1.2, to 55 % 1.9. At 3 and more its text has no sense.
_KLS: Sequence[tuple[float, str]] = (
    (0.02, "hardly to be told from the dense model, as in 8 bits"),
    (0.2, "close to the dense model, as in good 4 bits"),
    (0.7, "somewhat worse than the dense model, as in plain 4 bits"),
    (1.5, "much worse than the dense model: recovery, or a larger budget, would help"),
    (math.inf, "broken for most uses: take a larger budget"),
)
# SQNR of exported files to their torch models, in dB: f32 87 to 120, f16 27 to 56, 8 bits 22 to 40, 4 bits 4 to 16.
_SQNRS: Sequence[tuple[float, str]] = (
    (60.0, "the same numbers"),
    (40.0, "as near as 16 bits are"),
    (20.0, "as near as 8 bits are"),
    (3.0, "as near as 4 bits are"),
    (-math.inf, "far: only its scores on text tell what it is worth"),
)


def of_kl(kl: float) -> str:
    """Say what a KL to the dense model, in nats a token, means for a model."""
    return next((words for most, words in _KLS if kl <= most), _KLS[-1][1])  # of NaN, too


def of_sqnr(decibels: float) -> str:
    """Say what the SQNR of an exported file's logits to the torch model's means."""
    return next((words for least, words in _SQNRS if decibels >= least), _SQNRS[-1][1])


def is_broken(kl: float) -> bool:
    """Whether a model is so bad that no speed makes up for it."""
    return not kl <= _KLS[-2][0]  # also where it is no number

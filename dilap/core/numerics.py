"""What a network computes beside its shapes: norms, activation and positions, in one value for all exporters."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Rotary:
    """Rotary position embedding: pair i of a head's channels is turned by `frequencies[i]` radians a token.

    The frequencies are the scaled ones, and `magnitude` multiplies their sines and cosines; `kind` and `base` say what
    they were made from, as transformers names it (`default`, `linear`, `llama3`, `yarn`, `longrope`), or `partial`
    where some pairs are not turned, whose frequency is 0.
    """

    frequencies: tuple[float, ...]
    magnitude: float = 1.0
    kind: str = "default"
    base: float = 10_000.0


@dataclass(frozen=True, kw_only=True)
class LayerNumerics:
    """What a layer's attention computes: its rotary embedding, None where it does not turn its heads.

    A token sees the `window` latest tokens, itself included; None where it sees all earlier ones.
    """

    rotary: Rotary | None
    window: int | None = None


@dataclass(frozen=True, kw_only=True)
class Numerics:
    """What exporters must know of a network beside its `Architecture` and its tensors; its family reads it.

    `context_length` is the number of tokens that an exported model may hold, `norm_eps` the epsilon of every norm,
    `activation` the function's name in transformers. `layers` has one entry per layer, those without attention
    included. Products of queries and keys are multiplied by `attention_scale`, and embeddings by `embedding_scale`;
    the head is not. Where there is a soft cap c of attention scores or of logits, each x of them becomes c tanh(x / c).
    """

    context_length: int
    norm_eps: float
    activation: str
    attention_scale: float
    embedding_scale: float = 1.0
    attention_softcap: float | None = None
    logits_softcap: float | None = None
    layers: tuple[LayerNumerics, ...]

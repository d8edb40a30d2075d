"""What a network computes beside its shapes: norms, activation and positions, in one value for all exporters."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Rotary:
    """Rotary position embedding: pair i of a head's channels is turned by `frequencies[i]` radians a token.

    The frequencies are the scaled ones, and `magnitude` multiplies their sines and cosines; `kind` and `base` say what
    they were made from, as transformers names it (`default`, `linear`, `llama3`, `yarn`). `unturned_layers` are the
    indices of the layers whose heads are not turned (SmolLM3).
    """

    frequencies: tuple[float, ...]
    magnitude: float = 1.0
    kind: str = "default"
    base: float = 10_000.0
    unturned_layers: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Numerics:
    """What exporters must know of a network beside its `Architecture` and its tensors; its family reads it.

    `context_length` is the number of tokens that an exported model may hold, `norm_eps` the epsilon of every norm,
    `activation` the function's name in transformers, and `rotary` None where positions are learned. `norms` says
    whether the norm of a sublayer stands `before` it, or `after` it, between its output and the residual stream (OLMo
    2).
    """

    context_length: int
    norm_eps: float
    activation: str
    rotary: Rotary | None
    norms: Literal["before", "after"] = "before"

    def turns(self, layer: int) -> bool:
        """Return whether the heads of the layer with that index have a rotary embedding."""
        return self.rotary is not None and layer not in self.rotary.unturned_layers

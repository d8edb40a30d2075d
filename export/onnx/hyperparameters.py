"""What an ONNX graph needs beyond an Architecture: norms, activation and rotary embedding."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dilap.core.errors import Unsupported
from dilap.core.shape import Architecture
from dilap.models.context import max_tokens_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

POSITION_OFFSET = 2  # OPT's table of positions starts with two rows that no token uses
_ACTIVATIONS = ("silu", "relu", "gelu")


@dataclass(frozen=True, kw_only=True)
class Hyperparameters:
    """What a graph needs beyond an Architecture; `rope_frequencies` are radians per position, empty without rotation.

    `rope_magnitude` scales sine and cosine, so that every scaling that is constant in the sequence is held.
    """

    context_length: int = 4096
    norm_eps: float = 1e-5
    activation: str = "silu"
    rope_frequencies: tuple[float, ...] = ()
    rope_magnitude: float = 1.0


def hyperparameters(model: "PreTrainedModel", architecture: Architecture) -> Hyperparameters:
    """Read from a loaded model. Raises Unsupported for what the graph does not compute."""
    config = model.config
    activation = config.activation_function if config.model_type == "opt" else config.hidden_act
    if activation not in _ACTIVATIONS:
        raise Unsupported(f"activation {activation!r} cannot be exported to ONNX yet; known: {', '.join(_ACTIVATIONS)}")
    if config.model_type == "opt":
        if not config.do_layer_norm_before or config._remove_final_layer_norm:
            raise Unsupported("OPT with norms behind its sublayers (OPT-350m) cannot be exported to ONNX yet")
        return Hyperparameters(context_length=config.max_position_embeddings, activation=activation)
    rotary = type(model.model.rotary_emb)(config)  # afresh: in a half-precision model its frequencies are rounded
    if rotary.rope_type in ("dynamic", "longrope") or 2 * len(rotary.inv_freq) != architecture.head_dim:
        raise Unsupported(f"rotary embedding {config.rope_parameters} cannot be exported to ONNX yet")
    return Hyperparameters(
        context_length=max_tokens_of(config),
        norm_eps=config.rms_norm_eps,
        activation=activation,
        rope_frequencies=tuple(rotary.inv_freq.tolist()),
        rope_magnitude=float(rotary.attention_scaling),
    )


def probe_hyperparameters(architecture: Architecture) -> Hyperparameters:
    """Stand-ins for a model that is only timed."""
    if architecture.num_positions:
        return Hyperparameters(context_length=architecture.num_positions - POSITION_OFFSET, activation="relu")
    frequencies = (10_000.0 ** (-i / architecture.head_dim) for i in range(0, architecture.head_dim, 2))
    return Hyperparameters(rope_frequencies=tuple(frequencies))

"""What an ExecuTorch program holds beyond its weights, read from a config; needs no ExecuTorch."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, cast

from dilap.backends.executorch.bindings import MAX_CONTEXT
from dilap.core.errors import Unsupported
from dilap.core.shape import Architecture
from dilap.models.context import max_tokens_of

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedConfig

Activation = Literal["silu", "relu"]
PRECISIONS = ("8da4w", "f32")
GROUP_SIZE = 32  # input channels that share the scale of 4-bit weights; the only step that XNNPACK's kernels take
# Room for a prompt and an answer: the cache is allocated as a whole, 94 MB for SmolLM2-135M.
SCORED_TOKENS = 128  # whose logits are given at once: for a vocabulary of 50k they are 25 MB
POSITION_OFFSET = 2  # OPT keeps two rows before position 0


@dataclass(frozen=True, kw_only=True)
class Style:
    """What a layer computes beyond the shapes of an Architecture."""

    norm_eps: float = 1e-5
    activation: Activation = "silu"


@dataclass(frozen=True, kw_only=True)
class Header:
    """`frequencies` are the rotary embedding's in radians a token, one for each pair of a head's channels, and
    `magnitude` scales their sines and cosines: this holds default, linear, llama3 and yarn scaling alike."""

    architecture: Architecture
    precision: str
    max_context: int
    style: Style = field(default_factory=Style)
    frequencies: tuple[float, ...] = ()
    magnitude: float = 1.0
    bos_id: int = 0
    eos_ids: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        _require_supported(self.architecture, self.precision)

    @property
    def max_scored(self) -> int:
        """How many tokens the method `score` takes at once."""
        return min(SCORED_TOKENS, self.max_context)

    def metadata(self) -> dict[str, Any]:
        """Constant methods: those that ExecuTorch's LLM runner reads, and how many tokens `score` takes."""
        return {
            "get_max_seq_len": self.max_context,
            "get_max_context_len": self.max_context,
            "get_n_layers": len(self.architecture.layers),
            "get_vocab_size": self.architecture.vocab_size,
            "get_bos_id": self.bos_id,
            "get_eos_ids": list(self.eos_ids),
            "use_kv_cache": True,
            "use_sdpa_with_kv_cache": True,
            "enable_dynamic_shape": True,
            "get_max_scored_len": self.max_scored,  # our own
        }


def header_of(
    architecture: Architecture,
    config: "PreTrainedConfig",
    generation: "GenerationConfig | None",
    *,
    precision: str,
) -> Header:
    """Read from a model's configs. Raises Unsupported for what the program does not compute."""
    opt = config.model_type == "opt"
    if opt and not config.do_layer_norm_before:
        raise Unsupported("OPT with the norm behind the sublayer (OPT-350m) cannot be exported to ExecuTorch")
    activation = config.activation_function if opt else config.hidden_act
    if activation not in ("silu", "relu"):
        raise Unsupported(f"the ExecuTorch export computes silu and relu, the model has {activation}")
    frequencies, magnitude = ((), 1.0) if opt else _rotary(config, head_dim=architecture.head_dim)
    ids = generation if generation is not None and generation.eos_token_id is not None else config
    eos = ids.eos_token_id if ids.eos_token_id is not None else []
    return Header(
        architecture=architecture,
        precision=precision,
        max_context=min(MAX_CONTEXT, max_tokens_of(config)),
        style=Style(norm_eps=1e-5 if opt else config.rms_norm_eps, activation=cast(Activation, activation)),
        frequencies=frequencies,
        magnitude=magnitude,
        bos_id=ids.bos_token_id or 0,
        eos_ids=tuple(eos) if isinstance(eos, list | tuple) else (eos,),
    )


def probe_header(architecture: Architecture, *, precision: str) -> Header:
    """For a model with random weights."""
    positions, half = architecture.num_positions, architecture.head_dim // 2
    return Header(
        architecture=architecture,
        precision=precision,
        max_context=min(MAX_CONTEXT, positions - POSITION_OFFSET) if positions else MAX_CONTEXT,
        style=Style(activation="relu" if positions else "silu"),
        frequencies=tuple(10_000.0 ** (-index / half) for index in range(half)),
    )


def _rotary(config: "PreTrainedConfig", *, head_dim: int) -> tuple[tuple[float, ...], float]:
    """Frequencies and magnitude, as transformers computes them."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS  # noqa: PLC0415

    rope = config.rope_parameters
    kind = rope.get("rope_type", "default")
    if kind not in ("default", "linear", "llama3", "yarn") or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise Unsupported(
            f"rotary embedding {rope} cannot be exported to ExecuTorch; known: default, linear, llama3, yarn"
        )
    if kind == "default":
        return tuple(rope["rope_theta"] ** (-2 * index / head_dim) for index in range(head_dim // 2)), 1.0
    frequencies, magnitude = ROPE_INIT_FUNCTIONS[kind](config)
    return tuple(frequencies.tolist()), float(magnitude)


def _require_supported(architecture: Architecture, precision: str) -> None:
    if precision not in PRECISIONS:
        raise Unsupported(f"precision {precision!r} is not known; ExecuTorch runs {', '.join(PRECISIONS)}")
    if precision == "8da4w" and architecture.hidden_size % GROUP_SIZE:
        raise Unsupported(
            f"8da4w needs a hidden size that {GROUP_SIZE} divides, got {architecture.hidden_size}: use f32"
        )

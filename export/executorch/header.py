"""What an ExecuTorch program holds beyond its weights, read from a loaded model; needs no ExecuTorch."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dilap.backends.executorch.bindings import MAX_CONTEXT
from dilap.core.errors import Unsupported
from dilap.core.numerics import Numerics
from dilap.core.precisions import Mix
from dilap.core.shape import Architecture
from dilap.export.source_model import end_tokens, require_held
from dilap.models.anatomy import architecture_of, numerics_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ACTIVATIONS = ("silu", "relu", "gelu_pytorch_tanh")
GROUP_SIZE = 32  # input channels that share the scale of 4-bit weights; the only step that XNNPACK's kernels take
SCORED_TOKENS = 128  # whose logits are given at once: for a vocabulary of 50k they are 25 MB


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a program computes, and the ids of the tokens that begin and end a text.

    Raises Unsupported, and InvalidInput for a part or a precision that is not known.
    """

    architecture: Architecture
    numerics: Numerics
    mix: Mix
    bos_id: int = 0
    eos_ids: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        _require_supported(self.architecture, self.mix)
        if self.numerics.activation not in ACTIVATIONS:
            raise Unsupported(
                f"the ExecuTorch export computes {', '.join(ACTIVATIONS)}, the model has {self.numerics.activation}"
            )

    def precision_of(self, part: str) -> str:
        """Return a part's precision; head and embedding, where they are not named, have 8 bits even beside 4."""
        if part in ("head", "embedding") and part not in self.mix.precisions and self.mix.precision == "8da4w":
            return "8da8w"
        return self.mix.of(part)

    @property
    def max_context(self) -> int:
        """How many tokens the cache has room for."""
        return min(MAX_CONTEXT, self.numerics.context_length)

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


def header_of(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", *, mix: Mix) -> Header:
    """Read from a loaded model. Raises as Header does."""
    first = model.config.bos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    return Header(
        architecture=architecture_of(model),
        numerics=numerics_of(model),
        mix=mix,
        bos_id=first or 0,
        eos_ids=tuple(end_tokens(model, tokenizer.eos_token_id)),
    )


def _require_supported(architecture: Architecture, mix: Mix) -> None:
    require_held(architecture, backend="executorch", mix=mix)
    if mix.used != ("f32",) and architecture.hidden_size % GROUP_SIZE:
        raise Unsupported(
            f"{mix} needs a hidden size that {GROUP_SIZE} divides, got {architecture.hidden_size}: use f32"
        )

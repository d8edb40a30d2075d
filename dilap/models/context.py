"""How many tokens a model holds, and the checks of this that are made before anything is measured."""

from transformers import PreTrainedConfig

from dilap.core.errors import InvalidInput, Unsupported
from dilap.core.workload import Workload

_SLIDE_UNSAID = ("mistral", "phi3")  # families whose layers all slide, without a list of their kinds in the config
_FEWEST = 8  # tokens; an exported program is traced with five


def window_of(config: PreTrainedConfig) -> int | None:
    """Return the sliding window of a model's layers, which are all alike; None where they attend to all tokens."""
    kinds = getattr(config, "layer_types", None) or ()
    slides = "sliding_attention" in kinds or (not kinds and config.model_type in _SLIDE_UNSAID)
    return getattr(config, "sliding_window", None) if slides else None


def short_context_of(config: PreTrainedConfig) -> int | None:
    """Return up to how many tokens a text has the rotary embedding of short texts; None where all have the same."""
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "longrope" or rope["short_factor"] == rope["long_factor"]:
        return None
    return int(rope["original_max_position_embeddings"])


def max_tokens_of(config: PreTrainedConfig) -> int:
    """Return how many tokens an artifact of the model may hold.

    Exported attention reads all earlier tokens, and its rotary embedding is that of short texts. So an artifact is
    limited by the model's sliding window and by its longest short text (longrope), as by its number of positions.
    Raises Unsupported for a limit that is too small to export and check a model with.
    """
    positions: int = config.max_position_embeddings
    holds = min(positions, window_of(config) or positions, short_context_of(config) or positions)
    if holds < _FEWEST:
        raise Unsupported(
            f"the model sees {holds} tokens at once (max_position_embeddings, sliding_window and "
            f"original_max_position_embeddings of its config); fewer than {_FEWEST} cannot be exported and checked"
        )
    return holds


def context_notes(config: PreTrainedConfig) -> list[str]:
    """Return the remarks that an artifact makes about what holds fewer tokens than the model has positions."""
    window, short, positions = window_of(config), short_context_of(config), config.max_position_embeddings
    notes = []
    if window is not None and window < positions:
        notes.append(
            f"the model's attention slides over {window} tokens, the artifact's is to everything before a token: they "
            f"are the same up to {window} tokens, and the artifact's context length says so"
        )
    if short is not None and short < positions:
        notes.append(
            f"the model has other rotary frequencies in texts of more than {short} tokens, the artifact has those of "
            f"shorter texts only: they are the same up to {short} tokens, and the artifact's context length says so"
        )
    return notes


def require_sequences(config: PreTrainedConfig, length: int) -> None:
    """Raise InvalidInput where sequences of text of this `length` are longer than the model's positions."""
    if length > config.max_position_embeddings:
        raise InvalidInput(
            f"sequences of {length} tokens are longer than the model's {config.max_position_embeddings} positions; "
            f"take --calib-length {config.max_position_embeddings} or less"
        )


def require_context(config: PreTrainedConfig, workload: Workload, *, runtime: str, runtime_tokens: int | None) -> None:
    """Raise InvalidInput where a workload has more tokens than the model holds, or than its artifact for the runtime.

    `runtime_tokens` is how many an artifact for the runtime holds; None where the runtime sets no limit.
    """
    holds, owner = max_tokens_of(config), "the model"
    if runtime_tokens is not None and runtime_tokens < holds:
        holds, owner = runtime_tokens, f"what is made for {runtime}"
    elif window_of(config) == holds < config.max_position_embeddings:
        owner = "the sliding window of the model"
    elif short_context_of(config) == holds < config.max_position_embeddings:
        owner = "the model with its rotary frequencies of short texts"
    if workload.phase == "decode" and workload.context + 1 > holds:
        raise InvalidInput(
            f"one token after {workload.context} is more than {owner} holds, {holds} tokens; take --context "
            f"{holds - 1} or less"
        )
    if workload.phase == "prefill" and workload.prompt_tokens > holds:
        raise InvalidInput(
            f"a prompt of {workload.prompt_tokens} tokens is more than {owner} holds, {holds}; take --prompt-tokens "
            f"{holds} or less"
        )

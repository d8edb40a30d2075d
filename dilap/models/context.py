"""How many tokens a model holds, told before anything is measured."""

from transformers import PreTrainedConfig

from dilap.core.errors import InvalidInput, Unsupported
from dilap.core.workload import Workload

_FEWEST = 8  # tokens: a program is traced with five


def window_of(config: PreTrainedConfig) -> int | None:
    """The sliding window of a model's layers, which are all alike; None where they attend to everything."""
    kinds = getattr(config, "layer_types", None) or ()
    slides = "sliding_attention" in kinds or (not kinds and config.model_type == "mistral")
    return getattr(config, "sliding_window", None) if slides else None


def max_tokens_of(config: PreTrainedConfig) -> int:
    """How many tokens an artifact may hold: exported attention is to everything before a token, so a sliding window
    bounds the context as the number of positions does. Raises Unsupported for hardly any."""
    positions: int = config.max_position_embeddings
    holds = min(positions, window_of(config) or positions)
    if holds < _FEWEST:
        raise Unsupported(
            f"the model sees {holds} tokens at once (max_position_embeddings and sliding_window of its config); "
            f"fewer than {_FEWEST} cannot be exported and checked"
        )
    return holds


def window_notes(config: PreTrainedConfig) -> list[str]:
    """What an artifact says of a sliding window."""
    window = window_of(config)
    if window is None or window >= config.max_position_embeddings:
        return []
    return [
        f"the model's attention slides over {window} tokens, the artifact's is to everything before a token: they are "
        f"the same up to {window} tokens, and the artifact's context length says so"
    ]


def require_sequences(config: PreTrainedConfig, length: int) -> None:
    """Raises InvalidInput for calibration or evaluation text in sequences that the model has no positions for."""
    if length > config.max_position_embeddings:
        raise InvalidInput(
            f"sequences of {length} tokens are longer than the model's {config.max_position_embeddings} positions; "
            f"take --calib-length {config.max_position_embeddings} or less"
        )


def require_context(config: PreTrainedConfig, workload: Workload, *, runtime: str, runtime_tokens: int | None) -> None:
    """Raises InvalidInput where the tokens of a workload are more than the model, or what is made of it for the
    runtime, holds."""
    holds, owner = max_tokens_of(config), "the model"
    if runtime_tokens is not None and runtime_tokens < holds:
        holds, owner = runtime_tokens, f"what is made for {runtime}"
    elif window_of(config) == holds < config.max_position_embeddings:
        owner = "the sliding window of the model"
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

"""How many tokens a model holds, and the checks of this that are made before anything is measured."""

from transformers import PreTrainedConfig

from dilap.core.errors import InvalidInput
from dilap.core.workload import Workload
from dilap.models.families import family_of


def max_tokens_of(config: PreTrainedConfig) -> int:
    """Return how many tokens an artifact of the model may hold. Raises Unsupported for too few to check it with."""
    return family_of(config).max_tokens(config)


def context_notes(config: PreTrainedConfig) -> list[str]:
    """Return the remarks that an artifact makes about what holds fewer tokens than the model has positions."""
    family, positions, notes = family_of(config), config.max_position_embeddings, []
    window, short = family.window(config), family.short_context(config)
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
    elif family_of(config).window(config) == holds < config.max_position_embeddings:
        owner = "the sliding window of the model"
    elif family_of(config).short_context(config) == holds < config.max_position_embeddings:
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

"""A few answers of the dense and of the pruned model side by side, for people who would rather read than count."""

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dilap.core.codec import checked, read_json, write_json
from dilap.job.result import Answer

NUM_ANSWERS = 3
_PROMPT_TOKENS = 24  # and as many new ones


def continuations(model: PreTrainedModel, words: PreTrainedTokenizerBase, tokens: torch.Tensor) -> list[str]:
    """Return how a torch model goes on, always with the likeliest token, after the beginnings of some texts.

    `tokens` (texts x length) are the texts; the first half of each at most is shown to the model.
    """
    prompts = _prompts(tokens)
    end = model.generation_config.eos_token_id if model.generation_config else None
    padding = end[0] if isinstance(end, list) else end
    found = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=prompts.shape[1],
        do_sample=False,
        pad_token_id=padding or 0,
    )
    return [words.decode(row, skip_special_tokens=True) for row in found[:, prompts.shape[1] :]]


def kept_continuations(
    path: Path, model: PreTrainedModel, words: PreTrainedTokenizerBase, tokens: torch.Tensor
) -> list[str]:
    """Return `continuations`, which are made once and kept in the file `path`."""
    if not path.exists():
        write_json(path, {"continuations": continuations(model, words, tokens)})
    return list(checked(tuple[str, ...], read_json(path).get("continuations"), source=str(path)))


def answers(
    words: PreTrainedTokenizerBase, tokens: torch.Tensor, *, dense: Sequence[str], pruned: Sequence[str]
) -> tuple[Answer, ...]:
    """Return the beginnings of some texts, each with what both models say after it."""
    prompts = (words.decode(row, skip_special_tokens=True) for row in _prompts(tokens))
    return tuple(
        Answer(prompt=prompt, dense=one, pruned=other)
        for prompt, one, other in zip(prompts, dense, pruned, strict=True)
    )


def _prompts(tokens: torch.Tensor) -> torch.Tensor:
    return tokens[:NUM_ANSWERS, : min(_PROMPT_TOKENS, tokens.shape[1] // 2)]

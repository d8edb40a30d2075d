"""The SentencePiece tokenizer of a GGUF file (`tokenizer.ggml.model` is llama), rebuilt from its pieces and scores."""

from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers

_SPACE = "▁"  # how pieces write a space


def sentencepiece_tokenizer(fields: Mapping[str, Any], *, adds_space: bool) -> Tokenizer:
    """Return the tokenizer that joins the pair whose union has the highest score, without special tokens.

    `fields` are the file's entries by their names. `adds_space` puts a space before a text, and after special tokens.
    """
    tokens = fields["tokenizer.ggml.tokens"]
    scores = fields.get("tokenizer.ggml.scores") or [0.0] * len(tokens)
    unknown = fields.get("tokenizer.ggml.unknown_token_id")
    made = Tokenizer(
        models.BPE(
            vocab={token: index for index, token in enumerate(tokens)},
            merges=_merges(tokens, scores),
            unk_token=None if unknown is None else tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = [normalizers.Prepend(_SPACE)] if adds_space else []
    made.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", _SPACE)])
    strip = [decoders.Strip(" ", 1, 0)] if adds_space else []
    made.decoder = decoders.Sequence([decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return made


def _merges(tokens: Sequence[str], scores: Sequence[float]) -> list[tuple[str, str]]:
    """Return all pairs of tokens whose union is one, the highest score first; of equal ones the first in the file."""
    known = set(tokens)
    ranked = sorted(range(len(tokens)), key=lambda index: -scores[index])
    splits = ((tokens[i][:at], tokens[i][at:]) for i in ranked for at in range(1, len(tokens[i])))
    return [pair for pair in splits if known.issuperset(pair)]

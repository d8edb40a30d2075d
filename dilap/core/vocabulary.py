"""What a model's vocabulary was cut to, and what texts lose by it."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Growth:
    """How much longer a text becomes with fewer tokens. `finer` counts its words that are split into more tokens."""

    text: str
    characters: int
    whole_tokens: int
    tokens: int
    words: int
    finer: int

    def __post_init__(self) -> None:
        if min(self.characters, self.whole_tokens, self.tokens) < 1 or not 0 <= self.finer <= self.words:
            raise ValueError(
                f"{self.tokens} tokens of {self.characters} characters, {self.finer} of {self.words} words"
            )

    @property
    def factor(self) -> float:
        return self.tokens / self.whole_tokens

    def __str__(self) -> str:
        before, after = (1000 * count / self.characters for count in (self.whole_tokens, self.tokens))
        share = self.finer / self.words if self.words else 0.0
        return (
            f"{self.text}: {before:.1f} -> {after:.1f} tokens per 1000 characters ({self.factor - 1:+.1%}), "
            f"{share:.1%} of its words split finer"
        )


@dataclass(frozen=True, kw_only=True)
class VocabularyCut:
    """The tokens that a text needs, of all tokens of a model.

    `tokens` are the rows of the embedding that are left of `whole_tokens`, `weights` those of embedding and head
    together (counted once where they are tied). `growths` are of texts from which no token was taken.
    """

    text: str
    text_sha256: str
    tokens: int
    whole_tokens: int
    weights: int
    whole_weights: int
    growths: tuple[Growth, ...] = ()

    def __post_init__(self) -> None:
        if not 0 < self.tokens <= self.whole_tokens or not 0 < self.weights <= self.whole_weights:
            raise ValueError(f"{self.tokens} of {self.whole_tokens} tokens, {self.weights} of {self.whole_weights}")

    @property
    def note_on_quality(self) -> str:
        """What a reader must know of KL and perplexity of such a model."""
        return (
            "KL and perplexity, the dense model's too, are per token of the smaller vocabulary and among its tokens "
            "alone: texts have more tokens in it, so no numbers of another vocabulary compare with them; perplexities "
            "per word and byte do (dilap-eval --tasks wikitext)"
        )

    @property
    def notes(self) -> Sequence[str]:
        """What a reader must know of a model with this vocabulary, in sentences."""
        share = self.weights / self.whole_weights
        return (
            f"vocabulary: {self.tokens:,} of {self.whole_tokens:,} tokens are kept, those that {self.text} needs; "
            f"embedding and head have {self.weights / 1e6:.1f} M of {self.whole_weights / 1e6:.1f} M weights "
            f"({share:.1%})",
            *(f"with the smaller vocabulary, {one}" for one in self.growths),
        )

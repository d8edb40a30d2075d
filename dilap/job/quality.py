"""How good the models of a job are, on text, photographs or sentences that no search saw, and how that is said.

How far a model is from the dense one is its `distance`, whose name is `DISTANCE`: what recovery brings down.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, TypeVar

from dilap.core.codec import decode, encode, read_json, write_json
from dilap.core.errors import Crashed, Unavailable, Unsupported
from dilap.evaluation.document import ImageQuality, SentenceQuality

if TYPE_CHECKING:
    from dilap.models.text import EvaluationText


@dataclass(frozen=True, kw_only=True)
class Quality:
    """How good a model is on text that no search saw. KL is to the dense torch model, in nats a token.

    `through` is what read the text: the artifact's runtime, or `torch`, which scores the torch model in floats, as in
    all results of earlier versions. `reason` says why there are torch's numbers instead of the artifact's.
    """

    DISTANCE: ClassVar[str] = "KL"
    DISTANCE_IN_UNITS: ClassVar[str] = "KL (nats a token)"

    text: str
    text_sha256: str
    tokens: int
    kl: float
    perplexity: float
    through: str = "torch"
    reason: str = ""
    artifact_sha256: str = ""

    def __post_init__(self) -> None:
        if self.perplexity < 0 or self.tokens < 0:
            raise ValueError(f"a perplexity of {self.perplexity} on {self.tokens} tokens")

    @classmethod
    def on(cls, text: "EvaluationText", *, kl: float, perplexity: float) -> "Quality":
        """Return the quality of a torch model on `text`."""
        return cls(text=text.name, text_sha256=text.sha256, tokens=text.tokens.numel(), kl=kl, perplexity=perplexity)

    @property
    def distance(self) -> float:
        return self.kl

    @property
    def numbers(self) -> dict[str, float | None]:
        """What was found, by the names that programs read."""
        return {"kl": self.kl, "perplexity": self.perplexity}

    @property
    def shown(self) -> dict[str, str]:
        """What was found, for people."""
        return {"KL": f"{self.kl:.3f}", "perplexity": f"{self.perplexity:.2f}"}

    @property
    def read(self) -> str:
        """What the model was scored on, in words."""
        return f"{self.text} ({self.tokens} tokens, never seen by the search)"

    @property
    def source(self) -> tuple[str, str]:
        """The name and the SHA-256 of what the model was scored on."""
        return self.text, self.text_sha256


@dataclass(frozen=True, kw_only=True)
class PhotoQuality(ImageQuality):
    """How good a network is on photographs that no search saw, beside the dense torch model.

    `through` is what was shown the photographs: the artifact's runtime, or `torch`, which computes in floats. `reason`
    says why there are torch's numbers instead of the artifact's.
    """

    DISTANCE: ClassVar[str] = "KL"
    DISTANCE_IN_UNITS: ClassVar[str] = "KL (nats a photograph)"
    EXAMPLE: ClassVar[str] = "image"

    kl: float
    agreement: float
    through: str = "torch"
    reason: str = ""
    artifact_sha256: str = ""

    def __post_init__(self) -> None:
        shares = [one for one in (self.agreement, self.top1, self.top5) if one is not None]
        if self.num_images < 0 or not all(0 <= one <= 1 for one in shares):
            raise ValueError(f"shares of {shares} on {self.num_images} photographs")

    @property
    def distance(self) -> float:
        return self.kl

    @property
    def numbers(self) -> dict[str, float | None]:
        """What was found, by the names that programs read."""
        return {"kl": self.kl, "agreement": self.agreement, "top1": self.top1, "top5": self.top5}

    @property
    def shown(self) -> dict[str, str]:
        """What was found, for people."""
        shares = {"same class": self.agreement, "top-1": self.top1, "top-5": self.top5}
        return {"KL": f"{self.kl:.3f}"} | {name: f"{one:.1%}" for name, one in shares.items() if one is not None}

    @property
    def read(self) -> str:
        """What the model was scored on, in words."""
        return f"{self.images} ({self.num_images} photographs, never seen by the search)"

    @property
    def source(self) -> tuple[str, str]:
        """The name and the SHA-256 of what the model was scored on."""
        return self.images, self.images_sha256


@dataclass(frozen=True, kw_only=True)
class EmbeddingQuality(SentenceQuality):
    """How near the embeddings of an encoder of texts are to the dense torch model's, on sentences that no search saw.

    `through` is what read the sentences: the artifact's runtime, or `torch`, which computes in floats. `reason` says
    why there are torch's numbers instead of the artifact's.
    """

    DISTANCE: ClassVar[str] = "cosine distance"
    DISTANCE_IN_UNITS: ClassVar[str] = DISTANCE
    EXAMPLE: ClassVar[str] = "text"

    through: str = "torch"
    reason: str = ""
    artifact_sha256: str = ""

    def __post_init__(self) -> None:
        if self.num_sentences < 0 or not 0 <= self.same_nearest <= 1:
            raise ValueError(f"a share of {self.same_nearest} of {self.num_sentences} sentences")

    @property
    def distance(self) -> float:
        """1 less the mean cosine similarity."""
        return 1 - self.cosine

    @property
    def numbers(self) -> dict[str, float | None]:
        """What was found, by the names that programs read."""
        return {"cosine": self.cosine, "low_cosine": self.low_cosine, "same_nearest": self.same_nearest}

    @property
    def shown(self) -> dict[str, str]:
        """What was found, for people."""
        return {
            "cosine similarity": f"{self.cosine:.4f}",
            "reached by 95 %": f"{self.low_cosine:.4f}",
            "same nearest sentence": f"{self.same_nearest:.1%}",
        }

    @property
    def read(self) -> str:
        """What the model was scored on, in words."""
        return f"{self.text} ({self.num_sentences} sentences, never seen by the search)"

    @property
    def source(self) -> tuple[str, str]:
        """The name and the SHA-256 of what the model was scored on."""
        return self.text, self.text_sha256


if TYPE_CHECKING:  # the default is for type checkers: where nothing is said of a result, it is a decoder's
    import typing_extensions

    AnyQuality = typing_extensions.TypeVar("AnyQuality", Quality, PhotoQuality, EmbeddingQuality, default=Quality)
else:
    AnyQuality = TypeVar("AnyQuality", Quality, PhotoQuality, EmbeddingQuality)


def words(shown: dict[str, str]) -> str:
    """Return the names of what was found, as in "KL and perplexity"."""
    *others, last = shown
    return f"{', '.join(others)} and {last}"


def in_words(shown: dict[str, str]) -> str:
    """Return what was found with its names, as in "KL 0.123, perplexity 12.34"."""
    return ", ".join(f"{name} {value}" for name, value in shown.items())


def kept_quality(path: Path, read: Callable[[], AnyQuality], *, in_torch: AnyQuality, sha256: str) -> AnyQuality:
    """Return the quality that `read` gives, which is kept in the file `path`.

    Where only the artifact's device can read it, or the runtime crashes on it, the quality `in_torch` is returned with
    the reason and the artifact's `sha256`, so that hours of pruning are not lost.
    """
    if not path.exists():
        try:
            write_json(path, encode(read()))
        except (Crashed, Unavailable, Unsupported) as error:
            return replace(in_torch, reason=str(error), artifact_sha256=sha256)
    return decode(type(in_torch), read_json(path), source=str(path))

"""The sentences of a job of an encoder of texts: what it is searched on, and what its models are scored on."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dilap.core.errors import InvalidInput
from dilap.core.network_input import TokenInput
from dilap.evaluation.document import SentenceQuality
from dilap.evaluation.sentence_quality import cosines, sentence_quality
from dilap.job.examples import Shown, parts_of, require_enough
from dilap.job.network_options import ExampleOptions
from dilap.job.quality import EmbeddingQuality
from dilap.models.network import Examples
from dilap.models.sentences import SentenceSet, read_sentences

_MOST_SCORED = 1000  # every one is compared with all others


@dataclass(frozen=True, kw_only=True)
class ShownSentences(Shown[SentenceSet, EmbeddingQuality]):
    """The sentences of a job of an encoder of texts."""

    KIND = "sentences"
    UNIT = "text"

    input: TokenInput

    def batches(self, examples: SentenceSet) -> Iterator[Examples]:
        return examples.tokens(self.input)

    def distance(self, outputs: NDArray[np.float32], reference: NDArray[np.float32]) -> float:
        """Return 1 less the mean cosine similarity of the embeddings to the dense encoder's."""
        return 1 - float(cosines(outputs, reference).mean())

    def quality(
        self, outputs: NDArray[np.float32], reference: NDArray[np.float32], *, through: str, artifact_sha256: str
    ) -> EmbeddingQuality:
        found: SentenceQuality = sentence_quality(outputs, reference, self.evaluation)
        return EmbeddingQuality(**asdict(found), through=through, artifact_sha256=artifact_sha256)


def shown_sentences(asked: ExampleOptions, *, tokenizer: Path, input_: TokenInput) -> ShownSentences:
    """Read the sentences for an encoder, whose tokenizer is in the folder `tokenizer`.

    A sentence that is searched on is not scored. Raises InvalidInput for a text that cannot be read, and where there
    are too few sentences.
    """
    sentences = read_sentences(asked.source, tokenizer=tokenizer)
    require_enough(sentences, kind=ShownSentences.KIND)
    if asked.evaluation is None:
        half = len(sentences) // 2
        sentences, evaluation = sentences.split(train=len(sentences) - half, validation=half, seed=asked.seed)
    else:
        evaluation = _others(read_sentences(asked.evaluation, tokenizer=tokenizer), sentences)
    train, validation = parts_of(sentences, asked)
    scored, _ = evaluation.split(train=min(len(evaluation), _MOST_SCORED), validation=0, seed=asked.seed)
    return ShownSentences(name=asked.source, input=input_, train=train, validation=validation, evaluation=scored)


def _others(evaluation: SentenceSet, searched: SentenceSet) -> SentenceSet:
    """Return the sentences that are not searched on. Raises InvalidInput where fewer than two are left."""
    seen = set(searched.sentences)
    others = tuple(one for one in evaluation.sentences if one not in seen)
    if len(others) < 2:
        raise InvalidInput(
            f"{evaluation.name}: {len(others)} sentences of --eval-text are not among those of --calib, which the "
            "search sees: give another text, or leave --eval-text away to set half aside"
        )
    return replace(evaluation, sentences=others)

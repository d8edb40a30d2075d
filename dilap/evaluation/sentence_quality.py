"""How near the embeddings of an encoder of texts are to those of the dense one, on sentences that no search saw."""

import numpy as np
from numpy.typing import NDArray

from dilap.core.errors import InvalidInput, Mismatch
from dilap.evaluation.document import SentenceQuality
from dilap.models.sentences import SentenceSet


def sentence_quality(
    embeddings: NDArray[np.float32], reference: NDArray[np.float32], sentences: SentenceSet
) -> SentenceQuality:
    """Judge an encoder by the embeddings (sentences x numbers) that it and the reference give for the same sentences.

    Raises Mismatch where they have other sizes, InvalidInput for a single sentence.
    """
    similarities = cosines(embeddings, reference)
    if len(embeddings) < 2:
        raise InvalidInput(f"{sentences.name}: one sentence has no nearest other one; give more text")
    return SentenceQuality(
        text=sentences.name,
        text_sha256=sentences.sha256,
        num_sentences=len(sentences),
        cosine=float(similarities.mean()),
        low_cosine=float(np.quantile(similarities, 0.05)),
        same_nearest=float((_nearest(embeddings) == _nearest(reference)).mean()),
    )


def cosines(embeddings: NDArray[np.float32], reference: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the cosine similarity of every embedding to the reference's. Raises Mismatch for those of other sizes."""
    if embeddings.shape != reference.shape:
        raise Mismatch(f"embeddings of {embeddings.shape[1]} numbers are not those of {reference.shape[1]}")
    found: NDArray[np.float64] = (_of_length_1(embeddings) * _of_length_1(reference)).sum(axis=1)
    return found


def _of_length_1(rows: NDArray[np.float32]) -> NDArray[np.float64]:
    wide = rows.astype(np.float64)
    found: NDArray[np.float64] = wide / np.linalg.norm(wide, axis=1, keepdims=True).clip(min=1e-12)
    return found


def _nearest(embeddings: NDArray[np.float32]) -> NDArray[np.intp]:
    """Return the index of the most similar other row for every row."""
    rows = _of_length_1(embeddings)
    similarities = rows @ rows.T
    np.fill_diagonal(similarities, -np.inf)
    found: NDArray[np.intp] = similarities.argmax(axis=1)
    return found

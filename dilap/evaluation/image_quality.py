"""How good an image network is, by itself and beside the dense one, on photographs that no search saw."""

from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from dilap.core.errors import Mismatch
from dilap.core.images import ImageInput
from dilap.core.sqnr import kl_divergence
from dilap.evaluation.document import ImageQuality
from dilap.models.images import ImageSet


class ShowsImages(Protocol):
    """A network in torch, or an artifact in its runtime."""

    def outputs(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the logits (images x classes)."""


def compare_on_images(
    network: ShowsImages,
    reference: ShowsImages | None,
    images: ImageSet,
    *,
    input_: ImageInput,
    progress: Callable[[int], None] = lambda _: None,
) -> ImageQuality:
    """Show all images to a network, and to a reference if there is one.

    Raises Mismatch where they know different numbers of classes.
    """
    mine: list[NDArray[np.float32]] = []
    theirs: list[NDArray[np.float32]] = []
    for batch in images.pixels(input_):
        mine.append(network.outputs(batch))
        if reference is not None:
            theirs.append(reference.outputs(batch))
        progress(len(batch))
    return image_quality(np.concatenate(mine), np.concatenate(theirs) if theirs else None, images)


def image_quality(logits: NDArray[np.float32], reference: NDArray[np.float32] | None, images: ImageSet) -> ImageQuality:
    """Judge a network by the logits (images x classes) that it, and a reference, give for the same images."""
    labels = None if images.labels is None else np.array(images.labels)
    found = ImageQuality(
        images=images.name,
        images_sha256=images.sha256,
        num_images=len(images),
        top1=_share_among(logits, labels, 1),
        top5=_share_among(logits, labels, 5),
    )
    if reference is None:
        return found
    if logits.shape != reference.shape:
        raise Mismatch(f"the networks have other classes: logits of {logits.shape[1]} and {reference.shape[1]}")
    return replace(
        found,
        kl=kl_divergence(reference, logits),
        agreement=float((logits.argmax(1) == reference.argmax(1)).mean()),
        reference_top1=_share_among(reference, labels, 1),
        reference_top5=_share_among(reference, labels, 5),
    )


def _share_among(logits: NDArray[np.float32], labels: NDArray[np.integer] | None, count: int) -> float | None:
    """Return the share of images whose label is among the `count` preferred classes."""
    if labels is None:
        return None
    preferred = np.argsort(-logits, axis=1, kind="stable")[:, :count]
    return float((preferred == labels[:, None]).any(axis=1).mean())

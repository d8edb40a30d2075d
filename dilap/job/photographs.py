"""The photographs of a job of an image network: what it is searched on, and what its models are scored on."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray
from torch import nn

from dilap.backends.inputs import random_images
from dilap.core.errors import InvalidInput
from dilap.core.images import ImageInput, Preprocessing
from dilap.core.sqnr import kl_divergence
from dilap.evaluation.document import ImageQuality
from dilap.evaluation.image_quality import image_quality
from dilap.job.examples import Shown, parts_of, require_enough
from dilap.job.network_options import ExampleOptions
from dilap.job.quality import PhotoQuality
from dilap.models.images import ImageSet, read_images
from dilap.models.network import Examples, TorchNetwork, classes_of

# Of torchvision's reference training, which most networks for photographs follow.
_USUAL_MEAN, _USUAL_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_USUAL_SCALE = 256 / 224  # of the shorter side before the middle is taken
GUESSED = (
    "nobody says how photographs become the model's inputs: they are taken as most networks take them (the middle of "
    "the picture, ImageNet's mean and deviation); give a folder with a preprocessor_config.json as --processor"
)


@dataclass(frozen=True, kw_only=True)
class ShownPhotographs(Shown[ImageSet, PhotoQuality]):
    """The photographs of a job of an image network."""

    KIND = "photographs"
    UNIT = "img"

    input: ImageInput

    def batches(self, examples: ImageSet) -> Iterator[Examples]:
        return examples.pixels(self.input)

    def distance(self, outputs: NDArray[np.float32], reference: NDArray[np.float32]) -> float:
        """Return the mean KL of the class probabilities from the dense network's, in nats a photograph."""
        return kl_divergence(reference, outputs)

    def quality(
        self, outputs: NDArray[np.float32], reference: NDArray[np.float32], *, through: str, artifact_sha256: str
    ) -> PhotoQuality:
        found: ImageQuality = image_quality(outputs, reference, self.evaluation)
        return PhotoQuality(**asdict(found), through=through, artifact_sha256=artifact_sha256)

    @property
    def labels(self) -> tuple[int, ...] | None:
        return self.train.labels

    @property
    def remark(self) -> str:
        return ", with labels" if self.evaluation.labels is not None else ", without labels"


def shown_photographs(asked: ExampleOptions, *, model: nn.Module, input_: ImageInput) -> ShownPhotographs:
    """Read the photographs for a network.

    Raises InvalidInput for those that cannot be read or have labels of other classes, where there are too few, and
    where some are to be searched on and scored on.
    """
    num_classes = TorchNetwork(model).outputs(random_images((1, *input_.size))).shape[1]
    read = partial(read_images, classes=classes_of(model), num_classes=num_classes)
    images = read(asked.source)
    require_enough(images, kind=ShownPhotographs.KIND)
    if asked.evaluation is None:
        half = len(images) // 2
        images, evaluation = images.split(train=len(images) - half, validation=half, seed=asked.seed)
    else:
        evaluation = read(asked.evaluation)
        _require_apart(images, evaluation)
    train, validation = parts_of(images, asked)
    return ShownPhotographs(name=asked.source, input=input_, train=train, validation=validation, evaluation=evaluation)


def usual_input(input_: ImageInput) -> ImageInput:
    """Return an input that says how photographs become it: as most networks take them, where nobody said it.

    Raises InvalidInput for other images than colour photographs.
    """
    if input_.preprocessing is not None:
        return input_
    if input_.channels != len(_USUAL_MEAN):
        raise InvalidInput(
            f"nobody says how photographs become inputs of {input_}: give a folder with a preprocessor_config.json as "
            "--processor"
        )
    usual = Preprocessing(
        resize=(round(_USUAL_SCALE * max(input_.height, input_.width)),),
        mean=tuple(255 * one for one in _USUAL_MEAN),
        std=tuple(255 * one for one in _USUAL_STD),
        resample="bilinear",
    )
    return replace(input_, preprocessing=usual)


def _require_apart(images: ImageSet, evaluation: ImageSet) -> None:
    """Raise InvalidInput where photographs are in both sets, whatever their names are."""
    seen = {picture.sha256 for picture in images.pictures}
    both = [picture.name for picture in evaluation.pictures if picture.sha256 in seen]
    if both:
        others = f" and {len(both) - 1} others" if len(both) > 1 else ""
        raise InvalidInput(
            f"{evaluation.name}: {both[0]}{others} of --eval-images are among those of --calib, which the search sees: "
            "give others, or leave --eval-images away to set half aside"
        )

"""The photographs of a job of an image network: what it is searched on, and what its models are scored on."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from dilap.core.errors import InvalidInput
from dilap.core.images import ImageInput, Preprocessing
from dilap.job.network_options import Photographs
from dilap.models.images import ImageSet, read_images

_LEAST = 8  # photographs: batch norms are measured on several
# Of torchvision's reference training, which most networks for photographs follow.
_USUAL_MEAN, _USUAL_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_USUAL_SCALE = 256 / 224  # of the shorter side before the middle is taken
GUESSED = (
    "nobody says how photographs become the model's inputs: they are taken as most networks take them (the middle of "
    "the picture, ImageNet's mean and deviation); give a folder with a preprocessor_config.json as --processor"
)


@dataclass(frozen=True, kw_only=True)
class Shown:
    """The photographs of a job in three parts that share none, as a network with `input` takes them.

    Methods and recovery see `train`, recovery is judged on `validation`, and models are scored on `evaluation`.
    """

    name: str
    input: ImageInput
    train: ImageSet
    validation: ImageSet
    evaluation: ImageSet

    @cached_property
    def train_pixels(self) -> NDArray[np.float32]:
        return self.train.all_pixels(self.input)

    @cached_property
    def validation_pixels(self) -> NDArray[np.float32]:
        return self.validation.all_pixels(self.input)

    @property
    def num_searched(self) -> int:
        """How many photographs the search and the recovery see."""
        return len(self.train) + len(self.validation)

    @cached_property
    def searched_sha256(self) -> str:
        """The digest of what the search and the recovery see."""
        pictures = (*self.train.pictures, *self.validation.pictures)
        return ImageSet(name=self.name, pictures=pictures).sha256


def shown_photographs(asked: Photographs, *, input_: ImageInput, classes: Mapping[str, int], num_classes: int) -> Shown:
    """Read the photographs for a network, whose `classes` with names are numbered among `num_classes`.

    Raises InvalidInput for those that cannot be read or have labels of other classes, where there are too few, and
    where some are to be searched on and scored on.
    """
    images = read_images(asked.source, classes=classes, num_classes=num_classes)
    _require_enough(images)
    if asked.evaluation is None:
        half = len(images) // 2
        images, evaluation = images.split(train=len(images) - half, validation=half, seed=asked.seed)
    else:
        evaluation = read_images(asked.evaluation, classes=classes, num_classes=num_classes)
        _require_apart(images, evaluation)
    validation = max(1, min(asked.most_validation, len(images) // 4))
    train = min(asked.most_train, len(images) - validation)
    parts = images.split(train=train, validation=validation, seed=asked.seed)
    return Shown(name=asked.source, input=input_, train=parts[0], validation=parts[1], evaluation=evaluation)


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


def _require_enough(images: ImageSet) -> None:
    if len(images) < _LEAST:
        raise InvalidInput(f"{images.name}: {len(images)} photographs are too few to prune with; give {_LEAST} or more")


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

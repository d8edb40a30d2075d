"""Photographs for calibration and evaluation: found in a folder or on the hub, read only when they are needed."""

import csv
import functools
import hashlib
import importlib
import io
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from dilap.core.errors import InvalidInput, Unavailable, reason_of
from dilap.core.images import ImageInput

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
LABELS = "labels.csv"
KNOWN = (
    f"images are a folder of files ({' '.join(SUFFIXES)}), a folder with a folder for each class, a folder with "
    f"{LABELS} (columns file and label) beside the images, or a hub data set (user/name)"
)
_HUB_IMAGES = 2000


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One photograph. `label` is its class, a number or a name, None where it is not known."""

    name: str
    content: Callable[[], bytes]
    label: str | None = None

    @property
    def sha256(self) -> str:
        """The digest of the file's content."""
        return hashlib.sha256(self.content()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class ImageSet:
    """Photographs in the order of their names; `labels` are the classes' numbers, None where they are not known."""

    name: str
    pictures: tuple[Picture, ...]
    labels: tuple[int, ...] | None = None

    def __len__(self) -> int:
        return len(self.pictures)

    @property
    def sha256(self) -> str:
        """The digest of the files' contents and the labels."""
        hasher = hashlib.sha256()
        for picture in self.pictures:
            hasher.update(hashlib.sha256(picture.content()).digest())
        hasher.update(repr(self.labels).encode())
        return hasher.hexdigest()

    def pixels(self, input_: ImageInput, *, batch: int = 32) -> Iterator[NDArray[np.float32]]:
        """Yield the preprocessed photographs, `batch` at a time (images x channels x height x width).

        Raises InvalidInput for a photograph that cannot be read.
        """
        for start in range(0, len(self), batch):
            yield np.stack([prepared(one, input_, source=self.name) for one in self.pictures[start : start + batch]])

    def all_pixels(self, input_: ImageInput) -> NDArray[np.float32]:
        """Return all preprocessed photographs at once; those of 224x224 take 0.6 MB each."""
        return np.concatenate(list(self.pixels(input_)))

    def split(self, *, train: int, validation: int, seed: int) -> tuple[Self, Self]:
        """Return two parts at random that share no photograph, the same ones at every call. Raises InvalidInput."""
        if len(self) < train + validation:
            raise InvalidInput(
                f"{self.name}: {len(self)} images, but {train} and {validation} are needed; give more, or ask for fewer"
            )
        order = random.Random(seed).sample(range(len(self)), train + validation)
        return self._part(order[:train]), self._part(order[train:])

    def _part(self, indices: Sequence[int]) -> Self:
        labels = None if self.labels is None else tuple(self.labels[index] for index in indices)
        return replace(self, pictures=tuple(self.pictures[index] for index in indices), labels=labels)


def read_images(
    name: str, *, classes: Mapping[str, int] | None = None, num_classes: int | None = None, labelled: bool = True
) -> ImageSet:
    """Find the photographs that `name` stands for, and their labels where they have some; see KNOWN.

    A label is the number of a class, or a name among the model's `classes`. Folders that are neither are numbered in
    the order of their names, if there are `num_classes` of them. Labels are left aside unless they are asked for
    (`labelled`). Raises InvalidInput where an image cannot be opened or
    a label is no class, Unavailable where the hub or a library is missing.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        pictures = tuple(_folder_pictures(path))
    elif name.count("/") == 1 and not path.exists():
        pictures = tuple(_hub_pictures(name))
    else:
        what = "is no folder" if path.exists() else "does not exist"
        raise InvalidInput(f"images {name!r} {what}: {KNOWN}")
    if not pictures:
        raise InvalidInput(f"{name}: it holds no images; {KNOWN}")
    _require_openable(name, pictures)
    numbers = _numbers(name, pictures, classes or {}, num_classes) if labelled else None
    return ImageSet(name=name, pictures=pictures, labels=numbers)


def prepared(picture: Picture, input_: ImageInput, *, source: str) -> NDArray[np.float32]:
    """Return a photograph as the network takes it (channels x height x width). Raises InvalidInput."""
    how = input_.preprocessing
    if how is None:
        raise InvalidInput(
            "how photographs become inputs is not known: the model has no image processor; give one as --processor"
        )
    library = pillow()
    try:
        with library.open(io.BytesIO(picture.content())) as file:
            image = file.convert("RGB" if input_.channels == 3 else "L")
    except Exception as error:  # decoders raise a dozen types
        raise InvalidInput(f"{source}: {picture.name} cannot be read ({reason_of(error)}); remove it") from error
    size = how.resize if len(how.resize) == 2 else _scaled(image.height, image.width, how.resize[0])
    image = image.resize(size[::-1], library.Resampling[how.resample.upper()])
    left, top = (image.width - input_.width) // 2, (image.height - input_.height) // 2
    image = image.crop((left, top, left + input_.width, top + input_.height))
    values = np.asarray(image, np.float32).reshape(input_.height, input_.width, input_.channels)
    scaled = (values - np.array(how.mean, np.float32)) / np.array(how.std, np.float32)
    return np.ascontiguousarray(scaled.transpose(2, 0, 1), np.float32)


def _scaled(height: int, width: int, shorter: int) -> tuple[int, int]:
    """Return height and width where the shorter side has `shorter` pixels, cut to whole pixels as transformers does."""
    if height <= width:
        return shorter, int(shorter * width / height)
    return int(shorter * height / width), shorter


def pillow() -> Any:
    """Return Pillow's module of images. Raises Unavailable."""
    try:
        return importlib.import_module("PIL.Image")
    except ImportError as error:
        raise Unavailable(f"images are read by Pillow ({error}); pip install 'dilap[images]'") from error


def _folder_pictures(folder: Path) -> Iterator[Picture]:
    if (folder / LABELS).is_file():
        yield from _listed_pictures(folder)
        return
    yield from (_picture(path, folder) for path in _image_files(folder))
    for inner in sorted(one for one in folder.iterdir() if one.is_dir()):
        yield from (replace(_picture(path, folder), label=inner.name) for path in _image_files(inner))


def _image_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_file() and path.suffix.lower() in SUFFIXES)


def _picture(path: Path, folder: Path) -> Picture:
    return Picture(name=path.relative_to(folder).as_posix(), content=path.read_bytes)


def _listed_pictures(folder: Path) -> Iterator[Picture]:
    """Yield the pictures that the list of labels names. Raises InvalidInput where list and files do not agree."""
    source = folder / LABELS
    try:
        with source.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, ValueError, csv.Error) as error:
        raise InvalidInput(f"{source}: it cannot be read ({reason_of(error)})") from error
    if not rows or not {"file", "label"} <= set(rows[0]):
        raise InvalidInput(f"{source}: it needs rows with the columns file and label")
    labels = {str(row["file"]): str(row["label"] or "").strip() for row in rows}
    files = {path.name: path for path in _image_files(folder)}
    if len(labels) < len(rows):
        raise InvalidInput(f"{source}: it names {len(rows) - len(labels)} images twice")
    if absent := sorted(set(labels) - set(files)):
        raise InvalidInput(f"{source}: {_count(absent, 'it names')} that are not there")
    if unlisted := sorted(set(files) - set(labels)):
        raise InvalidInput(f"{source}: {_count(unlisted, 'it lacks')} that are beside it")
    yield from (replace(_picture(files[name], folder), label=labels[name]) for name in sorted(labels))


def _count(names: Sequence[str], doing: str) -> str:
    """Say how many images there are, and which is the first."""
    return f"{doing} {len(names)} image{'s' * (len(names) > 1)} ({names[0]}{' and others' * (len(names) > 1)})"


def _require_openable(source: str, pictures: Sequence[Picture]) -> None:
    """Raise InvalidInput where a file is no image; only its head is read."""
    library, wrong = pillow(), []
    for picture in pictures:
        try:
            library.open(io.BytesIO(picture.content())).close()
        except Exception:  # noqa: PERF203  (decoders raise a dozen types)
            wrong.append(picture.name)
    if wrong:
        raise InvalidInput(f"{source}: {_count(wrong, 'it holds')} that Pillow cannot open; remove them")


def _numbers(
    source: str, pictures: Sequence[Picture], classes: Mapping[str, int], num_classes: int | None
) -> tuple[int, ...] | None:
    """Return the number of every picture's class; None where no picture has a label. Raises InvalidInput."""
    labels = [picture.label for picture in pictures]
    if all(label is None for label in labels):
        return None
    if unlabelled := [one.name for one in pictures if one.label is None]:
        raise InvalidInput(f"{source}: {_count(unlabelled, 'it holds')} outside the folders of the classes")
    words = sorted({str(label) for label in labels})
    known = {word: int(word) for word in words if word.isdecimal()} | {w: classes[w] for w in words if w in classes}
    if not known and len(words) == num_classes:
        known = {word: number for number, word in enumerate(words)}
    wrong = [word for word in words if word not in known or (num_classes is not None and known[word] >= num_classes)]
    if wrong:
        of = f" of the model's {num_classes}" if num_classes else ""
        raise InvalidInput(f"{source}: {len(wrong)} of {len(words)} labels are no classes{of}, first {wrong[0]!r}")
    return tuple(known[str(label)] for label in labels)


def _hub_pictures(name: str) -> list[Picture]:
    """Return the first pictures of a hub data set. Raises Unavailable where it cannot be reached."""
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise Unavailable(f"hub data sets need the datasets library ({error}); pip install 'dilap[hub]'") from error
    try:
        data = datasets.load_dataset(name, split="train", streaming=True)
        columns = {type(kind): column for column, kind in reversed(data.features.items())}
        image, label = columns.get(datasets.Image), columns.get(datasets.ClassLabel)
        rows = list(data.cast_column(image, datasets.Image(decode=False)).take(_HUB_IMAGES)) if image else []
    except Exception as error:  # the hub client raises many types
        raise Unavailable(f"data set {name!r} cannot be read: {reason_of(error)}") from error
    return [
        Picture(
            name=f"image {number}",
            content=functools.partial(bytes, row[image]["bytes"]),
            label=str(row[label]) if label else None,
        )
        for number, row in enumerate(rows)
    ]

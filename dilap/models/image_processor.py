"""The preprocessing that a checkpoint's own image processor (`preprocessor_config.json`) does, as plain numbers.

An artifact says with these numbers what it is to be fed, so that nobody needs transformers to feed it. They are taken
from the processor in two ways: what it does to values (which differs from family to family: rescaling, offsets, two
divisions) is measured on images of one value, sizes are read from its settings. That both together are the processor
is then checked on a picture.
"""

import io
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
from numpy.typing import NDArray

from dilap.core.errors import InvalidInput, Unsupported, reason_of
from dilap.core.images import Filter, ImageInput, Preprocessing
from dilap.models.images import Picture, pillow, prepared
from dilap.models.pretrained import from_pretrained

CONFIG = "preprocessor_config.json"
_MOST_APART = 2.0  # of 255: the processor rounds resized values to whole numbers at other places
_BEFORE_CROP_LIMIT = 384  # ConvNeXT's processor crops below it, and squeezes to a square from it on


def read_preprocessing(folder: Path, *, channels: int = 3) -> ImageInput | None:
    """Return the input of the model in a Hugging Face folder, as its processor makes it; None where it has none.

    Raises InvalidInput where the settings cannot be read, Unsupported where they do what Preprocessing does not say.
    """
    if not (folder / CONFIG).is_file():
        return None
    library = pillow()  # transformers' own reason would be longer
    from transformers import AutoImageProcessor  # noqa: PLC0415  (it imports every processor that it has)

    try:
        processor = from_pretrained(AutoImageProcessor, folder, backend="pil", local_files_only=True)
    except InvalidInput as error:
        raise InvalidInput(f"{folder / CONFIG}: transformers cannot read it: {error}") from error
    picture = _photograph(library)
    try:
        black, white, expected = (_processed(processor, one) for one in (*_plain_images(library), picture))
    except Exception as error:  # whatever a processor raises
        raise Unsupported(f"{folder / CONFIG}: {reason_of(error)}") from error
    std = 255 / (white - black).mean(axis=(1, 2))
    mean = -black.mean(axis=(1, 2)) * std
    found = ImageInput(
        channels=channels,
        height=expected.shape[1],
        width=expected.shape[2],
        preprocessing=Preprocessing(
            resize=_resize(processor),
            mean=tuple(round(float(one), 4) for one in mean),
            std=tuple(round(float(one), 4) for one in std),
            resample=_filter(processor, library),
        ),
    )
    _require_same(found, picture, expected, folder / CONFIG)
    return found


def _processed(processor: Any, image: Any) -> NDArray[np.float32]:
    """Return what a processor makes of an image (channels x height x width)."""
    return cast("NDArray[np.float32]", np.asarray(processor(image)["pixel_values"][0], np.float32))


def _plain_images(library: Any) -> tuple[Any, Any]:
    return library.new("RGB", (600, 500), (0, 0, 0)), library.new("RGB", (600, 500), (255, 255, 255))


def _photograph(library: Any) -> Any:
    """Return a picture of smooth shapes and odd size, whose sides, colours and places all differ."""
    rows, columns = np.mgrid[0:431, 0:607].astype(np.float32)
    values = [np.sin(rows / 37 + columns / 91), np.cos(rows / 53 - columns / 29), np.sin(rows * columns / 9000)]
    return library.fromarray(np.uint8(127.5 + 127 * np.stack(values, axis=-1)))


def _resize(processor: Any) -> tuple[int, ...]:
    size = processor.size or {}
    shorter, crop = size.get("shortest_edge"), getattr(processor, "crop_pct", None)
    if not getattr(processor, "do_resize", False) or not (shorter or size.get("height")):
        raise Unsupported(f"an image processor that does not resize to one size ({type(processor).__name__})")
    if not shorter:
        return int(size["height"]), int(size["width"])
    if crop is None:
        return (int(shorter),)
    return (int(shorter / crop),) if shorter < _BEFORE_CROP_LIMIT else (int(shorter), int(shorter))


def _filter(processor: Any, library: Any) -> Filter:
    name = library.Resampling(processor.resample).name.lower()
    assert name in get_args(Filter)
    return cast(Filter, name)


def _require_same(found: ImageInput, picture: Any, expected: NDArray[np.float32], source: Path) -> None:
    """Raise Unsupported where the preprocessing does not give what the processor gives."""
    stream, how = io.BytesIO(), found.preprocessing
    assert how is not None
    picture.save(stream, "PNG")
    got = prepared(Picture(name="picture", content=stream.getvalue), found, source=str(source))
    apart = float((np.abs(got - expected) * np.array(how.std, np.float32)[:, None, None]).max())
    if apart > _MOST_APART:
        raise Unsupported(f"{source}: it does more than resize, crop and scale ({apart:.0f} of 255 apart)")

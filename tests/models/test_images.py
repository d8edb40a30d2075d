"""Photographs: where they are found, their labels, and how they become inputs."""

import io
import sys
from pathlib import Path

import numpy as np
import pytest
from standins.networks import INPUT, write_photograph

from dilap.core.errors import InvalidInput, Unavailable
from dilap.core.images import ImageInput, Preprocessing
from dilap.models.images import Picture, prepared, read_images

pytest.importorskip("PIL", reason="Pillow is not installed: pip install 'dilap[images]'")
from PIL import Image

PHOTOGRAPHS = Path(__file__).parents[2] / "shared" / "data" / "images"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(6):
        write_photograph(tmp_path / "photos" / f"{number}.png", seed=number)
    return tmp_path / "photos"


def labelled(folder: Path, *rows: str) -> Path:
    (folder / "labels.csv").write_text("\n".join(["file,label,name", *rows]) + "\n")
    return folder


def test_a_plain_folder_has_its_images_by_name_and_no_labels(folder: Path) -> None:
    (folder / "notes.txt").write_text("no image")
    found = read_images(str(folder))
    assert ([one.name for one in found.pictures], found.labels) == ([f"{number}.png" for number in range(6)], None)


def test_a_list_of_labels_is_read(folder: Path) -> None:
    found = read_images(str(labelled(folder, *(f"{number}.png,{number * 2},x" for number in range(6)))))
    assert found.labels == (0, 2, 4, 6, 8, 10)


def test_names_of_classes_are_labels_too(folder: Path) -> None:
    rows = [f"{number}.png,{'cat' if number % 2 else 'dog'},x" for number in range(6)]
    found = read_images(str(labelled(folder, *rows)), classes={"dog": 3, "cat": 7}, num_classes=8)
    assert found.labels == (3, 7, 3, 7, 3, 7)


def test_folders_of_classes_are_numbered_by_name(tmp_path: Path) -> None:
    for name in ("wolf", "ant"):
        write_photograph(tmp_path / name / "one.jpg")
    found = read_images(str(tmp_path), num_classes=2)
    assert [(one.name, label) for one, label in zip(found.pictures, found.labels or (), strict=True)] == [
        ("ant/one.jpg", 0),
        ("wolf/one.jpg", 1),
    ]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            ["0.png,1,x", "gone.png,1,x", "lost.png,2,x"],
            r"it names 2 images \(gone.png and others\) that are not there",
        ),
        (["0.png,1,x"], r"it lacks 5 images \(1.png and others\) that are beside it"),
        (["0.png,1,x", "0.png,1,x"], "it names 1 images twice"),
        ([f"{number}.png,{number + 7},x" for number in range(6)], "3 of 6 labels are no classes of the model's 10"),
        ([f"{number}.png,cat,x" for number in range(6)], "1 of 1 labels are no classes of the model's 10, first 'cat'"),
    ],
)
def test_labels_that_do_not_match_are_refused_in_one_line(folder: Path, rows: list[str], message: str) -> None:
    with pytest.raises(InvalidInput, match=message) as caught:
        read_images(str(labelled(folder, *rows)), num_classes=10)
    assert "\n" not in str(caught.value)


def test_a_list_without_the_columns_is_refused(folder: Path) -> None:
    (folder / "labels.csv").write_text("path,class\n0.png,1\n")
    with pytest.raises(InvalidInput, match="columns file and label"):
        read_images(str(folder))


def test_files_that_are_no_images_are_counted(folder: Path) -> None:
    for name in ("1.png", "4.png"):
        (folder / name).write_bytes(b"no image")
    with pytest.raises(InvalidInput, match=r"it holds 2 images \(1.png and others\) that Pillow cannot open"):
        read_images(str(folder))


def test_an_image_that_ends_in_the_middle_is_named_when_it_is_read(folder: Path) -> None:
    path = folder / "3.png"
    path.write_bytes(path.read_bytes()[:2000])
    images = read_images(str(folder))
    with pytest.raises(InvalidInput, match=r"3\.png cannot be read"):
        images.all_pixels(INPUT)


def test_images_outside_the_folders_of_classes_are_refused(folder: Path) -> None:
    write_photograph(folder / "cat" / "one.jpg")
    with pytest.raises(InvalidInput, match=r"holds 6 images \(0.png and others\) outside the folders of the classes"):
        read_images(str(folder))


@pytest.mark.parametrize("name", ["nothing/at/all", "absent"])
def test_what_does_not_exist_is_refused_with_what_can_be_given(name: str) -> None:
    with pytest.raises(InvalidInput, match=r"does not exist: images are a folder of files"):
        read_images(name)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="it holds no images"):
        read_images(str(tmp_path))


def test_a_hub_data_set_without_a_network_is_refused_in_one_line() -> None:
    pytest.importorskip("datasets", reason="datasets is not installed")
    with pytest.raises(Unavailable, match="data set 'somebody/photos' cannot be read") as caught:
        read_images("somebody/photos")
    assert "\n" not in str(caught.value)


def test_a_hub_data_set_gives_images_with_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    stream = io.BytesIO()
    Image.new("RGB", (40, 40), (10, 20, 30)).save(stream, "PNG")
    kinds = datasets.Features(
        {"id": datasets.Value("int64"), "image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])}
    )
    rows = {"id": [1, 2], "image": [{"bytes": stream.getvalue(), "path": None}] * 2, "label": [1, 0]}
    data = datasets.Dataset.from_dict(rows, features=kinds).to_iterable_dataset()
    monkeypatch.setattr(datasets, "load_dataset", lambda name, **_: data)
    found = read_images("somebody/photos", num_classes=2)
    assert (found.labels, found.all_pixels(INPUT).shape) == ((1, 0), (2, 3, 32, 32))


def test_without_pillow_the_reason_says_how_to_get_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(Unavailable, match=r"pip install 'dilap\[images\]'"):
        read_images(str(folder))


def test_splits_share_no_image_and_are_the_same_again(folder: Path) -> None:
    images = read_images(str(labelled(folder, *(f"{number}.png,{number},x" for number in range(6)))))
    (train, validation), again = (images.split(train=3, validation=2, seed=5) for _ in range(2))
    names = [[one.name for one in part.pictures] for part in (train, validation)]
    assert (len(set(names[0]) | set(names[1])), [f"{label}.png" for label in train.labels or ()]) == (5, names[0])
    assert names == [[one.name for one in part.pictures] for part in again]


def test_another_seed_gives_another_split(folder: Path) -> None:
    images = read_images(str(folder))
    first, second = (images.split(train=3, validation=3, seed=seed)[0] for seed in (0, 1))
    assert first.pictures != second.pictures


def test_a_split_of_more_images_than_there_are_is_refused(folder: Path) -> None:
    with pytest.raises(InvalidInput, match="6 images, but 5 and 2 are needed"):
        read_images(str(folder)).split(train=5, validation=2, seed=0)


def test_the_digest_depends_on_labels_and_contents(folder: Path) -> None:
    bare = read_images(str(folder)).sha256
    with_labels = read_images(str(labelled(folder, *(f"{number}.png,{number},x" for number in range(6))))).sha256
    write_photograph(folder / "0.png", seed=9)
    assert len({bare, with_labels, read_images(str(folder)).sha256}) == 3


def picture(image: Image.Image) -> Picture:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return Picture(name="picture", content=stream.getvalue)


def test_values_are_scaled_channel_by_channel() -> None:
    found = prepared(picture(Image.new("RGB", (50, 40), (255, 120, 36))), INPUT, source="test")
    expected = np.array([1.0, 0.0, -1.0], np.float32)[:, None, None]
    np.testing.assert_array_equal(found, np.broadcast_to(expected, (3, 32, 32)))


def test_the_middle_is_taken_after_the_shorter_side_is_resized() -> None:
    values = np.zeros((40, 80, 3), np.uint8)
    values[:, 40:] = 200  # the right half is bright
    input_ = ImageInput(
        channels=3,
        height=20,
        width=20,
        preprocessing=Preprocessing(resize=(20,), mean=(0,) * 3, std=(1,) * 3, resample="nearest"),
    )
    found = prepared(picture(Image.fromarray(values)), input_, source="test")
    np.testing.assert_array_equal(found[0], np.tile([0.0] * 10 + [200.0] * 10, (20, 1)))


def test_a_network_of_one_channel_is_shown_grey() -> None:
    input_ = ImageInput(
        channels=1, height=8, width=8, preprocessing=Preprocessing(resize=(8, 8), mean=(0,), std=(255,))
    )
    found = prepared(picture(Image.new("RGB", (50, 40), (255, 255, 255))), input_, source="test")
    np.testing.assert_array_equal(found, np.ones((1, 8, 8), np.float32))


def test_without_preprocessing_no_photograph_is_shown() -> None:
    input_ = ImageInput.parse("3x32x32")
    with pytest.raises(InvalidInput, match="the model has no image processor"):
        prepared(picture(Image.new("RGB", (50, 40))), input_, source="test")


def test_contents_are_read_only_when_they_are_needed(folder: Path) -> None:
    images = read_images(str(folder))
    write_photograph(folder / "5.png", seed=99)
    changed = images.all_pixels(INPUT)[5]
    assert not np.array_equal(changed, images.all_pixels(INPUT)[4])
    np.testing.assert_array_equal(changed, prepared(images.pictures[5], INPUT, source="test"))


def test_real_photographs_are_read_with_their_labels() -> None:
    if not (PHOTOGRAPHS / "labels.csv").is_file():
        pytest.skip(f"{PHOTOGRAPHS} is not here")
    found = read_images(str(PHOTOGRAPHS), num_classes=1000)
    assert found.labels is not None
    assert len(found) == len(found.labels) >= 100
    assert next(found.pixels(INPUT, batch=2)).shape == (2, 3, 32, 32)

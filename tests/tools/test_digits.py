"""The bench on digits: its network, its pictures, and a row of its table."""

import re
from pathlib import Path

import pytest
import torch

from dilap.models.convolutional.proof import stand_in
from dilap.models.distil_network import NetworkRecovery
from dilap.models.images import read_images
from tools import digits

pytest.importorskip("sklearn", reason="scikit-learn is not installed")
pytest.importorskip("PIL", reason="Pillow is not installed")


def test_resnet20_is_that_of_its_paper() -> None:
    model = digits.resnet20()
    layers = [name for name, one in model.named_modules() if isinstance(one, torch.nn.Conv2d | torch.nn.Linear)]
    assert len([name for name in layers if "shortcut" not in name]) == 20
    assert round(sum(one.numel() for one in model.parameters()) / 1e6, 2) == 0.27


def test_a_digit_is_a_picture_in_the_folder_of_its_class_and_in_one_part_alone(tmp_path: Path) -> None:
    digits.write_pictures(tmp_path, limit=50)
    train, test = (read_images(str(tmp_path / part), num_classes=10) for part in ("train", "test"))
    assert (len(train), len(test)) == (40, 10)
    assert {one.sha256 for one in train.pictures}.isdisjoint(one.sha256 for one in test.pictures)
    assert train.labels == tuple(int(one.name.split("/")[0]) for one in train.pictures)


def test_a_row_says_what_is_left_and_how_good_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digits, "trained", lambda _: stand_in(digits.resnet20()).float())
    write = digits.write_pictures
    monkeypatch.setattr(digits, "write_pictures", lambda out: write(out, limit=30))
    out = tmp_path / "digits"
    source = digits.source_in(out)
    assert digits.source_in(out).digest == source.digest  # it is not trained again
    train, test = (digits.of_folder(out / part, source) for part in ("train", "test"))
    bench = digits.Bench(source=source, train=train, test=test)
    row = bench.row("uniform", share_left=0.5, recovery=NetworkRecovery(mode="full", steps=1))
    number = r"[\d.]+"
    found = re.fullmatch(rf"\| uniform \| 0 \| ({number})% \| {number}% \| {number} \| {number}% \| {number} \|", row)
    assert found is not None, row
    assert 40 < float(found[1]) <= 50

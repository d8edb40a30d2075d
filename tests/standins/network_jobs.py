"""A classifier and photographs for prune jobs of image networks."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import ViTImageProcessorPil

from dilap.job import api
from dilap.job.quality import PhotoQuality
from dilap.job.result import PruneResult
from dilap.models.convolutional.load import save_network
from dilap.models.convolutional.proof import stand_in
from standins.networks import write_photograph
from tools.tiny_networks import resnet

Result = PruneResult[PhotoQuality]


@dataclass(frozen=True, kw_only=True)
class Place:
    """A classifier of 7 classes, photographs of them, and a folder for runs."""

    classifier: Path
    photographs: Path
    runs: Path

    def prune(self, name: str = "run", **options: Any) -> Result:
        given: dict[str, Any] = {"method": "uniform", "budget": "80%", "backend": "onnxruntime"}
        given["calib"] = str(self.photographs)
        out: dict[str, Any] = {"out": self.runs / name, "cache": self.runs / "cache", "progress": lambda _: None}
        found = api.prune(str(self.classifier), **out | given | options)
        assert found is not None
        return found


def place_in(folder: Path) -> Place:
    classifier = folder / "resnet"
    wide = resnet(embedding_size=16, hidden_sizes=[32, 64])  # so that there are several multiples of 8 channels
    save_network(stand_in(wide).float(), classifier)
    processor = ViTImageProcessorPil(size={"height": 32, "width": 32}, image_mean=[0.5] * 3, image_std=[0.25] * 3)
    processor.save_pretrained(classifier)
    return Place(classifier=classifier, photographs=write_photographs(folder / "photos"), runs=folder / "runs")


def write_photographs(folder: Path, *, count: int = 16, first: int = 0) -> Path:
    for number in range(first, first + count):
        write_photograph(folder / str(number % 7) / f"{number}.png", seed=number)
    return folder

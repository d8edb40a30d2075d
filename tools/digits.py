"""ResNet-20 on scikit-learn's digits, pruned with every method to a share of its FLOPs, before and after recovery.

    tools/digits
    tools/digits --share 0.35 --methods uniform halp --steps 300 --seeds 3

The network is trained once, in a minute, and kept in --out with the digits as pictures, in folders of their classes. It
can so be pruned to a latency too:

    dilap-compare --model tools.digits:resnet20 --weights runs/digits/model --processor runs/digits/processor \\
        --calib runs/digits/train --eval-images runs/digits/test --target host_cpu --budget 50% --methods all

Methods and recovery see pictures of the training half, and accuracies are those of the others.
"""

import argparse
import copy
import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from dilap import methods
from dilap.cli.arguments import Several, share
from dilap.cli.console import run
from dilap.core.codec import written_aside
from dilap.core.graph import Network
from dilap.core.sqnr import kl_divergence
from dilap.models.convolutional.cut import shrink_network_
from dilap.models.convolutional.load import NetworkSource, load_network, save_network
from dilap.models.convolutional.recalibration import recalibrate_
from dilap.models.distil_network import NetworkRecovery, distil_network
from dilap.models.images import pillow, read_images
from dilap.models.inner_states import states_of
from dilap.models.network import TorchNetwork
from dilap.profilers.tables.networks.costs import counted
from dilap.search.limit import CostLimit
from dilap.search.method import Pruned
from dilap.search.network_task import NetworkTask

_SIDE, _NUM_TEST = 16, 360  # pixels of a picture, of which the digits have 8; digits that are only scored
_EPOCHS, _BATCH, _RATE, _MOMENTUM, _DECAY = 20, 64, 0.1, 0.9, 5e-4


class Residual(nn.Module):
    """A basic block of He et al. (arXiv 1512.03385)."""

    def __init__(self, inputs: int, outputs: int, *, stride: int) -> None:
        super().__init__()
        self.first, self.first_norm = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.second, self.second_norm = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        is_same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if is_same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)
        self.shortcut_norm = nn.Identity() if is_same else nn.BatchNorm2d(outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = functional.relu(self.first_norm(self.first(x)))
        made: torch.Tensor = functional.relu(
            self.second_norm(self.second(inner)) + self.shortcut_norm(self.shortcut(x))
        )
        return made


class ResNet20(nn.Module):
    """Three stages of three blocks, of 16, 32 and 64 channels, for ten classes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.blocks = nn.Sequential(
            *(Residual(16, 16, stride=1) for _ in range(3)),
            *(Residual(16 if number == 0 else 32, 32, stride=2 if number == 0 else 1) for number in range(3)),
            *(Residual(32 if number == 0 else 64, 64, stride=2 if number == 0 else 1) for number in range(3)),
        )
        self.head = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = self.blocks(functional.relu(self.stem_norm(self.stem(x)))).mean((2, 3))
        logits: torch.Tensor = self.head(features)
        return logits


def resnet20() -> nn.Module:
    """Return the network before training: what `--model tools.digits:resnet20` builds."""
    return ResNet20()


@dataclass(frozen=True, kw_only=True)
class Digits:
    """Pictures as the network takes them, and their classes."""

    pixels: NDArray[np.float32]
    labels: tuple[int, ...]

    def accuracy(self, logits: NDArray[np.float32]) -> float:
        return float((logits.argmax(1) == np.array(self.labels)).mean())


def write_pictures(out: Path, *, limit: int | None = None) -> None:
    """Write the digits into `out`/train and `out`/test, in folders of their classes, and how they become inputs."""
    from transformers import ViTImageProcessorPil  # noqa: PLC0415  (it imports every processor that it has)

    found = importlib.import_module("sklearn.datasets").load_digits()
    order = np.random.default_rng(0).permutation(len(found.target))[:limit]
    for place, number in enumerate(order):
        part = "test" if place < _NUM_TEST * len(order) // len(found.target) else "train"
        path = out / part / str(found.target[number]) / f"{number:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        grey = pillow().fromarray((found.images[number] * 255 / 16).astype(np.uint8))  # it has values up to 16
        grey.resize((_SIDE, _SIDE), pillow().Resampling.BILINEAR).save(path)
    size = {"height": _SIDE, "width": _SIDE}
    ViTImageProcessorPil(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(out / "processor")


def trained(digits: Digits, *, epochs: int = _EPOCHS) -> nn.Module:
    """Return a ResNet-20 that was trained with SGD on shifted pictures."""
    torch.manual_seed(0)
    model, draw = ResNet20().train(), np.random.default_rng(0)
    sgd = torch.optim.SGD(model.parameters(), lr=_RATE, momentum=_MOMENTUM, weight_decay=_DECAY, nesterov=True)
    steps = epochs * -(-len(digits.labels) // _BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(sgd, max_lr=_RATE, total_steps=steps)
    pixels, labels = torch.from_numpy(digits.pixels), torch.tensor(digits.labels)
    for _ in range(epochs):
        for rows in torch.from_numpy(draw.permutation(len(labels))).split(_BATCH):
            shifts = tuple(draw.integers(-2, 3, size=2).tolist())
            sgd.zero_grad()
            functional.cross_entropy(model(pixels[rows].roll(shifts, (2, 3))), labels[rows]).backward()
            sgd.step()
            schedule.step()
    return model.eval()


def of_folder(folder: Path, source: NetworkSource) -> Digits:
    found = read_images(str(folder), num_classes=10)
    assert found.labels is not None
    return Digits(pixels=found.all_pixels(source.image_input), labels=found.labels)


def source_in(out: Path) -> NetworkSource:
    """Return the trained network in `out`, which is trained where that was not done yet."""
    if not (out / "train").is_dir():
        with written_aside(out) as folder:
            folder.mkdir(exist_ok=True)
            write_pictures(folder)
    processor = out / "processor"
    if not (out / "model").is_dir():
        untrained = load_network("tools.digits:resnet20", processor=processor)
        save_network(trained(of_folder(out / "train", untrained)), out / "model")
    return load_network("tools.digits:resnet20", processor=processor, weights=out / "model")


@dataclass(frozen=True, kw_only=True)
class Bench:
    """The trained network and digits to prune it with, to recover it with, and to score it on."""

    source: NetworkSource
    train: Digits
    test: Digits

    def row(self, method: str, *, share_left: float, recovery: NetworkRecovery) -> str:
        """Prune with a method, recover, and return what came of it as a row of a table."""
        network, model = self.source.traced.network, copy.deepcopy(self.source.model)
        pruned = self._pruned(method, share_left, recovery.seed)
        shrink_network_(model, pruned.plan, parameters=pruned.parameters)
        recalibrate_(model, self.train.pixels)
        before = self._scores(model)
        distil_network(model, self.source.model, self.train.pixels, recovery, states=states_of(pruned.plan))
        left = network.flops(pruned.plan.counts) / network.flops()
        return f"| {method} | {recovery.seed} | {left:.1%} | {before} | {self._scores(model)} |"

    def _pruned(self, method: str, share_left: float, seed: int) -> Pruned[Network]:
        network = self.source.traced.network
        costs = counted(network, "operations")
        found = methods.get(method, table=methods.NETWORK_METHODS)(
            NetworkTask(
                model=self.source.model,
                base=self.source.digest,
                network=network,
                images=self.train.pixels,
                labels=self.train.labels,
                cost_limit=CostLimit(limit=share_left * costs.predict({}), predict=costs.predict),
                costs=costs,
                seed=seed,
            )
        )
        return found if isinstance(found, Pruned) else Pruned(plan=found)

    def _scores(self, model: nn.Module) -> str:
        logits, dense = (TorchNetwork(one).outputs(self.test.pixels) for one in (model, self.source.model))
        return f"{self.test.accuracy(logits):.2%} | {kl_divergence(dense, logits):.3f}"

    def rows(self, names: list[str], *, share_left: float, steps: int, seeds: int) -> Iterator[str]:
        """Yield the lines of the table, the dense network's first."""
        yield "| method | seed | FLOPs left | top-1 | KL | top-1 recovered | KL recovered |"
        yield "|---|---|---|---|---|---|---|"
        dense = self._scores(self.source.model)
        yield f"| dense | | 100.0% | {dense} | | |"
        for name in names:
            for seed in range(seeds):
                recovery = NetworkRecovery(mode="full", steps=steps, seed=seed)
                yield self.row(name, share_left=share_left, recovery=recovery)


def _main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=share, default=0.5, help="of the FLOPs that is left (%(default)s)")
    parser.add_argument("--methods", action=Several, default=["all"], metavar="NAME", help="(all)")
    parser.add_argument("--steps", type=int, default=NetworkRecovery().steps, help="of recovery (%(default)s)")
    parser.add_argument("--seeds", type=int, default=1, help="of HALP's training and of recovery (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/digits"))
    given = parser.parse_args()
    source = source_in(given.out)
    bench = Bench(
        source=source, train=of_folder(given.out / "train", source), test=of_folder(given.out / "test", source)
    )
    names = methods.named(given.methods, table=methods.NETWORK_METHODS)
    for line in bench.rows(names, share_left=given.share, steps=given.steps, seeds=given.seeds):
        print(line, flush=True)
    return 0


if __name__ == "__main__":
    run(_main)

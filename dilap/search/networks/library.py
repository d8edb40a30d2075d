"""The level library of a network: the units that stay at every level, and the refitted weights of the layers after it.

A layer's output is W x + b, with x what it reads at one position. Without some units, entries of x are gone; the
weights that are left are refitted in closed form, so that the output stays as near as it can be, over a sample of
positions of the training images. Where a bias or a batch norm can keep the mean of the output, only what x varies
around its mean counts. Which units stay follows from the same refits, every output weighed by the mean square of the
loss's gradient there.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from dilap.core.graph import Branch, Layer, Network
from dilap.core.space import Space
from dilap.models.convolutional.readers import Passing, Reader, matrix_of, norms_behind, readers_of
from dilap.models.network import Examples, batches_of, evaluating, gives_embeddings, outputs_of
from dilap.models.tensor_file import Tensors, computed_once
from dilap.search.library import refit, regularised, removal_order

_AT_ONCE = 4  # images in a pass that keeps activations
_POSITIONS = 64  # of one image, at most: neighbours in an image are alike, so that more of them tell little more
_STEPS = 32  # in which all units of a group are removed one after another


@dataclass(frozen=True, kw_only=True)
class LibraryOptions:
    """`ridge` is relative to the mean diagonal of the covariance of what a layer reads."""

    ridge: float = 0.01


@dataclass(frozen=True, kw_only=True)
class Patch:
    """New weights of a layer whose other inputs stay as they are.

    Of the inputs `own`, only `kept` are left, with the weights `weight` (outputs x kept).
    """

    layer: str
    own: torch.Tensor
    kept: torch.Tensor
    weight: torch.Tensor

    def put_(self, matrix: torch.Tensor) -> None:
        """Write the weights into the matrix of the layer (outputs x inputs)."""
        matrix[:, self.own] = 0
        matrix[:, self.kept] = self.weight


@dataclass(frozen=True, kw_only=True)
class Change:
    """What a level of one group, or the removal of a branch, changes: the units that stay, and weights of layers."""

    units: tuple[int, ...]
    patches: tuple[Patch, ...]


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """What a layer reads: the second moments of its inputs (inputs x inputs) around `mean`, and that (inputs).

    Where the layer's mean output cannot be kept, `mean` is zero. `weights` are how much the loss depends on each
    output: the square of its gradient, summed over positions and images (outputs); all 1 where no output matters.
    """

    moments: torch.Tensor
    mean: torch.Tensor
    weights: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class NetworkLibrary:
    """The changes of all groups, by their names and numbers of units, and of all branches, by the first group's name.

    `layers` are those that read units, `means` what each of them reads in the mean, and zero where its mean output
    cannot be kept.
    """

    groups: Mapping[str, Mapping[int, Change]]
    removals: Mapping[str, Change]
    layers: Mapping[str, Layer]
    means: Mapping[str, torch.Tensor]


def build_library(
    model: nn.Module,
    space: Space[Network],
    images: Examples,
    *,
    options: LibraryOptions,
    seed: int,
    kept: Path | None = None,
) -> NetworkLibrary:
    """Fit all levels of a space on images; what is fitted is kept in the file `kept`, and read where it is there."""
    network = space.architecture
    readers = readers_of(network)
    layers = {one.layer.name: one.layer for found in readers.values() for one in found}
    counts: dict[str, set[int]] = {group.name: set() for group in network.groups}
    for choice in space.choices:
        for level in choice.levels:
            for group, count in zip(choice.block.groups, level.counts, strict=True):
                counts[group.name].add(count)
    wanted = {group.name: sorted(counts[group.name] - {0, group.num_units}, reverse=True) for group in network.groups}
    matrices = {
        name: matrix_of(model.get_parameter(layer.weight).detach(), layer).float() for name, layer in layers.items()
    }

    def fitted() -> Tensors:
        statistics = layer_statistics(model, layers, images, seed=seed)
        found = {f"mean {name}": one.mean for name, one in statistics.items()}
        for name, numbers in wanted.items():
            for change in fit_group(readers[name], numbers, matrices, statistics, options=options):
                found |= _as_tensors(name, change)
        return found

    tensors = computed_once(kept, fitted)
    return NetworkLibrary(
        groups={
            name: {count: _from_tensors(name, count, readers[name], tensors) for count in numbers}
            for name, numbers in wanted.items()
        },
        removals={branch.groups[0]: _removal(branch, matrices) for branch in network.branches},
        layers=layers,
        means={name: tensors[f"mean {name}"] for name in layers},
    )


def _as_tensors(group: str, change: Change) -> dict[str, torch.Tensor]:
    """Return what was fitted of a change of one group."""
    count = len(change.units)
    weights = {f"weight {number} {count} {group}": one.weight for number, one in enumerate(change.patches)}
    return {f"units {count} {group}": torch.tensor(change.units), **weights}


def _from_tensors(group: str, count: int, readers: Sequence[Reader], tensors: Tensors) -> Change:
    units = tensors[f"units {count} {group}"]
    patches = [
        _patch(reader, units, weight=tensors[f"weight {number} {count} {group}"])
        for number, reader in enumerate(readers)
    ]
    return Change(units=tuple(units.tolist()), patches=tuple(patches))


def _removal(branch: Branch, matrices: Mapping[str, torch.Tensor]) -> Change:
    """Return the change that removes a branch: its last layer reads nothing."""
    every, none = torch.arange(matrices[branch.last].shape[1]), torch.arange(0)
    patch = Patch(layer=branch.last, own=every, kept=none, weight=matrices[branch.last][:, none])
    return Change(units=(), patches=(patch,))


def fit_group(
    readers: Sequence[Reader],
    counts: Sequence[int],
    matrices: Mapping[str, torch.Tensor],
    statistics: Mapping[str, Statistics],
    *,
    options: LibraryOptions,
) -> list[Change]:
    """Return the change that keeps each of these numbers of units of a group, the best ones."""
    if not counts:
        return []
    own = [one.columns.flatten() for one in readers]
    weights = [matrices[one.layer.name][:, columns] for one, columns in zip(readers, own, strict=True)]
    damped = [
        regularised(statistics[one.layer.name].moments[columns][:, columns], ridge=options.ridge)
        for one, columns in zip(readers, own, strict=True)
    ]
    scales = [statistics[one.layer.name].weights.sqrt()[:, None] for one in readers]
    weighed = [
        (scale * weight, one, reader.columns.shape[1])
        for scale, weight, one, reader in zip(scales, weights, damped, readers, strict=True)
    ]
    order = removal_order(weighed, step=max(1, readers[0].columns.shape[0] // _STEPS))
    products = [weight @ one for weight, one in zip(weights, damped, strict=True)]
    return [_change(readers, order[:count].sort().values, products=products, damped=damped) for count in counts]


def _change(
    readers: Sequence[Reader],
    units: torch.Tensor,
    *,
    products: Sequence[torch.Tensor],
    damped: Sequence[torch.Tensor],
) -> Change:
    """Return the change that keeps some units, with the weights of all layers that read them refitted."""
    patches = []
    for reader, product, one in zip(readers, products, damped, strict=True):
        patches.append(_patch(reader, units, weight=refit(product, one, _among_own(reader, units))))
    return Change(units=tuple(units.tolist()), patches=tuple(patches))


def _patch(reader: Reader, units: torch.Tensor, *, weight: torch.Tensor) -> Patch:
    own = reader.columns.flatten()
    return Patch(layer=reader.layer.name, own=own, kept=own[_among_own(reader, units)], weight=weight)


def _among_own(reader: Reader, units: torch.Tensor) -> torch.Tensor:
    """Return where the inputs of some units are among those that a layer reads of their group."""
    size = reader.columns.shape[1]
    return (units[:, None] * size + torch.arange(size)).flatten()


def layer_statistics(
    model: nn.Module, layers: Mapping[str, Layer], images: Examples, *, seed: int
) -> dict[str, Statistics]:
    """Return the statistics of what layers read over images, at a random sample of positions of every image."""
    generator = torch.Generator().manual_seed(seed)
    sums: dict[str, _Sums] = {}
    with evaluating(model):
        norms = norms_behind(model, layers, lambda: outputs_of(model, next(batches_of(images, 2, model=model))))
        for batch in batches_of(images, _AT_ONCE, model=model):
            for name, inputs, weights in _seen(model, layers, batch, generator):
                sampled = sample_positions(inputs, generator).movedim(1, 0).flatten(1)
                if name not in sums:
                    keeps_mean = name in norms or _has_bias(model, layers[name])
                    sums[name] = _Sums(about=sampled.mean(1) if keeps_mean else None)
                sums[name].add(sampled, weights)
    return {name: sums[name].statistics for name in layers}


class _Sums:
    """Sums over what a layer reads, about a first guess of its mean, without which they would lose digits."""

    def __init__(self, *, about: torch.Tensor | None) -> None:
        self._about = about
        self._moments: torch.Tensor | float = 0.0
        self._first: torch.Tensor | float = 0.0
        self._weights: torch.Tensor | float = 0.0
        self._count = 0

    def add(self, read: torch.Tensor, weights: torch.Tensor) -> None:
        """Add what was read at some positions (inputs x positions), and squares of gradients (outputs)."""
        off = read if self._about is None else read - self._about[:, None]
        self._moments = self._moments + off @ off.T
        self._first = self._first + off.sum(1)
        self._weights = self._weights + weights
        self._count += read.shape[1]

    @property
    def statistics(self) -> Statistics:
        moments, first, weights = (torch.as_tensor(one) for one in (self._moments, self._first, self._weights))
        weights = weights if weights.any() else torch.ones_like(weights)
        moments, first = moments / self._count, first / self._count
        if self._about is None:
            return Statistics(moments=moments, mean=torch.zeros_like(first), weights=weights)
        return Statistics(moments=moments - torch.outer(first, first), mean=self._about + first, weights=weights)


def _has_bias(model: nn.Module, layer: Layer) -> bool:
    return layer.kind != "transposed" and getattr(model.get_submodule(layer.name), "bias", None) is not None


def sample_positions(inputs: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return some of the positions of what a layer reads (examples x inputs x positions)."""
    if inputs.shape[2] <= _POSITIONS:
        return inputs
    return inputs[:, :, torch.randperm(inputs.shape[2], generator=generator)[:_POSITIONS]]


def _seen(
    model: nn.Module, layers: Mapping[str, Layer], batch: torch.Tensor, generator: torch.Generator
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Yield what passes through every layer, and the squares of the gradients at its outputs, summed (outputs)."""
    with Passing(model, layers, with_gradients=True) as passing:
        outputs = outputs_of(model, batch)[0]
    drawn = draw_scores(model, outputs.detach(), generator)
    behind = [one.output for one in passing.passages]
    gradients = torch.autograd.grad(outputs, behind, drawn, materialize_grads=True)
    for passage, gradient in zip(passing.passages, gradients, strict=True):
        squares = passage.gradients(gradient, len(batch)).square().sum((0, 2))
        yield passage.layer.name, passage.inputs(len(batch)), squares


def draw_scores(model: nn.Module, outputs: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return random vectors at the outputs whose second moments are the curvature of the distance there.

    That is diag(p) - pp' for the KL of the probabilities p, as of the gradients of log-likelihoods of drawn labels; but
    where a network is sure of its classes, drawn labels are nearly always the same, and these vectors never are. For
    the distance of embeddings it is 1.
    """
    drawn = torch.randn(outputs.shape, generator=generator).to(outputs)
    if gives_embeddings(model):
        return drawn
    p = outputs.softmax(1)
    scaled = p.sqrt() * drawn
    return scaled - p * scaled.sum(1, keepdim=True)

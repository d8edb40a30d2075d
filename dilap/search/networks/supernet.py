"""A network whose groups can be set to the levels of a library, and the quadratic model of its distance from dense."""

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import nn

from dilap.core.graph import Branch, Network
from dilap.core.groups import Kept
from dilap.core.space import Space
from dilap.models.compute_device import HOST
from dilap.models.convolutional.norm_statistics import NormStatistics
from dilap.models.convolutional.readers import Passage, Passing, matrix_of, weight_of
from dilap.models.network import Examples, batches_of, differences, outputs_of
from dilap.search.allocation import Config
from dilap.search.curvature import Curvature, of_levels
from dilap.search.kept_answers import KeptAnswers
from dilap.search.networks.library import Change, NetworkLibrary, draw_scores

_AT_ONCE = 4  # images in a pass that keeps activations, and gradients of several vectors
_SCORED_AT_ONCE = 16


class NetworkSupernet:
    """A copy of a network that is set to a config by writing the weights of all layers that read units.

    Removed units are still computed, and nothing reads them: the outputs are those of the network that is cut. After
    every change the batch norms are measured again on `images`, as they are after the cut. Distances from the dense
    network are those on the examples `validation`. With a `journal` folder its answers to a search are kept there.
    """

    def __init__(
        self,
        model: nn.Module,
        space: Space[Network],
        library: NetworkLibrary,
        *,
        images: Examples,
        validation: Examples,
        journal: Path | None = None,
    ) -> None:
        self.space, self.library = space, library
        self._kept = KeptAnswers(folder=journal)
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.norms, self._validation = NormStatistics.of(self.model, images), validation
        self.dense = {name: self.matrix(name).clone() for name in library.layers}
        biases = {name: getattr(self.model.get_submodule(name), "bias", None) for name in library.layers}
        self._biases = {
            name: one.detach().clone()
            for name, one in biases.items()
            if one is not None and library.layers[name].kind != "transposed"  # whose outputs overlap
        }
        self._wanted = torch.cat([outputs_of(self.model, few)[0] for few in self._batches(_SCORED_AT_ONCE)])
        self._changes: list[Change] = []
        self._parts = self._list_changes()
        self._kls: dict[Config, torch.Tensor] = {}
        self.config: Config = ()

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(len(choice.levels) for choice in self.space.choices)

    def _list_changes(self) -> torch.Tensor:
        """List the changes of all levels, and return those of every level as indices (levels x most), -1 for none."""
        numbers: dict[tuple[str, int], int] = {}
        rows = []
        for choice in self.space.choices:
            for level in choice.levels:
                if level.is_removed:
                    keys = [(choice.block.main.name, 0)]
                else:
                    counted = zip(choice.block.groups, level.counts, strict=True)
                    keys = [(group.name, count) for group, count in counted if count < group.num_units]
                for key in keys:
                    if key not in numbers:
                        numbers[key] = len(self._changes)
                        self._changes.append(self._change(*key))
                rows.append([numbers[key] for key in keys])
        most = max(map(len, rows), default=0)
        return torch.tensor([row + [-1] * (most - len(row)) for row in rows])

    def _change(self, group: str, count: int) -> Change:
        return self.library.groups[group][count] if count else self.library.removals[group]

    def chosen(self, config: Sequence[int]) -> torch.Tensor:
        """Return the index, among all levels one after the other, of every choice's level (choices)."""
        starts = torch.tensor([0, *self.sizes[:-1]]).cumsum(0)
        return starts + torch.tensor(config)

    def changes(self, config: Sequence[int]) -> list[Change]:
        """Return what `config` changes in the dense network."""
        return [self._changes[one] for one in self._parts[self.chosen(config)].flatten().tolist() if one >= 0]

    def units(self, config: Sequence[int]) -> list[Kept]:
        """Return the units that stay in the groups of every choice at `config`."""
        found: list[Kept] = []
        for choice, index in zip(self.space.choices, config, strict=True):
            counted = zip(choice.block.groups, choice.levels[index].counts, strict=True)
            found.append({group.name: self._units(group.name, count, group.num_units) for group, count in counted})
        return found

    def _units(self, group: str, count: int, num_units: int) -> tuple[int, ...]:
        if not count:
            return ()
        return tuple(range(num_units)) if count == num_units else self.library.groups[group][count].units

    def removed(self, config: Sequence[int]) -> list[Branch]:
        """Return the residual branches that are removed at `config`."""
        chosen = zip(self.space.choices, config, strict=True)
        gone = {choice.block.main.name for choice, index in chosen if choice.levels[index].is_removed}
        return [branch for branch in self.space.architecture.branches if branch.groups[0] in gone]

    @torch.no_grad()
    def set(self, config: Sequence[int]) -> None:
        """Set the network to a config, and measure its batch norms."""
        if tuple(config) == self.config:
            return
        for name, matrix in self.matrices(config).items():
            self.write_(name, matrix, mean=self.library.means[name])
        self.norms.put_(self.model)
        self.config = tuple(config)

    @torch.no_grad()
    def write_(self, name: str, matrix: torch.Tensor, *, mean: torch.Tensor) -> None:
        """Give a layer the weights of a matrix; its bias keeps the mean output where inputs have the mean `mean`."""
        layer = self.library.layers[name]
        weight = self.model.get_parameter(layer.weight)
        weight.copy_(weight_of(matrix, layer, weight.shape))
        if name in self._biases:
            wanted = self._biases[name] + self.dense[name] @ self.library.means[name]
            self.model.get_parameter(f"{name}.bias").copy_(wanted - matrix @ mean)

    def matrices(self, config: Sequence[int]) -> dict[str, torch.Tensor]:
        """Return the matrices of all layers that read units, with zeros at those that are removed at `config`."""
        found = {name: matrix.clone() for name, matrix in self.dense.items()}
        for change in self.changes(config):
            for patch in change.patches:
                patch.put_(found[patch.layer])
        return found

    def kl(self, config: Sequence[int]) -> float:
        return float(self.kls(config).double().mean())

    @torch.no_grad()
    def kls(self, config: Sequence[int]) -> torch.Tensor:
        """Return the distances of the network at `config` from the dense one (examples)."""
        key = tuple(config)
        if key not in self._kls:
            self._kls[key] = self._kept.kls(config, lambda: self._measured(config))
        return self._kls[key]

    def _measured(self, config: Sequence[int]) -> torch.Tensor:
        self.set(config)
        return self.differences()

    @torch.no_grad()
    def differences(self) -> torch.Tensor:
        """Return the distances of the network as it is now from the dense one (examples)."""
        found = torch.cat([outputs_of(self.model, few)[0] for few in self._batches(_SCORED_AT_ONCE)])
        return differences(self.model, found, self._wanted).float().to(HOST)

    def curvature(self, config: Sequence[int], *, samples: int, seed: int) -> Curvature:
        """Return the quadratic model of the distance around `config`.

        To first order in the weights that a level changes, the outputs of an example change by their derivative along
        the change. So every level has a number A for every example and every random vector at the outputs (see
        `draw_scores`): the product of the change with the gradient of the weights. The second moments of A over
        examples and vectors are the curvature; with the gradient of the distance itself in the place of the vector's,
        the mean is the slope.
        """
        return self._kept.curvature(
            config, samples=samples, seed=seed, compute=lambda: self._linearised(config, samples, seed)
        )

    def _linearised(self, config: Sequence[int], samples: int, seed: int) -> Curvature:
        self.set(config)
        generator = torch.Generator().manual_seed(seed)
        current = self.chosen(config)[torch.repeat_interleave(torch.arange(len(self.sizes)), torch.tensor(self.sizes))]
        slopes, products, value, start = [], torch.zeros(len(self._parts), len(self._parts)), 0.0, 0
        for batch in self._batches(_AT_ONCE):
            with Passing(self.model, self.library.layers, with_gradients=True) as passing:
                outputs = outputs_of(self.model, batch)[0]
            wanted = self._wanted[start : start + len(batch)]
            start += len(batch)
            distances = differences(self.model, outputs, wanted)
            value += float(distances.detach().sum())
            vectors = [draw_scores(self.model, outputs.detach(), generator) for _ in range(samples)]
            slope = torch.autograd.grad(distances.sum(), outputs, retain_graph=True)[0]
            rows = self._products(passing.passages, outputs, [slope, *vectors])
            of_level = [of_levels(one, self._parts) for one in rows]
            own, *drawn = [one - one[:, current] for one in of_level]
            slopes.append(own)
            for one in drawn:
                products += one.T @ one
        b = torch.cat(slopes) if any(config) else torch.zeros(start, len(self._parts))  # the dense network is nearest
        return Curvature(
            value=value / start,
            b=b.mean(0),
            b_error=b.std(0, correction=0) / start**0.5,
            of_changes=products / (start * samples),
            parts=torch.arange(len(self._parts))[:, None],
            num_rows=start * samples,
        )

    def _products(
        self,
        passages: Sequence[Passage],
        outputs: torch.Tensor,
        vectors: Sequence[torch.Tensor],
    ) -> list[torch.Tensor]:
        """Return the products of the gradients of every vector with all changes (examples x changes)."""
        behind = [one.output for one in passages]
        gradients = [
            torch.autograd.grad(outputs, behind, one, retain_graph=True, materialize_grads=True) for one in vectors
        ]
        count = len(outputs)
        found = [torch.zeros(count, len(self._changes)) for _ in vectors]
        for index, passage in enumerate(passages):
            name = passage.layer.name
            numbers, deltas = self._deltas(name)
            if not numbers:
                continue
            inputs = passage.inputs(count)
            mean = self.library.means[name]
            for rows, gradient in zip(found, gradients, strict=True):
                at_outputs = passage.gradients(gradient[index], count)
                of_weights = at_outputs @ inputs.mT - at_outputs.sum(2)[:, :, None] * mean
                rows[:, numbers] += of_weights.flatten(1) @ deltas.T
        return found

    def _deltas(self, name: str) -> tuple[list[int], torch.Tensor]:
        """Return which changes change a layer, and what in its weights (changes x weights).

        They are made anew each time: those of all layers of a ResNet-50 together take a gigabyte.
        """
        found = {}
        for number, change in enumerate(self._changes):
            for patch in change.patches:
                if patch.layer == name:
                    matrix = self.dense[name].clone()
                    patch.put_(matrix)
                    found[number] = (matrix - self.dense[name]).flatten()
        return list(found), torch.stack(list(found.values())) if found else torch.zeros(0, 0)

    def matrix(self, name: str) -> torch.Tensor:
        """Return the matrix of a layer as it is now."""
        layer = self.library.layers[name]
        return matrix_of(self.model.get_parameter(layer.weight).detach(), layer)

    def _batches(self, size: int) -> Iterator[torch.Tensor]:
        return batches_of(self._validation, size, model=self.model)

"""ShortGPT: remove the layers that change the residual stream's direction least, single ones or a whole window."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn import functional

from dilap.core.plan import Plan
from dilap.models.statistics import State, layer_statistics
from dilap.models.tensor_file import Tensors
from dilap.search.method import Pruned, PruneTask

Score = Literal["influence", "angular"]


def mean_cosine(before: State, after: State) -> float:
    """Return the mean over positions of the cosine between two streams (... x hidden); it is 0 for a zero vector."""
    return float(functional.cosine_similarity(before.float(), after.float(), dim=-1).double().mean())


@dataclass(frozen=True, kw_only=True)
class ShortGpt:
    """ShortGPT, or with the score `angular` the method of Gromov et al. (arXiv 2403.17887).

    The score `influence` removes layers by block influence, 1 - cos(input, output) over all tokens, which is computed
    once, as published. `angular` removes the window of layers whose input and output have the least angle at the last
    token, without the authors' training afterwards.
    """

    score: Score = "influence"

    def __call__(self, task: PruneTask) -> Pruned:
        plans = self._by_influence(task) if self.score == "influence" else self._by_angle(task)
        return Pruned(plan=task.cost_limit.first(plans))

    def _by_influence(self, task: PruneTask) -> Iterator[Plan]:
        influences = task.once("block-influence", lambda: block_influences(task))["influences"].tolist()
        order = sorted(range(task.num_layers), key=lambda layer: (influences[layer], layer))
        for count in range(task.num_layers):
            yield task.without_layers(order[:count])

    def _by_angle(self, task: PruneTask) -> Iterator[Plan]:
        states: list[torch.Tensor] = []
        for step in layer_statistics(task.model, task.text.train, roles=()):
            if not states:
                states.append(last_positions(step.inputs))
            states.append(last_positions(step.outputs))
        for length in range(task.num_layers):
            starts = range(task.num_layers - length + 1)
            start = min(starts, key=lambda first: (_angle(states[first], states[first + length]), first))
            yield task.without_layers(range(start, start + length))


def block_influences(task: PruneTask) -> Tensors:
    """Return 1 minus the mean cosine between input and output of every layer (layers), before the final norm."""
    with task.bar("block influence", total=task.num_layers * task.text.train.numel(), unit="tok") as bar:
        influences = [
            1 - mean_cosine(torch.cat(list(step.inputs)), torch.cat(list(step.outputs)))
            for step in layer_statistics(task.model, task.text.train, roles=(), progress=bar.update)
        ]
    return {"influences": torch.tensor(influences, dtype=torch.float64)}


def last_positions(states: Sequence[State]) -> torch.Tensor:
    """Return the stream at the last token of every sequence (sequences x hidden)."""
    return torch.cat([state[:, -1] for state in states])


def _angle(before: torch.Tensor, after: torch.Tensor) -> float:
    """Return the mean angle between two streams (sequences x hidden), as a share of half a turn."""
    cosines = functional.cosine_similarity(before.float(), after.float(), dim=-1).clamp(-1, 1)
    return float((cosines.arccos() / torch.pi).double().mean())

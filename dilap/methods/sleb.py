"""SLEB: remove the layer whose absence raises the language-modelling loss least, again and again."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import torch

from dilap.core.plan import Plan
from dilap.models.skipping import Stack
from dilap.models.tensor_file import Tensors
from dilap.search.method import Pruned, PruneTask


@dataclass(frozen=True, kw_only=True)
class Sleb:
    """SLEB: after every removal, the removal of each layer that is left is tried again.

    The first `early_barrier` and the last `latter_barrier` of the layers that are left are never removed. `num_tokens`
    of calibration text are read, about as many as the 128 lines of WikiText that the authors join.
    """

    early_barrier: int = field(default=1, metadata={"least": 0})
    latter_barrier: int = field(default=1, metadata={"least": 0})
    num_tokens: int = 8192

    def __call__(self, task: PruneTask) -> Pruned:
        return Pruned(plan=task.cost_limit.first(self.plans(task)))

    def plans(self, task: PruneTask) -> Iterator[Plan]:
        """Yield plans of ever fewer layers; each removes one more layer than the one before."""
        trials, removed = _Trials(task, num_tokens=self.num_tokens), list[int]()
        yield task.without_layers(removed)
        while candidates := self._candidates(task, removed):
            found = task.once(f"sleb-{len(removed) + 1}", lambda: trials.losses(removed, candidates))["losses"].tolist()
            loss, worst = min(zip(found, candidates, strict=True))
            removed.append(worst)
            task.report(f"SLEB removes layer {worst}: loss {loss:.4f}")
            yield task.without_layers(removed)

    def _candidates(self, task: PruneTask, removed: list[int]) -> list[int]:
        alive = [layer for layer in range(task.num_layers) if layer not in removed]
        return alive[self.early_barrier : len(alive) - self.latter_barrier]


class _Trials:
    """Computes the losses of the model when one more layer is removed."""

    def __init__(self, task: PruneTask, *, num_tokens: int) -> None:
        self.task = task
        self.tokens = task.text.train[: max(1, num_tokens // task.text.train.shape[1])]

    @cached_property
    def stack(self) -> Stack:
        return Stack(self.task.model, self.tokens)

    def losses(self, removed: list[int], candidates: list[int]) -> Tensors:
        """Return the losses without the layers `removed` and one of the candidates (candidates)."""
        for layer in set(removed).intersection(self.stack.alive):
            self.stack.remove(layer)
        losses = []
        with self.task.bar(f"SLEB, layer {len(removed) + 1}", total=len(candidates), unit="layer") as bar:
            for layer in candidates:
                losses.append(self.stack.loss_without(layer))
                bar.update(1)
        return {"losses": torch.tensor(losses, dtype=torch.float64)}

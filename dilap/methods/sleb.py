"""SLEB: remove the layer whose absence raises the language-modelling loss least, again and again."""

from collections.abc import Iterator
from dataclasses import dataclass

from dilap.methods.method import Pruned, PruneTask
from dilap.skipping import Stack
from dilap.types import Plan


@dataclass(frozen=True, kw_only=True)
class Sleb:
    """Every candidate is tried again after every removal. The first `early_barrier` and the last `latter_barrier` of
    the layers that are left stay. `num_tokens` of calibration text are read: SLEB itself joins 128 lines of WikiText,
    about as many."""

    early_barrier: int = 1
    latter_barrier: int = 1
    num_tokens: int = 8192

    def __call__(self, task: PruneTask) -> Pruned:
        return Pruned(plan=task.target.first(self.plans(task)))

    def plans(self, task: PruneTask) -> Iterator[Plan]:
        """Plans of ever fewer layers; each removes what the one before it does, and one more."""
        length = task.text.train.shape[1]
        stack = Stack(task.model, task.text.train[: max(1, self.num_tokens // length)])
        removed: list[int] = []
        yield task.without_layers(removed)
        while candidates := stack.alive[self.early_barrier : len(stack.alive) - self.latter_barrier]:
            with task.bar(f"SLEB, layer {len(removed) + 1}", total=len(candidates), unit="layer") as bar:
                losses = {}
                for layer in candidates:
                    losses[layer] = stack.loss_without(layer)
                    bar.update(1)
            worst = min(candidates, key=lambda layer: (losses[layer], layer))
            stack.remove(worst)
            removed.append(worst)
            task.report(f"SLEB removes layer {worst}: loss {losses[worst]:.4f}")
            yield task.without_layers(removed)

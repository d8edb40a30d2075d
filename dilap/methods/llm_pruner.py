"""LLM-Pruner: units whose weights times gradients sum to little go first, in the layers between the two ends."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn

from dilap.core.plan import group_name
from dilap.models.anatomy import decoder_layers, family_of
from dilap.models.modeling_dilap import linear_at
from dilap.models.reference import next_token_loss
from dilap.search.method import Pruned, PruneTask

Variant = Literal["first", "second", "mixed", "vectorize", "l1", "l2"]
Reduce = Literal["sum", "mean", "max", "prod", "first"]


def element_scores(
    variant: Variant, weight: torch.Tensor, gradient: torch.Tensor, curvature: torch.Tensor
) -> torch.Tensor:
    """Importance of every weight: `gradient` is that of the mean loss, `curvature` the mean squared gradient of single
    sequences. `vectorize` keeps the signs: there the absolute value is taken after the sum over a unit's weights."""
    saliency, second = weight * gradient, weight.square() * curvature
    scores = {
        "first": saliency.abs(),
        "second": second,
        "mixed": (saliency - 0.5 * second).abs(),
        "vectorize": saliency,
        "l1": weight.abs(),
        "l2": weight.square(),
    }
    return scores[variant]


def reduced(members: Sequence[torch.Tensor], reduce: Reduce) -> torch.Tensor:
    """One score for every channel from those of the matrices that it is part of (each: channels)."""
    stacked = torch.stack(list(members))
    match reduce:
        case "sum":
            return stacked.sum(0)
        case "mean":
            return stacked.mean(0)
        case "max":
            return stacked.amax(0)
        case "prod":
            return stacked.prod(0)
        case "first":
            return stacked[0]


def paired(query: torch.Tensor, *, num_kv_heads: int, head_dim: int, folded: bool) -> torch.Tensor:
    """Scores of query channels brought to KV channels (KV heads * head_dim), the query heads of a KV head summed.

    `folded` adds channel c to channel c modulo the shorter length, as the authors' code does: that pairs query head h
    with KV head h % num_kv_heads, where the model pairs it with h // ratio.
    """
    if folded:
        return query.reshape(-1, num_kv_heads * head_dim).sum(0)
    return query.reshape(num_kv_heads, -1, head_dim).sum(1).reshape(-1)


@dataclass(frozen=True, kw_only=True)
class LlmPruner:
    """Block-wise pruning at the settings of the published script: first-order Taylor, sums over the matrices of a
    group, every layer on its own, the first 4 and last 2 of 32 layers untouched (in proportion for other depths).

    All calibration text is read, where the script reads 10 samples of 64 tokens. `l1` and `l2` read none. Gradients of
    all layers are held at once: the method needs twice the model's memory.
    """

    variant: Variant = "first"
    reduce: Reduce = "sum"
    untouched_first: float = 4 / 32
    untouched_last: float = 2 / 32
    folded: bool = False

    def __call__(self, task: PruneTask) -> Pruned:
        return Pruned(plan=task.keep_equal_shares(task.once("llm_pruner", lambda: self._all_scores(task))))

    def _all_scores(self, task: PruneTask) -> dict[str, torch.Tensor]:
        """Of the units of all layers that are touched, by group."""
        found = _Gradients()
        if self.variant not in ("l1", "l2"):
            found = gradients_of(task, per_sequence=self.variant in ("second", "mixed"))
        first, last = (int(share * task.num_layers) for share in (self.untouched_first, self.untouched_last))
        scores: dict[str, torch.Tensor] = {}
        for index in range(first, task.num_layers - last):
            scores |= self._scores(task, index, found)
        return scores

    def _scores(self, task: PruneTask, index: int, found: "_Gradients") -> dict[str, torch.Tensor]:
        family, head_dim = family_of(task.model.config), task.architecture.head_dim
        num_kv_heads = task.architecture.layers[index].num_kv_heads

        def channels(path: str, *, dim: int) -> torch.Tensor:
            """Score of every output (dim 0) or input (dim 1) of a matrix."""
            matrix = linear_at(decoder_layers(task.model)[index], path)
            assert matrix is not None
            name = f"{index}.{path}"
            zero = torch.zeros(())
            weight, gradient = matrix.weight.detach().float(), found.means.get(name, zero)
            sums = element_scores(self.variant, weight, gradient, found.squares.get(name, zero)).sum(1 - dim)
            return sums.abs() if self.variant == "vectorize" else sums

        def pair(scores: torch.Tensor) -> torch.Tensor:
            return paired(scores, num_kv_heads=num_kv_heads, head_dim=head_dim, folded=self.folded)

        heads = [channels(family.key, dim=0), channels(family.value, dim=0)]
        heads += [pair(channels(family.query, dim=0)), pair(channels(family.attention_out, dim=1))]
        ffn = [*(channels(path, dim=0) for path in family.ffn_in), channels(family.ffn_out, dim=1)]
        return {
            group_name(index, "kv_groups"): reduced(heads, self.reduce).reshape(num_kv_heads, -1).sum(1),
            group_name(index, "channels"): reduced(ffn, self.reduce),
        }


@dataclass(frozen=True)
class _Gradients:
    """Of the decoder layers' matrices, by `layer.path`: of the mean loss, and the mean of single sequences' squares."""

    means: dict[str, torch.Tensor] = field(default_factory=dict)
    squares: dict[str, torch.Tensor] = field(default_factory=dict)


def gradients_of(task: PruneTask, *, per_sequence: bool) -> _Gradients:
    """Gradients of the language-modelling loss on the training split; the model is left without any."""
    found, tokens = _Gradients(), task.text.train
    weights = {
        f"{index}.{path}": matrix.weight
        for index, layer in enumerate(decoder_layers(task.model))
        for path, matrix in layer.named_modules()
        if isinstance(matrix, nn.Linear)
    }
    task.model.requires_grad_(False)
    for weight in weights.values():
        weight.requires_grad_(True)
    try:
        with task.bar("gradients", total=tokens.numel(), unit="tok") as bar:
            for batch in tokens.split(1 if per_sequence else max(1, 1024 // tokens.shape[1])):
                (next_token_loss(task.model, batch) * (len(batch) / len(tokens))).backward()
                _collect(found, weights, share=len(batch) / len(tokens), per_sequence=per_sequence)
                bar.update(batch.numel())
    finally:
        task.model.requires_grad_(False)
        task.model.zero_grad(set_to_none=True)
    return found


def _collect(found: _Gradients, weights: dict[str, torch.Tensor], *, share: float, per_sequence: bool) -> None:
    """Add one batch's gradients, which are already scaled by its `share` of the sequences."""
    for name, weight in weights.items():
        assert weight.grad is not None
        found.means[name] = found.means.get(name, 0.0) + weight.grad
        if per_sequence:
            found.squares[name] = found.squares.get(name, 0.0) + (weight.grad / share).square() * share
        weight.grad = None

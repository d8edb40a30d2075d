"""LLM-Pruner: remove units whose sum of weights times gradients is small, in all but the first and last layers."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from dilap.core.groups import Group, Member
from dilap.models.anatomy import decoder_layers, require_projections
from dilap.models.families import family_of
from dilap.models.reference import next_token_loss
from dilap.search.method import Pruned, PruneTask

Variant = Literal["first", "second", "mixed", "vectorize", "l1", "l2"]
Reduce = Literal["sum", "mean", "max", "prod", "first"]


def element_scores(
    variant: Variant, weight: torch.Tensor, gradient: torch.Tensor, curvature: torch.Tensor
) -> torch.Tensor:
    """Return the importance of every weight.

    `gradient` is that of the mean loss, `curvature` the mean over sequences of the squared gradient. The variant
    `vectorize` keeps the signs; there the absolute value is taken after the sum over the weights of a row or column.
    """
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
    """Return one score for every channel from its scores in the matrices that it is part of (each: channels)."""
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


def aligned(scores: torch.Tensor, member: Member, *, folded: bool) -> torch.Tensor:
    """Return scores along a member's axis as (units x channels of a unit), summed over the heads of a unit.

    `folded` adds the score of channel c to that of c modulo the shorter length, as the authors' code does. This pairs
    query head h with KV head h % num_kv_heads, although the model pairs it with h // ratio.
    """
    num_units, inner = member.grid[member.dimension], member.grid[-1] if len(member.grid) > 1 else 1
    if folded and member.dimension == 0:
        return scores.reshape(-1, num_units, inner).sum(0)
    across = prod(member.grid[: member.dimension])
    return scores.reshape(across, num_units, -1, inner).sum((0, 2))


@dataclass(frozen=True, kw_only=True)
class LlmPruner:
    """LLM-Pruner's block-wise pruning with the settings of the published script.

    They are first-order Taylor scores, sums over the matrices of a group, the same share of every layer, and the first
    4 and last 2 of 32 layers untouched (in proportion for other depths). All calibration text is read, where the script
    reads 10 samples of 64 tokens; the variants `l1` and `l2` read none. Gradients of all layers are held at once, so
    the method needs twice the model's memory. Where a limit cannot be kept otherwise, the ends are pruned too.
    """

    variant: Variant = "first"
    reduce: Reduce = "sum"
    untouched_first: float = 4 / 32
    untouched_last: float = 2 / 32
    folded: bool = False

    def __call__(self, task: PruneTask) -> Pruned:
        require_projections(task.model)
        first, last = (int(share * task.num_layers) for share in (self.untouched_first, self.untouched_last))
        scores = task.once("llm_pruner", lambda: self._all_scores(task))
        return Pruned(plan=task.keep_equal_shares_between(scores, first=first, last=last))

    def _all_scores(self, task: PruneTask) -> dict[str, torch.Tensor]:
        """Return the scores of the units of all layers, by group."""
        found = _Gradients()
        if self.variant not in ("l1", "l2"):
            found = gradients_of(task, per_sequence=self.variant in ("second", "mixed"))
        groups = [group for block in task.blocks for group in block.groups]
        return {group.name: self._scores(task.model, group, found) for group in groups}

    def _scores(self, model: PreTrainedModel, group: Group, found: "_Gradients") -> torch.Tensor:
        """Return the scores of the units of one group, from all matrices that they are part of."""
        members = [one for one in group.members if one.tensor.endswith(".weight")]
        members.sort(key=lambda one: (one.axis, len(one.grid)))  # as the authors: key, value, query, output
        parts = [aligned(self._channels(model, one, found), one, folded=self.folded) for one in members]
        return reduced(parts, self.reduce).sum(1)

    def _channels(self, model: PreTrainedModel, member: Member, found: "_Gradients") -> torch.Tensor:
        """Return the scores of a member's entries of its axis, that is of outputs or inputs of a matrix."""
        weight = model.get_parameter(member.tensor).detach().float()
        zero = weight.new_zeros(())
        gradient, curvature = found.means.get(member.tensor, zero), found.squares.get(member.tensor, zero)
        sums = element_scores(self.variant, weight, gradient, curvature).sum(1 - member.axis)
        return (sums.abs() if self.variant == "vectorize" else sums)[member.span]


@dataclass(frozen=True)
class _Gradients:
    """Gradients of the decoder layers' matrices, by name.

    `means` are those of the mean loss, `squares` the means over sequences of the squared gradients.
    """

    means: dict[str, torch.Tensor] = field(default_factory=dict)
    squares: dict[str, torch.Tensor] = field(default_factory=dict)


def gradients_of(task: PruneTask, *, per_sequence: bool) -> _Gradients:
    """Return gradients of the language-modelling loss on the training split; the model has none afterwards."""
    found, tokens = _Gradients(), task.text.train
    prefix = family_of(task.model.config).layers
    weights = {
        f"{prefix}.{path}.weight": matrix.weight
        for path, matrix in decoder_layers(task.model).named_modules()
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

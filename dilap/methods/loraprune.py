"""LoRAPrune: train low-rank adapters while ever more units are masked, those whose importance is least.

The importance is computed from the adapters' gradients alone, without gradients of the model's weights.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from dilap.core.groups import Group, Member
from dilap.methods.adapters import Adapters
from dilap.methods.units import num_units
from dilap.models.anatomy import require_projections
from dilap.models.compute import shuffled_rows
from dilap.models.reference import next_token_loss
from dilap.search.method import Pruned, PruneTask

_DECAY = 0.9  # weight of the past in the moving average of importance


def estimated_gradient(a: torch.Tensor, b: torch.Tensor, grad_a: torch.Tensor, grad_b: torch.Tensor) -> torch.Tensor:
    """Return an estimate of dLoss/dW (outputs x inputs) from an adapter's gradients: gB A + B gA - gB gA.

    The adapter adds B A to the weight W, with A (rank x inputs) and B (outputs x rank); gA and gB are their gradients.
    """
    return grad_b @ a + b @ grad_a - grad_b @ grad_a


def faded(step: int, steps: int) -> float:
    """Return the share of all removals that are made after `step`.

    It is 0 in the first tenth of the steps, 1 in the last tenth, and a cubic function of the step between.
    """
    start, end = 0.1 * steps, 0.9 * steps
    progress = min(max((step - start) / max(end - start, 1.0), 0.0), 1.0)
    return 1 - (1 - progress) ** 3


def removals(final: int, *, step: int, steps: int) -> int:
    """Return how many units of a group are masked after `step`, when `final` of them are removed in the end."""
    return final if step >= steps else min(final, int(final * faded(step, steps) + 1e-9))


@dataclass(frozen=True, kw_only=True)
class LoraPrune:
    """LoRAPrune with the settings of the published script, trained on `steps` batches of calibration text.

    The settings are rank 8, alpha 16, dropout 0.05, learning rate 1e-4, and new masks every 10 steps. The first tenth
    of the layers and the last layer are not pruned, all others by the same share. The authors train on an instruction
    corpus for two epochs. KV groups are removed as a whole; the authors' code cuts grouped heads apart.
    """

    steps: int = 100
    batch_tokens: int = 2048
    rank: int = 8
    alpha: int = 16
    dropout: float = 0.05
    learning_rate: float = 1e-4
    mask_every: int = 10
    untouched_first: float = 0.1

    def __call__(self, task: PruneTask) -> Pruned:
        require_projections(task.model)
        first, last = int(self.untouched_first * task.num_layers), task.num_layers - 1
        groups = {block.main.name: block.main for block in task.blocks if first <= block.layer < last}
        blank = {name: torch.zeros(group.num_units) for name, group in groups.items()}
        counts = num_units(task.keep_equal_shares(blank))
        with Adapters(task, rank=self.rank, alpha=self.alpha, dropout=self.dropout) as adapted:
            run = _Run(self, task, adapted, groups, counts)
            run.train()
            return Pruned(plan=task.keep(run.scores, counts=counts), parameters=adapted.merged())


@dataclass
class _Run:
    """Training with masks.

    By group, `scores` are the moving averages of importance, `masks` are 0 for masked units, and `counts` are the
    numbers of units that stay at the end.
    """

    options: LoraPrune
    task: PruneTask
    adapted: Adapters
    groups: Mapping[str, Group]
    counts: Mapping[str, int]
    scores: dict[str, torch.Tensor] = field(default_factory=dict)
    masks: dict[str, torch.Tensor] = field(default_factory=dict)

    def train(self) -> None:
        """Train the adapters, and mask ever more units."""
        device = self.task.model.device
        self.scores = {name: torch.zeros(group.num_units, device=device) for name, group in self.groups.items()}
        self.masks = {name: torch.ones(group.num_units, device=device) for name, group in self.groups.items()}
        parameters = [p for p in self.adapted.wrapped.parameters() if p.requires_grad]
        adam, hooks = torch.optim.AdamW(parameters, lr=self.options.learning_rate), list(self._mask_hooks())
        tokens = self.task.text.train
        batches = (
            tokens[rows] for rows in shuffled_rows(tokens, batch_tokens=self.options.batch_tokens, seed=self.task.seed)
        )
        self.adapted.wrapped.train()
        try:
            with self.task.bar("LoRAPrune", total=self.options.steps, unit="step") as bar:
                for step, batch in zip(range(self.options.steps), batches, strict=False):
                    next_token_loss(self.task.model, batch).backward()
                    self._score()
                    adam.step()
                    adam.zero_grad()
                    if step % self.options.mask_every == 0 or step == self.options.steps - 1:
                        self._mask(step + 1)
                    bar.update(1)
        finally:
            for hook in hooks:
                hook.remove()

    def _mask_hooks(self) -> Iterator[Any]:
        """Put masks on the outputs of the matrices that read the residual stream; yield the handles that remove them.

        The adapters' outputs are masked as well.
        """
        for name, group in self.groups.items():
            for member in _matrices(group):
                if member.axis == 0:
                    yield self.adapted.matrix(member.tensor).register_forward_hook(self._masking(name, member.span))

    def _masking(self, name: str, span: slice) -> Any:
        def hook(_: nn.Module, __: object, output: torch.Tensor) -> torch.Tensor:
            mask, factors = self.masks[name], output.new_ones(output.shape[-1])
            factors[span] = mask.repeat_interleave(len(factors[span]) // len(mask)).to(output.dtype)
            return output * factors

        return hook

    @torch.no_grad()
    def _score(self) -> None:
        """Update the moving average of every unit's importance, unless a gradient is not finite."""
        found = {name: self._importance(group) for name, group in self.groups.items()}
        if all(torch.isfinite(values).all() for values in found.values()):
            for name, values in found.items():
                self.scores[name] = _DECAY * self.scores[name] + (1 - _DECAY) * values

    def _importance(self, group: Group) -> torch.Tensor:
        """Return the importance of a group's units: the sum over its matrices of scores that are scaled to norm 1."""
        total = torch.zeros(group.num_units, device=self.task.model.device)
        for member in _matrices(group):
            matrix = self.adapted.matrix(member.tensor)
            a, b = matrix.lora_A["default"].weight, matrix.lora_B["default"].weight
            weight = matrix.base_layer.weight + self.adapted.scale * b @ a
            elements = (estimated_gradient(a, b, a.grad, b.grad) * weight).abs().float()
            units = (elements.T if member.axis else elements)[member.span].reshape(group.num_units, -1).sum(1)
            total += units / units.norm().clamp_min(1e-30)
        return total

    def _mask(self, step: int) -> None:
        """Mask the least important units, as many as the schedule says for `step`.

        The scores of units that are masked already are set to 0 first.
        """
        for name, group in self.groups.items():
            final = group.num_units - self.counts[name]
            gone = removals(final, step=step, steps=self.options.steps)
            self.scores[name] = self.scores[name] * self.masks[name]
            self.masks[name] = torch.ones_like(self.masks[name])
            self.masks[name][self.scores[name].argsort(stable=True)[:gone]] = 0


def _matrices(group: Group) -> list[Member]:
    """Return the members of a group that are matrices; biases have no adapters."""
    return [one for one in group.members if one.tensor.endswith(".weight")]

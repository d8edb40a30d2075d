"""LoRAPrune: train low-rank adapters while ever more units are masked, those whose importance is least.

The importance is computed from the adapters' gradients alone, without gradients of the model's weights.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from dilap.core.groups import Group, Member
from dilap.methods.adapters import Adapters, num_steps
from dilap.methods.units import num_units
from dilap.models.anatomy import require_projections
from dilap.models.compute import shuffled_rows
from dilap.models.reference import next_token_loss
from dilap.search.method import Pruned, PruneTask

_PUBLISHED_STEPS = 40_000  # two epochs of 2.59 million instructions in batches of 128
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
    """LoRAPrune with the settings of the published script, trained on `steps` batches of the training text.

    The settings are rank 8, alpha 16, dropout 0.05, learning rate 1e-4, and new masks every 10 steps. The first tenth
    of the layers and the last layer are not pruned, all others by the same share; where a limit cannot be kept
    otherwise, they are pruned too. By default (0) there are 100 steps, or, on a GPU, as many as the authors take: two
    epochs of LaMini's 2.59 million instructions in batches of 128. KV groups and query slots are removed as a whole;
    the authors' code cuts grouped heads apart.
    """

    steps: int = 0
    batch_tokens: int = 2048
    rank: int = 8
    alpha: int = 16
    dropout: float = 0.05
    learning_rate: float = 1e-4
    mask_every: int = 10
    untouched_first: float = 0.1

    def __call__(self, task: PruneTask) -> Pruned:
        require_projections(task.model)
        every = {group.name: group for block in task.blocks for group in block.groups}
        blank = {name: torch.zeros(group.num_units) for name, group in every.items()}
        plan = task.keep_equal_shares_between(blank, first=int(self.untouched_first * task.num_layers), last=1)
        counts = num_units(plan)
        groups = {name: group for name, group in every.items() if counts[name] < group.num_units}
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
        steps = num_steps(self.options.steps, self.task.model, published=_PUBLISHED_STEPS)
        parameters = [p for p in self.adapted.wrapped.parameters() if p.requires_grad]
        adam, hooks = torch.optim.AdamW(parameters, lr=self.options.learning_rate), list(self._mask_hooks())
        tokens = self.task.training_tokens
        batches = (
            tokens[rows] for rows in shuffled_rows(tokens, batch_tokens=self.options.batch_tokens, seed=self.task.seed)
        )
        self.adapted.wrapped.train()
        try:
            with self.task.bar("LoRAPrune", total=steps, unit="step") as bar:
                for step, batch in zip(range(steps), batches, strict=False):
                    next_token_loss(self.task.model, batch).backward()
                    self._score()
                    adam.step()
                    adam.zero_grad()
                    if step % self.options.mask_every == 0 or step == steps - 1:
                        self._mask(step + 1, steps)
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
                    yield self.adapted.matrix(member.tensor).register_forward_hook(self._masking(name, member))

    def _masking(self, name: str, member: Member) -> Any:
        shape = [size if dimension == member.dimension else 1 for dimension, size in enumerate(member.grid)]

        def hook(_: nn.Module, __: object, output: torch.Tensor) -> torch.Tensor:
            factors = output.new_ones(output.shape[-1])
            factors[member.span] = self.masks[name].to(output).reshape(shape).expand(member.grid).reshape(-1)
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
            entries = (elements.T if member.axis else elements)[member.span].sum(1).reshape(member.grid)
            units = entries.movedim(member.dimension, 0).reshape(group.num_units, -1).sum(1)
            total += units / units.norm().clamp_min(1e-30)
        return total

    def _mask(self, step: int, steps: int) -> None:
        """Mask the least important units, as many as the schedule says for `step`.

        The scores of units that are masked already are set to 0 first.
        """
        for name, group in self.groups.items():
            final = group.num_units - self.counts[name]
            gone = removals(final, step=step, steps=steps)
            self.scores[name] = self.scores[name] * self.masks[name]
            self.masks[name] = torch.ones_like(self.masks[name])
            self.masks[name][self.scores[name].argsort(stable=True)[:gone]] = 0


def _matrices(group: Group) -> list[Member]:
    """Return the members of a group that are matrices; biases have no adapters."""
    return [one for one in group.members if one.tensor.endswith(".weight")]

"""LoRAPrune: importance from the gradients of low-rank adapters alone, while they are trained and units fade out."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from dilap.core.groups import Group, Member
from dilap.methods.adapters import Adapters, shuffled
from dilap.methods.units import num_units
from dilap.models.reference import next_token_loss
from dilap.search.method import Pruned, PruneTask

_DECAY = 0.9  # of the moving average of importance


def estimated_gradient(a: torch.Tensor, b: torch.Tensor, grad_a: torch.Tensor, grad_b: torch.Tensor) -> torch.Tensor:
    """dLoss/dW as the adapters' gradients tell it: gB A + B gA - gB gA, with A (rank x inputs), B (outputs x rank)."""
    return grad_b @ a + b @ grad_a - grad_b @ grad_a


def faded(step: int, steps: int) -> float:
    """The share of the final removals made after `step`: none in the first tenth, all in the last, a cubic between."""
    start, end = 0.1 * steps, 0.9 * steps
    progress = min(max((step - start) / max(end - start, 1.0), 0.0), 1.0)
    return 1 - (1 - progress) ** 3


def removals(final: int, *, step: int, steps: int) -> int:
    """Units of a group that are masked after `step`, when `final` of them are to go."""
    return final if step >= steps else min(final, int(final * faded(step, steps) + 1e-9))


@dataclass(frozen=True, kw_only=True)
class LoraPrune:
    """The settings of the published script: rank 8, alpha 16, dropout 0.05, learning rate 1e-4, masks set every 10
    steps, the first tenth of the layers and the last one untouched, the same share of all others. It trains on an
    instruction corpus for two epochs; here `steps` batches of calibration text. KV groups are whole, with their RoPE
    pairs; the authors' code cuts grouped heads apart.
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
    """Training with masks; `scores` are the moving averages of importance, by group."""

    options: LoraPrune
    task: PruneTask
    adapted: Adapters
    groups: Mapping[str, Group]
    counts: Mapping[str, int]
    scores: dict[str, torch.Tensor] = field(default_factory=dict)
    masks: dict[str, torch.Tensor] = field(default_factory=dict)

    def train(self) -> None:
        self.scores = {name: torch.zeros(group.num_units) for name, group in self.groups.items()}
        self.masks = {name: torch.ones(group.num_units) for name, group in self.groups.items()}
        parameters = [p for p in self.adapted.wrapped.parameters() if p.requires_grad]
        adam, hooks = torch.optim.AdamW(parameters, lr=self.options.learning_rate), list(self._mask_hooks())
        batches = shuffled(self.task.text.train, batch_tokens=self.options.batch_tokens, seed=self.task.seed)
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
        """Masks act on the outputs of the matrices before attention and activation, adapters included."""
        for name, group in self.groups.items():
            for member in _matrices(group):
                if member.axis == 0:
                    yield self.adapted.matrix(member.tensor).register_forward_hook(self._masking(name))

    def _masking(self, name: str) -> Any:
        def hook(_: nn.Module, __: object, output: torch.Tensor) -> torch.Tensor:
            mask = self.masks[name]
            return output * mask.repeat_interleave(output.shape[-1] // len(mask)).to(output.dtype)

        return hook

    @torch.no_grad()
    def _score(self) -> None:
        """The moving average of every unit's importance; nothing where a gradient is not finite."""
        found = {name: self._importance(group) for name, group in self.groups.items()}
        if all(torch.isfinite(values).all() for values in found.values()):
            for name, values in found.items():
                self.scores[name] = _DECAY * self.scores[name] + (1 - _DECAY) * values

    def _importance(self, group: Group) -> torch.Tensor:
        """Of a group's units: the sum over its matrices, each normalised to length one."""
        total = torch.zeros(group.num_units)
        for member in _matrices(group):
            matrix = self.adapted.matrix(member.tensor)
            a, b = matrix.lora_A["default"].weight, matrix.lora_B["default"].weight
            weight = matrix.base_layer.weight + self.adapted.scale * b @ a
            elements = (estimated_gradient(a, b, a.grad, b.grad) * weight).abs().float()
            units = (elements.T if member.axis else elements).reshape(group.num_units, -1).sum(1)
            total += units / units.norm().clamp_min(1e-30)
        return total

    def _mask(self, step: int) -> None:
        """Mask the units of least importance, those masked already first, as many as the schedule has by now."""
        for name, group in self.groups.items():
            final = group.num_units - self.counts[name]
            gone = removals(final, step=step, steps=self.options.steps)
            self.scores[name] = self.scores[name] * self.masks[name]
            self.masks[name] = torch.ones(group.num_units)
            self.masks[name][self.scores[name].argsort(stable=True)[:gone]] = 0


def _matrices(group: Group) -> list[Member]:
    """Where its units lie in matrices; biases have no adapters."""
    return [one for one in group.members if one.tensor.endswith(".weight")]

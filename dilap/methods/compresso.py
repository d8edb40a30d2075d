"""Compresso: hard-concrete gates on units, trained with adapters under a constraint on the expected size."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from dilap.core.groups import Block
from dilap.core.plan import Plan
from dilap.methods.adapters import Adapters, num_steps
from dilap.methods.units import has_heads
from dilap.models.anatomy import Sublayer, sublayers
from dilap.models.compute import shuffled_rows
from dilap.models.families import family_of
from dilap.models.reference import next_token_loss
from dilap.search.method import Pruned, PruneTask
from dilap.search.weights import WeightCosts

_PUBLISHED_STEPS = 416_000  # 8 epochs of 52,000 instructions, one at a time
_LOW, _HIGH, _TEMPERATURE = -0.1, 1.1, 2 / 3
_SHARPNESS = 0.8  # factor of the parameters of the gates that are folded in at the end
_LEAST, _MOST = math.log(0.01), math.log(100)  # bounds of a gate's parameter
_KNOB = 20.0  # shift of all gates' parameters that goes from keeping to removing everything


def sampled(log_alpha: torch.Tensor, *, generator: torch.Generator) -> torch.Tensor:
    """Draw hard-concrete gates between 0 and 1, which are differentiable in their parameters `log_alpha`."""
    u = torch.rand(log_alpha.shape, generator=generator).clamp(1e-6, 1 - 1e-6).to(log_alpha.device)
    s = torch.sigmoid((u.log() - (1 - u).log() + log_alpha) / _TEMPERATURE)
    return (s * (_HIGH - _LOW) + _LOW).clamp(0, 1)


def open_probability(log_alpha: torch.Tensor) -> torch.Tensor:
    """Return the probability that a gate is larger than 0."""
    return torch.sigmoid(log_alpha - _TEMPERATURE * math.log(-_LOW / _HIGH))


def lagrangian(sparsity: torch.Tensor, target: float, multipliers: torch.Tensor) -> torch.Tensor:
    """Return what the constraint on the sparsity adds to the loss; the two multipliers are trained to raise it."""
    gap = sparsity - target
    return multipliers[0] * gap + multipliers[1] * gap.square()


@dataclass(frozen=True, kw_only=True)
class Compresso:
    """Compresso with its published settings, trained on `steps` batches of the training text.

    Gates and multipliers have the learning rate 0.1, adapters of rank 8 on query and value (with the key, where one
    matrix holds all three) 5e-5. The target sparsity is reached after half of the training. At the end the gates of
    units that are kept are folded in at their soft values. By default (0) there are 100 steps, or, on a GPU, as many as
    the authors take: 8 epochs of Alpaca-GPT4's 52,000 instructions, one at a time. Query slots have gates like KV
    groups; a sublayer of which all gates are closed is removed.

    Two parts are left out: gates on the residual stream, whose width our plans do not change, and the prompt, which
    would be needed at inference too. The target sparsity is that of the plan that keeps the limit with equal shares in
    all layers. After training the parameters of all gates are shifted together until the limit is kept.
    """

    steps: int = 0
    batch_tokens: int = 2048
    gate_learning_rate: float = 0.1
    adapter_learning_rate: float = 5e-5
    rank: int = 8
    alpha: int = 8

    def __call__(self, task: PruneTask) -> Pruned:
        family = family_of(task.model.config)
        paths = tuple(dict.fromkeys((family.query, family.value)))  # fused ones are one
        outs = list(sublayers(task.model))  # before adapters hide the matrices
        with Adapters(task, rank=self.rank, alpha=self.alpha, dropout=0.0, paths=paths) as adapted:
            gates = _Gates(self, task, adapted, outs)
            gates.train()
            parameters = adapted.merged()
        plan = task.cost_limit.bisect(gates.plan)
        return Pruned(plan=plan, parameters={**parameters, **gates.folded()})


@dataclass
class _Gates:
    """The gates' parameters `log_alphas` by group, and their training.

    `costs` are, by sublayer, the weights of a unit of the main group and those of each of its query heads.
    """

    options: Compresso
    task: PruneTask
    adapted: Adapters
    outs: list[Sublayer]
    log_alphas: dict[str, torch.Tensor] = field(default_factory=dict)
    costs: dict[str, tuple[float, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.task.seed)
        weights = WeightCosts(architecture=self.task.architecture)
        for one in self.outs:
            self.costs[one.name] = _unit_costs(one.block, weights)
            for group in one.block.groups:
                start = torch.full((group.num_units,), math.log((1 - 0.01) / 0.01))
                if has_heads(one):
                    start = (10 + 0.01 * torch.randn(group.num_units, generator=self.generator)).clamp(_LEAST, _MOST)
                self.log_alphas[group.name] = start.to(self.task.model.device).requires_grad_(True)

    def sparsity(self) -> torch.Tensor:
        """Return the expected share of the prunable weights that are removed."""
        open_ones = {name: open_probability(values).sum() for name, values in self.log_alphas.items()}
        every = {name: torch.tensor(float(len(values))) for name, values in self.log_alphas.items()}
        return 1 - self._weights(open_ones) / self._weights(every)

    def _weights(self, numbers: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return how many weights there are with these numbers of units, by group."""
        found = torch.zeros(())
        for one in self.outs:
            own, per_head = self.costs[one.name]
            main, *slots = (numbers[group.name] for group in one.block.groups)
            found = found + main * (own + per_head * slots[0] if slots else own)
        return found

    def _final_sparsity(self) -> float:
        """Return the sparsity of the plan with equal shares that keeps the limit."""
        blank = {name: torch.zeros(len(values)) for name, values in self.log_alphas.items()}
        plan = self.task.keep_equal_shares(blank)
        kept, every = (
            self._weights({name: torch.tensor(float(len(units))) for name, units in one.items()})
            for one in (plan.kept, blank)
        )
        return float(1 - kept / every)

    def train(self) -> None:
        """Train gates, multipliers and adapters together."""
        options, multipliers = self.options, torch.zeros(2, device=self.task.model.device, requires_grad=True)
        adapters = [p for p in self.adapted.wrapped.parameters() if p.requires_grad]
        optimizers = [
            torch.optim.AdamW(adapters, lr=options.adapter_learning_rate),
            torch.optim.AdamW(list(self.log_alphas.values()), lr=options.gate_learning_rate, weight_decay=0.0),
            torch.optim.AdamW([multipliers], lr=options.gate_learning_rate, weight_decay=0.0, maximize=True),
        ]
        final, hooks = self._final_sparsity(), list(self._hooks())
        steps = num_steps(options.steps, self.task.model, published=_PUBLISHED_STEPS)
        tokens = self.task.training_tokens
        batches = (
            tokens[rows] for rows in shuffled_rows(tokens, batch_tokens=options.batch_tokens, seed=self.task.seed)
        )
        try:
            with self.task.bar("Compresso", total=steps, unit="step") as bar:
                for step, batch in zip(range(steps), batches, strict=False):
                    target = final * min(1.0, step / max(1.0, steps / 2))
                    for optimizer in optimizers:
                        optimizer.zero_grad()
                    loss = next_token_loss(self.task.model, batch)
                    (loss + lagrangian(self.sparsity(), target, multipliers)).backward()
                    for optimizer in optimizers:
                        optimizer.step()
                    with torch.no_grad():
                        for values in self.log_alphas.values():
                            values.clamp_(_LEAST, _MOST)
                    bar.update(1)
        finally:
            for hook in hooks:
                hook.remove()
        self.log_alphas = {name: values.detach() for name, values in self.log_alphas.items()}
        self.task.report(f"Compresso: expected sparsity {float(self.sparsity()):.1%}, target {final:.1%}")

    def _hooks(self) -> Iterator[Any]:
        """Put gates on the inputs of the output projections, and yield the handles that remove them."""
        for one in self.outs:

            def hook(_: nn.Module, inputs: tuple[torch.Tensor, ...], one: Sublayer = one) -> tuple[torch.Tensor, ...]:
                names = [group.name for group in one.block.groups]
                gates = [sampled(self.log_alphas[name], generator=self.generator) for name in names]
                return (inputs[0] * _scale(gates, inputs[0].shape[-1]).to(inputs[0].dtype), *inputs[1:])

            yield one.out.register_forward_pre_hook(hook)

    @torch.no_grad()
    def plan(self, knob: float) -> Plan:
        """Return the plan when all gates are shifted towards closing by a knob from 0 to 1.

        As many units of a group are removed as gates are then expected to be closed.
        """
        shift = _KNOB * (knob - 0.5)
        counts = {
            name: len(values) - round(float((1 - open_probability(values - shift)).sum()))
            for name, values in self.log_alphas.items()
        }
        return self.task.keep(self.log_alphas, counts=counts, may_remove=True)

    def folded(self) -> dict[str, torch.Tensor]:
        """Return the output projections, by parameter name, with the soft gates of their inputs folded in."""
        found = {}
        for one in self.outs:
            parameters = [self.log_alphas[group.name] for group in one.block.groups]
            soft = [torch.sigmoid(each / _TEMPERATURE * _SHARPNESS) for each in parameters]
            weight = one.out.weight.detach()
            found[f"{one.path}.weight"] = (weight.float() * _scale(soft, weight.shape[1])).to(weight.dtype)
        return found


def _scale(gates: Sequence[torch.Tensor], num_inputs: int) -> torch.Tensor:
    """Return the factor of every input of an output projection: its unit's gate, times that of its query slot."""
    main, *slots = gates
    heads = (main[:, None] * slots[0]).reshape(-1) if slots else main
    return heads.repeat_interleave(num_inputs // len(heads))


def _unit_costs(block: Block, weights: WeightCosts) -> tuple[float, float]:
    """Return the weights of a unit of a block's main group without query heads, and those of each of its heads."""
    num_units, *slots = (group.num_units for group in block.groups)
    if not slots or slots[0] == 1:
        return weights.block(block, (num_units, *slots)) / num_units, 0.0
    full, single = (weights.block(block, (num_units, number)) / num_units for number in (slots[0], 1))
    per_head = (full - single) / (slots[0] - 1)
    return single - per_head, per_head

"""Other ways to choose levels from the same library, against which `tools/bench_search` holds DiLAP's search.

They are here and not among the methods because they are measured to see what the parts of the search are worth. All end
with the same swaps on the real KL.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from dilap.methods.ziplm import ZipLm
from dilap.models.compute import shuffled_rows
from dilap.models.reference import Teacher, final_hidden, head_of
from dilap.search.allocation import Config, ExpectedCost, solve
from dilap.search.curvature import Curvature
from dilap.search.dilap import polish
from dilap.search.dilap import search as dilap_search
from dilap.search.journal import Evaluator
from dilap.search.supernet import Supernet
from dilap.search.task import SearchResult, SearchTask

_EDGE = (-0.1, 1.1)  # the stretched interval of hard-concrete gates (arXiv 1712.01312)


def single_changes(task: SearchTask) -> SearchResult:
    """Choose exactly by the real KL of the dense model with one level changed, as Puzzle does (arXiv 2411.19146)."""
    space, evaluator = task.space, task.evaluator
    costs = [
        np.array([evaluator.kl(_with(space.dense, index, level)) for level in range(len(choice.levels))])
        for index, choice in enumerate(space.choices)
    ]
    config = solve(costs, space.level_costs(), limit=task.limit - space.fixed_cost)
    return polish(task, SearchResult(config=config, kl=evaluator.kl(config)))


def _with(config: Config, index: int, level: int) -> Config:
    return (*config[:index], level, *config[index + 1 :])


@dataclass(frozen=True, kw_only=True)
class Weightings:
    """Search weights of the levels' errors as SPDY does (arXiv 2201.09096), with fewer weightings than published."""

    starts: int = 50
    failures: int = 20

    def __call__(self, task: SearchTask) -> SearchResult:
        found = ZipLm(starts=self.starts, failures=self.failures).search(task)
        return polish(task, SearchResult(config=found.config, kl=found.kl))


@dataclass(frozen=True, kw_only=True)
class Gates:
    """Train hard-concrete gates of all levels on the real KL, with a Lagrangian of the expected latency, and project.

    Every sublayer has one gate for each of its levels; a sample of them is stretched, clipped and divided by its sum,
    and the projection of the sublayer is the mean of its levels' by these shares. The two multipliers of the excess e
    of the expected latency, relative to the limit, rise with it: the loss is KL + m e + n e^2. In the end the config
    with the largest sum of logarithms of the gates' mean shares is found exactly.
    """

    steps: int = 150
    batch_tokens: int = 1024
    learning_rate: float = 0.1
    multiplier_rate: float = 0.1
    temperature: float = 2 / 3

    def __call__(self, task: SearchTask) -> SearchResult:
        space, net, teacher = task.space, task.evaluator.net, task.evaluator.teacher
        assert not net.head_levels, "gates are written for widths alone"
        logits = [torch.full((size,), 0.0, requires_grad=True) for size in net.sizes]
        adam = torch.optim.Adam(logits, lr=self.learning_rate)
        multipliers = torch.zeros(2, requires_grad=True)
        ascent = torch.optim.Adam([multipliers], lr=self.multiplier_rate, maximize=True)
        cost, generator = ExpectedCost(space), torch.Generator().manual_seed(task.options.seed)
        rows = shuffled_rows(teacher.tokens, batch_tokens=self.batch_tokens, seed=task.options.seed)
        for _ in range(self.steps):
            shares = [self._sampled(one, generator) for one in logits]
            excess = (cost(_padded(shares, net.sizes)) - task.limit) / task.limit
            surrogate = self._kl(net, teacher, next(rows), shares)
            adam.zero_grad()
            ascent.zero_grad()
            (surrogate + multipliers[0] * excess + multipliers[1] * excess.square()).backward()
            adam.step()
            ascent.step()
        net.close()
        chances = [torch.softmax(one.detach(), 0).clamp_min(1e-6) for one in logits]
        costs = [-one.log().double().numpy() for one in chances]
        config = solve(costs, space.level_costs(), limit=task.limit - space.fixed_cost)
        return polish(task, SearchResult(config=config, kl=task.evaluator.kl(config)))

    def _sampled(self, logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Return random shares of the levels of one sublayer, which sum to 1."""
        noise = torch.rand(len(logits), generator=generator).clamp(1e-6, 1 - 1e-6)
        gumbel = -(-noise.log()).log()
        soft = torch.softmax((logits + gumbel) / self.temperature, 0)
        low, high = _EDGE
        stretched = (soft * (high - low) + low).clamp(0, 1)
        return stretched / stretched.sum().clamp_min(1e-6)

    def _kl(self, net: Supernet, teacher: Teacher, rows: torch.Tensor, shares: list[torch.Tensor]) -> torch.Tensor:
        """Return a sum whose value is meaningless, and whose gradient by the `shares` is that of the batch's KL."""
        with _mixed(net, shares) as weights:
            hidden = final_hidden(net.model, teacher.tokens[rows])
            at_head = teacher.at_head(hidden.detach(), head_of(net.model), rows=rows)
            hidden.backward(at_head.slope.to(hidden.dtype) / len(hidden))
            terms = []
            for index, (weight, own) in enumerate(zip(weights, shares, strict=True)):
                assert weight.grad is not None
                slopes = [float((weight.grad[:, fit.columns] * fit.weight).sum()) for fit in net.library[index]]
                terms.append((own * torch.tensor(slopes)).sum())
        return torch.stack(terms).sum()


def _padded(shares: list[torch.Tensor], sizes: tuple[int, ...]) -> torch.Tensor:
    return torch.stack([functional.pad(one, (0, max(sizes) - len(one))) for one in shares])


@contextmanager
def _mixed(net: Supernet, shares: list[torch.Tensor]) -> Iterator[list[nn.Parameter]]:
    """Give every sublayer the mean of its levels' projections by its shares, as parameters that want gradients."""
    weights = []
    for index, own in enumerate(shares):
        weight = net.outs[index].weight
        weight.zero_()
        for share, fit in zip(own.detach().tolist(), net.library[index], strict=True):
            if share:
                weight[:, fit.columns] += share * fit.weight.to(weight)
        weights.append(weight.requires_grad_(True))
    yield weights
    for index, weight in enumerate(weights):
        weight.requires_grad_(False)
        weight.grad = None
        net.restore(index)


@dataclass(frozen=True, kw_only=True)
class TrainingEvaluator(Evaluator):
    """An evaluator that trains adapters of the current config before every quadratic model, and merges them.

    They lie at the matrices before the output projections, which all levels share, and learn the dense model's answers
    on `lessons`. Answers are not kept, because the model changes. `restore` undoes all training.
    """

    lessons: Teacher
    steps: int = 8
    rank: int = 8
    learning_rate: float = 1e-3
    batch_tokens: int = 1024
    seed: int = 0

    def curvature(self, config: Config, *, samples: int, seed: int) -> Curvature:  # type: ignore[override]
        self.net.set(config)
        self.train(seed)
        return super().curvature(config, samples=samples, seed=seed)

    def train(self, seed: int) -> None:
        """Train for `steps` batches at the config that is set, and add what was learnt to the matrices."""
        adapters = [
            _Adapter(module, rank=self.rank, seed=seed + number) for number, module in enumerate(self._modules())
        ]
        adam = torch.optim.AdamW([one for adapter in adapters for one in adapter.parameters()], lr=self.learning_rate)
        rows = shuffled_rows(self.lessons.tokens, batch_tokens=self.batch_tokens, seed=self.seed + seed)
        with ExitStack() as stack:
            for adapter in adapters:
                stack.callback(adapter.hook().remove)
            for _ in range(self.steps):
                batch = next(rows)
                hidden = final_hidden(self.net.model, self.lessons.tokens[batch])
                at_head = self.lessons.at_head(hidden.detach(), head_of(self.net.model), rows=batch)
                adam.zero_grad()
                hidden.backward(at_head.slope.to(hidden.dtype) / len(hidden))
                adam.step()
        for adapter in adapters:
            adapter.merge_()
        self.net.forget()

    def _modules(self) -> list[nn.Linear]:
        names = (name for index in range(len(self.net.sublayers)) for name in self.net.inputs(index))
        return [self.net.model.get_submodule(name.removesuffix(".weight")) for name in names]

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Undo at the end what was trained within."""
        before = [module.weight.detach().clone() for module in self._modules()]
        try:
            yield
        finally:
            self.net.close()
            with torch.no_grad():
                for module, weight in zip(self._modules(), before, strict=True):
                    module.weight.copy_(weight)
            self.net.forget()


class _Adapter(nn.Module):
    """A product of two narrow matrices beside a linear layer (LoRA, arXiv 2106.09685), with a scale of 1."""

    def __init__(self, module: nn.Linear, *, rank: int, seed: int) -> None:
        super().__init__()
        outputs, inputs = module.weight.shape
        generator = torch.Generator().manual_seed(seed)
        self.A = nn.Parameter(torch.randn(rank, inputs, generator=generator) / inputs**0.5)
        self.B = nn.Parameter(torch.zeros(outputs, rank))
        self._beside = [module]  # in a list, so that it is no part of this module

    def hook(self) -> Any:
        def add(_: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            return output + (inputs[0] @ self.A.T.to(output.dtype)) @ self.B.T.to(output.dtype)

        return self._beside[0].register_forward_hook(add)

    @torch.no_grad()
    def merge_(self) -> None:
        weight = self._beside[0].weight
        weight += (self.B @ self.A).to(weight)


def trained_inner_loop(task: SearchTask, *, lessons: Teacher) -> SearchResult:
    """Run DiLAP's search with training between the quadratic models in place of the closed form alone.

    The model is left as it was trained; `TrainingEvaluator.restored` is for who calls this.
    """
    evaluator = TrainingEvaluator(net=task.evaluator.net, teacher=task.evaluator.teacher, lessons=lessons)
    return dilap_search(replace(task, evaluator=evaluator))

"""Puzzle: every replacement of one block is scored in the whole model, then the best combination is chosen exactly."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from dilap.core.codec import checked, read_json, write_json
from dilap.core.space import Choice, Level
from dilap.methods.shortgpt import mean_cosine
from dilap.methods.units import has_heads
from dilap.models.anatomy import Sublayer, sublayers
from dilap.models.compute import batches
from dilap.models.compute_device import HOST
from dilap.models.reference import final_hidden
from dilap.models.statistics import OUTPUTS, layer_statistics
from dilap.search.allocation import Config, solve
from dilap.search.journal import Evaluator
from dilap.search.levels import level_library, prune_by_library
from dilap.search.library import LevelFit
from dilap.search.library_file import Fits
from dilap.search.method import Pruned, PruneTask
from dilap.search.task import SearchResult, SearchTask

Objective = Literal["kl", "cosine"]


def contribution(weight: torch.Tensor, inputs: torch.Tensor, removed_output: torch.Tensor) -> torch.Tensor:
    """Return |s + a_i W_i| for every channel i and token (tokens x channels), with s the output that is lost already.

    W is `weight` (outputs x channels), a is `inputs` (tokens x channels), s is `removed_output` (tokens x outputs).
    """
    squares = removed_output.square().sum(1, keepdim=True)
    cross = 2 * inputs * (removed_output @ weight)
    return (squares + cross + inputs.square() * weight.square().sum(0)).clamp_min(0).sqrt()


@dataclass(frozen=True, kw_only=True)
class Puzzle:
    """Puzzle's scores of single replaced blocks, and the exact selection of blocks, a multiple-choice knapsack.

    Channels are ranked in `steps` rounds by what the block's output would lose, KV groups by the norm of their output.
    Blocks are cut without making up for it. The `objective` by which a replaced block is scored is the KL to the dense
    model, as in the paper, or the cosine distance of the final hidden states, the default of the authors' toolkit.
    """

    objective: Objective = "kl"
    steps: int = 8

    def __call__(self, task: PruneTask) -> Pruned:
        levels = level_library(task, partial(self.fit, task), name="puzzle")
        costs: list[NDArray[np.float64]] = []

        def search(asked: SearchTask) -> SearchResult:
            if not costs:
                costs.extend(np.array(one) for one in self.scores(task, asked, name=levels.name))
            config = solve(costs, asked.space.level_costs(), limit=asked.limit - asked.space.fixed_cost)
            return SearchResult(config=config, kl=asked.evaluator.kl(config))

        return prune_by_library(task, search, levels)

    def scores(self, task: PruneTask, asked: SearchTask, *, name: str) -> list[list[float]]:
        """Return the loss of the dense model with one level changed, for every level of every choice.

        The scores are kept in the task's cache, so that a killed run can go on.
        """
        path = None if task.cache is None else task.cache / f"{name}-{self.objective}.json"
        scores = _read_scores(path) if path is not None and path.exists() else []
        dense, sizes = asked.space.dense, asked.evaluator.net.sizes
        loss = self._loss(asked.evaluator, dense)
        with task.bar("block scores", total=sum(sizes), unit="block") as bar:
            bar.update(sum(sizes[: len(scores)]))
            for index in range(len(scores), len(sizes)):
                changed = ((*dense[:index], level, *dense[index + 1 :]) for level in range(1, sizes[index]))
                scores.append([0.0, *map(loss, changed)])
                bar.update(sizes[index])
                if path is not None:
                    write_json(path, {"scores": scores})
        return scores

    def _loss(self, evaluator: Evaluator, dense: Config) -> Callable[[Config], float]:
        """Return the objective as a function of the config.

        The dense model is run first, so that a config with one changed block starts at the layer of that block.
        """
        net, teacher = evaluator.net, evaluator.teacher

        def hidden(config: Config) -> torch.Tensor:
            with net.cut(config, text=teacher), torch.no_grad():
                few = batches(teacher.tokens, batch_tokens=2048, device=net.model.device)
                return torch.cat([final_hidden(net.model, batch).float() for batch in few])

        if self.objective == "kl":
            net.kl(teacher, dense)
            return lambda config: net.kl(teacher, config)
        reference = hidden(dense)
        return lambda config: 1 - mean_cosine(hidden(config), reference)

    def fit(self, task: PruneTask, choices: Sequence[Choice]) -> Fits:
        """Yield the levels of cut blocks: the best units of every level, with their projections unchanged."""
        found, wanted = {one.name: one for one in sublayers(task.model)}, {choice.name: choice for choice in choices}
        total = task.num_layers * task.text.validation.numel()
        with task.bar("block library", total=total, unit="tok") as bar:
            for step in layer_statistics(task.model, task.text.validation, keep_inputs=True, progress=bar.update):
                for kind, role in OUTPUTS:
                    name = f"layers.{step.index}.{kind}"
                    if name in wanted:
                        one, inputs = found[name], torch.cat(step.statistics[role].kept)
                        weight = one.out.weight.detach().float()
                        ranks = (
                            head_norms(one, weight, inputs) if has_heads(one) else self.channel_ranks(weight, inputs)
                        )
                        yield name, [_truncated(one, level, ranks) for level in wanted[name].levels]

    def channel_ranks(self, weight: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        """Return the rank of every channel (channels), 0 for the first to be removed.

        In each of `steps` rounds those channels are removed with which the output lost so far would be least.
        """
        ranks = weight.new_full((weight.shape[1],), -1.0)
        for number in range(self.steps):
            removed = ranks >= 0
            lost = inputs[:, removed] @ weight[:, removed].T
            scores = contribution(weight, inputs, lost).mean(0)
            scores[removed] = -torch.inf
            end = (number + 1) * weight.shape[1] // self.steps
            order = scores.argsort(stable=True)
            chosen = order[int(removed.sum()) : end]
            ranks[chosen] = torch.arange(int(removed.sum()), end, dtype=ranks.dtype, device=ranks.device)
        return ranks


def head_norms(sublayer: Sublayer, weight: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    """Return the mean norm of the output of every KV group, then of each of its query heads (KV groups x 1 + ratio)."""
    num_groups, num_slots = (group.num_units for group in sublayer.block.groups)

    def norms(count: int) -> torch.Tensor:
        """Return the mean norms of the outputs of `count` equal parts of the inputs."""
        width = weight.shape[1] // count
        blocks = zip(inputs.split(width, 1), weight.split(width, 1), strict=True)
        return torch.stack([(x @ matrix.T).norm(dim=1).mean() for x, matrix in blocks])

    return torch.cat([norms(num_groups)[:, None], norms(num_groups * num_slots).reshape(num_groups, -1)], 1)


def _truncated(sublayer: Sublayer, level: Level, scores: torch.Tensor) -> LevelFit:
    """Return a level that keeps the best units, with the columns of the projection unchanged."""
    group, *others = sublayer.block.groups
    ranked = scores[:, 0] if others else scores
    best = ranked.argsort(descending=True, stable=True)[: level.counts[0]].sort().values
    units: dict[str, tuple[int, ...]] = {group.name: tuple(best.tolist())}
    for number, slots in enumerate(others, start=1):
        kept = scores[best, 1:].sum(0).argsort(descending=True, stable=True)[: level.counts[number]].sort().values
        units[slots.name] = tuple(kept.tolist()) if len(best) else tuple(range(slots.num_units))
    columns, weight = sublayer.columns(units), sublayer.out.weight.detach().float()
    return LevelFit(units=units, columns=columns, weight=weight[:, columns].to(HOST).clone(), error=0.0)


def _read_scores(path: Path) -> list[list[float]]:
    kept = checked(tuple[tuple[float, ...], ...], read_json(path).get("scores"), source=f"{path}: damaged scores")
    return [list(scores) for scores in kept]

"""Puzzle: every replacement of one block is scored in the whole model, then the best combination is chosen exactly."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from dilap.core.codec import checked, read_json, write_json
from dilap.core.space import Choice, Level, Units
from dilap.methods.shortgpt import mean_cosine
from dilap.models.anatomy import sublayers
from dilap.models.compute import batches
from dilap.models.reference import final_hidden
from dilap.models.statistics import OUTPUTS, walk
from dilap.search.allocation import Config, solve
from dilap.search.journal import Evaluator
from dilap.search.levels import Library, level_library, prune_by_library
from dilap.search.library import LevelFit, head_columns
from dilap.search.method import Pruned, PruneTask
from dilap.search.task import SearchResult, SearchTask

Objective = Literal["kl", "cosine"]


def contribution(weight: torch.Tensor, inputs: torch.Tensor, removed_output: torch.Tensor) -> torch.Tensor:
    """|s + a_i W_i| for every channel i and token, with s the output that is lost already (tokens x channels).

    `weight` (outputs x channels), `inputs` a (tokens x channels), `removed_output` s (tokens x outputs).
    """
    squares = removed_output.square().sum(1, keepdim=True)
    cross = 2 * inputs * (removed_output @ weight)
    return (squares + cross + inputs.square() * weight.square().sum(0)).clamp_min(0).sqrt()


@dataclass(frozen=True, kw_only=True)
class Puzzle:
    """Channels are ranked iteratively by what the block's output would lose, KV groups by the norm of what they give;
    blocks are cut without compensation. `objective`: KL to the dense model, as in the paper, or the cosine distance of
    the final hidden states, the toolkit's default. The exact selection is a multiple-choice knapsack.
    """

    objective: Objective = "kl"
    steps: int = 8

    def __call__(self, task: PruneTask) -> Pruned:
        library, name = level_library(task, self.build, name="puzzle")
        costs: list[NDArray[np.float64]] = []

        def search(asked: SearchTask) -> SearchResult:
            if not costs:
                costs.extend(np.array(one) for one in self.scores(task, asked, name=name))
            seconds = [[level.seconds for level in choice.levels] for choice in asked.space.choices]
            config = solve(costs, seconds, limit=asked.limit - asked.space.fixed_seconds)
            return SearchResult(config=config, kl=asked.evaluator.kl(config))

        return prune_by_library(task, search, library, name=name)

    def scores(self, task: PruneTask, asked: SearchTask, *, name: str) -> list[list[float]]:
        """Loss of the dense model with one level changed, for every level of every choice; a killed run goes on."""
        path = None if task.cache is None else task.cache / f"{name}-{self.objective}.json"
        scores = _read_scores(path) if path is not None and path.exists() else []
        dense, sizes = asked.space.dense, [len(levels) for levels in asked.evaluator.net.library]
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
        """The objective. The dense model goes first: every change of one block starts from what enters its layers."""
        net, teacher = evaluator.net, evaluator.teacher

        def hidden(config: Config) -> torch.Tensor:
            with net.cut(config, text=teacher), torch.no_grad():
                found = [final_hidden(net.model, batch).float() for batch in batches(teacher.tokens, batch_tokens=2048)]
                return torch.cat(found)

        if self.objective == "kl":
            net.kl(teacher, dense)
            return lambda config: net.kl(teacher, config)
        reference = hidden(dense)
        return lambda config: 1 - mean_cosine(hidden(config), reference)

    def build(self, task: PruneTask) -> Library:
        """The library of truncated blocks: units in rank order, projections as they were."""
        ranks: dict[str, torch.Tensor] = {}
        outs = {one.name: one.out for one in sublayers(task.model)}
        total = task.num_layers * task.text.validation.numel()
        with task.bar("block library", total=total, unit="tok") as bar:
            for step in walk(task.model, task.text.validation, keep_inputs=True, progress=bar.update):
                for kind, role in OUTPUTS:
                    name = f"layers.{step.index}.{kind}"
                    if name in outs:
                        weight, inputs = outs[name].weight.detach().float(), torch.cat(step.statistics[role].kept)
                        ranks[name] = (
                            self._head_norms(task, weight, inputs)
                            if kind == "attention"
                            else self.channel_ranks(weight, inputs)
                        )
        return [
            [
                _truncated(task, choice, level, outs[choice.name].weight.detach().float(), ranks[choice.name])
                for level in choice.levels
            ]
            for choice in task.space.choices
        ]

    def channel_ranks(self, weight: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        """Rank of every channel (channels), the first to go 0: in `steps` rounds the lowest ones join those removed."""
        ranks = torch.full((weight.shape[1],), -1.0)
        for number in range(self.steps):
            removed = ranks >= 0
            lost = inputs[:, removed] @ weight[:, removed].T
            scores = contribution(weight, inputs, lost).mean(0)
            scores[removed] = -torch.inf
            end = (number + 1) * weight.shape[1] // self.steps
            order = scores.argsort(stable=True)
            chosen = order[int(removed.sum()) : end]
            ranks[chosen] = torch.arange(int(removed.sum()), end, dtype=ranks.dtype)
        return ranks

    def _head_norms(self, task: PruneTask, weight: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        """Mean norm of what every KV group gives, and each of its query heads (KV groups x 1 + ratio)."""
        dense, head_dim = task.architecture.layers[0], task.architecture.head_dim

        def norms(width: int) -> torch.Tensor:
            blocks = zip(inputs.split(width, 1), weight.split(width, 1), strict=True)
            return torch.stack([(x @ matrix.T).norm(dim=1).mean() for x, matrix in blocks])

        groups = norms(weight.shape[1] // dense.num_kv_heads)
        return torch.cat([groups[:, None], norms(head_dim).reshape(dense.num_kv_heads, -1)], 1)


def _truncated(task: PruneTask, choice: Choice, level: Level, weight: torch.Tensor, scores: torch.Tensor) -> LevelFit:
    """The best units of a level, with the columns of the projection as they were."""
    if choice.kind == "ffn":
        kept = scores.argsort(descending=True, stable=True)[: level.num_channels].sort().values
        units: Units = {"channels": tuple(kept.tolist())}
    else:
        dense, head_dim = task.architecture.layers[choice.layer], task.architecture.head_dim
        ratio = dense.num_heads // dense.num_kv_heads
        groups = scores[:, 0].argsort(descending=True, stable=True)[: level.num_kv_groups].sort().values
        slots = scores[groups, 1:].sum(0).argsort(descending=True, stable=True)[: level.num_query_slots].sort().values
        units = {
            "kv_groups": tuple(groups.tolist()),
            "query_slots": tuple(slots.tolist()) if len(groups) else tuple(range(ratio)),
        }
        kept = head_columns(units["kv_groups"], units["query_slots"], ratio=ratio, head_dim=head_dim)
    return LevelFit(units=units, columns=kept, weight=weight[:, kept].clone(), error=0.0)


def _read_scores(path: Path) -> list[list[float]]:
    kept = checked(tuple[tuple[float, ...], ...], read_json(path).get("scores"), source=f"{path}: damaged scores")
    return [list(scores) for scores in kept]

"""ZipLM: optimal brain surgery on output projections, a database of levels, and SPDY's search over layer weights."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from dilap.search.allocation import Config, solve
from dilap.search.levels import compensated_library, prune_by_library
from dilap.search.method import Pruned, PruneTask
from dilap.search.task import SearchResult, SearchTask


@dataclass(frozen=True, kw_only=True)
class _Weighted(SearchResult):
    """The best config; `weights` are weightings of the layers' errors, those of the best configs (configs x layers)."""

    weights: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class ZipLm:
    """One-shot ZipLM at SPDY's settings: 100 random weightings of the layers' errors, each solved exactly and scored by
    the real loss; then a local search that draws ever fewer weights again, from a tenth of the layers down to one,
    and gives a number up after 100 failures. Dampening 1 %; the database holds the measured levels. A corrected limit
    starts from the 100 best weightings for the limit before it instead of random ones.

    Its gradual mode, which trains between rising speed-ups, is what `--recover` does once at the end.
    """

    starts: int = 100
    failures: int = 100
    dampening: float = 0.01

    def __call__(self, task: PruneTask) -> Pruned:
        options = replace(task.levels.library, order="obs", ridge=self.dampening)
        library, name = compensated_library(task, options)

        def search(asked: SearchTask) -> SearchResult:
            with task.bar("SPDY", total=None, unit="weighting") as bar:
                return self.search(asked, progress=bar.update)

        return prune_by_library(task, search, library, name=name)

    def search(self, task: SearchTask, *, progress: Callable[[int], None] = lambda _: None) -> SearchResult:
        """SPDY: the weighting of layer errors whose exact solution has the least real KL. `progress` gets 1s."""
        errors = [np.array([fit.error for fit in levels]) for levels in task.evaluator.net.library]
        seconds = [[level.cost for level in choice.levels] for choice in task.space.choices]
        limit = task.limit - task.space.fixed_cost
        known: dict[Config, tuple[float, torch.Tensor]] = {}  # with the first weighting that led there

        def score(weights: torch.Tensor) -> tuple[float, Config]:
            costs = [float(weight) * error for weight, error in zip(weights, errors, strict=True)]
            config = solve(costs, seconds, limit=limit)
            if config not in known:
                known[config] = task.evaluator.kl(config), weights
            progress(1)
            return known[config][0], config

        generator = torch.Generator().manual_seed(task.options.seed)
        num_starts = max(1, self.starts)
        starts = [torch.rand(len(errors), generator=generator) for _ in range(num_starts)]
        if isinstance(task.previous, _Weighted):
            starts = list(task.previous.weights)
        (kl, config), tried = self._search(score, starts, generator)
        task.report(f"SPDY: {tried} weightings, {len(known)} configs, KL {kl:.3f}")
        best = sorted(known.values(), key=lambda one: one[0])[:num_starts]
        return _Weighted(config=config, kl=kl, weights=torch.stack([weights for _, weights in best]))

    def _search(
        self,
        score: Callable[[torch.Tensor], tuple[float, Config]],
        starts: list[torch.Tensor],
        generator: torch.Generator,
    ) -> tuple[tuple[float, Config], int]:
        """The best score, and the number of weightings scored."""
        best, weights = min(((score(drawn), drawn) for drawn in starts), key=lambda one: one[0])
        tried, num_layers = len(starts), len(weights)
        for changed in range(max(1, num_layers // 10), 0, -1):
            failures = 0
            while failures < self.failures:
                drawn = weights.clone()
                drawn[torch.randperm(num_layers, generator=generator)[:changed]] = torch.rand(
                    changed, generator=generator
                )
                tried += 1
                if (found := score(drawn)) < best:
                    best, weights, failures = found, drawn, 0
                else:
                    failures += 1
        return best, tried

"""ZipLM: levels made by optimal brain surgery on output projections, chosen by SPDY's search.

SPDY gives the error of every sublayer a weight, and searches for the weights whose exact solution has the least loss.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from dilap.search.allocation import Config, solve
from dilap.search.layer_error import require_one_precision
from dilap.search.levels import compensated_library, prune_by_library
from dilap.search.method import Pruned, PruneTask
from dilap.search.task import SearchResult, SearchTask


@dataclass(frozen=True, kw_only=True)
class _Weighted(SearchResult):
    """A search result with the weights of the sublayers' errors that led to the best configs (configs x sublayers)."""

    weights: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class ZipLm:
    """One-shot ZipLM with SPDY's settings, over the measured levels.

    First `starts` random weightings of the sublayers' errors are each solved exactly and scored by the real loss. Then
    a local search draws some of the best weights again, first a tenth of them and ever fewer, down to one. It goes on
    to the next smaller number after `failures` draws in a row that were no better. The search for a corrected limit
    begins with the best weightings for the limit before it, instead of random ones. `dampening` is the ridge of the
    optimal brain surgery, relative to the mean diagonal.

    ZipLM's gradual mode, which trains between rising speed-ups, is left out; `--recover` trains once at the end.
    """

    starts: int = 100
    failures: int = 100
    dampening: float = 0.01

    def __call__(self, task: PruneTask) -> Pruned:
        options = replace(task.levels.library, order="obs", ridge=self.dampening)
        levels = compensated_library(task, options)

        def search(asked: SearchTask) -> SearchResult:
            with task.bar("SPDY", total=None, unit="weighting") as bar:
                return self.search(asked, progress=bar.update)

        return prune_by_library(task, search, levels)

    def search(self, task: SearchTask, *, progress: Callable[[int], None] = lambda _: None) -> SearchResult:
        """Return the best config of SPDY's search, scored by the real KL; `progress` gets 1 for every weighting."""
        require_one_precision(task.space)
        errors = [np.array([fit.error for fit in levels]) for levels in task.evaluator.net.library]
        seconds = task.space.level_costs()
        limit = task.limit - task.space.fixed_cost
        known: dict[Config, tuple[float, torch.Tensor]] = {}  # real KL, and the first weighting that led to the config

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
        """Return the best score with its config, and the number of weightings scored."""
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

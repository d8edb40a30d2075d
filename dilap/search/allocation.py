"""Choose one level per sublayer under a latency limit, given a quadratic model of the loss.

Notation: p_s are the probabilities of the levels of sublayer s; c is the choice, a vector over all (sublayer, level)
pairs that is 1 for chosen levels and 0 elsewhere; b and Q are the linear and quadratic coefficients over the same
pairs; h is the excess of the latency over the limit, divided by the limit.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from dilap.core.errors import Infeasible
from dilap.core.space import Space
from dilap.search.options import RelaxationOptions

Config = tuple[int, ...]
_LINEARISATIONS = 20  # of the costs of pairs, before the fastest levels are taken
_TOO_SLOW = "even the smallest levels take more than is allowed: take a larger budget or smaller ratio"
_BUCKETS = 20_000  # rounding 60 sublayers up to multiples of 1/20000 of the limit wastes at most 0.3 % of it


@dataclass(frozen=True, kw_only=True)
class Quadratic:
    """A quadratic model of the loss: loss(c) = b'c + c'Qc/2, over the concatenated levels of all choices.

    `sizes` has the number of levels of each choice.
    """

    b: torch.Tensor
    Q: torch.Tensor
    sizes: tuple[int, ...]

    @property
    def offsets(self) -> list[int]:
        """The position of the first level of each choice."""
        return [sum(self.sizes[:index]) for index in range(len(self.sizes))]

    @property
    def owner(self) -> torch.Tensor:
        """The index of the choice of every level (levels)."""
        return torch.repeat_interleave(torch.arange(len(self.sizes)), torch.tensor(self.sizes))

    def value(self, config: Sequence[int]) -> float:
        """Return the loss that the model predicts for `config`."""
        chosen = torch.tensor([offset + level for offset, level in zip(self.offsets, config, strict=True)])
        return float(self.b[chosen].sum() + 0.5 * self.Q[chosen][:, chosen].sum())

    def diagonal_only(self) -> "Quadratic":
        """Return the model with the diagonal of Q alone: without interactions between choices."""
        return Quadratic(b=self.b, Q=torch.diag(self.Q.diagonal()), sizes=self.sizes)

    def at(self, kept: Sequence[Sequence[int]]) -> "Quadratic":
        """Return the model over the levels `kept`, indices by choice."""
        levels = torch.tensor([offset + k for offset, own in zip(self.offsets, kept, strict=True) for k in own])
        return Quadratic(b=self.b[levels], Q=self.Q[levels][:, levels], sizes=tuple(map(len, kept)))

    def shrunk(self, *, num_rows: float, num_changes: int) -> "Quadratic":
        """Return the model with off-diagonal terms of Q multiplied by rows / (rows + changes).

        Q is estimated from `num_rows` rows for `num_changes` changes, of which the levels consist; few rows make its
        off-diagonal terms mostly noise.
        """
        keep = num_rows / (num_rows + num_changes)
        diagonal = torch.diag(self.Q.diagonal())
        return Quadratic(b=self.b, Q=diagonal + keep * (self.Q - diagonal), sizes=self.sizes)


class ExpectedCost:
    """The expected cost of a network whose levels are drawn independently, differentiable in their probabilities.

    It is fixed + sum_s p_s' t_s, with t_s the costs of the levels of choice s, plus p_s' W p_r for every pair (s, r) of
    choices with the costs W of their own.
    """

    def __init__(self, space: Space[Any]) -> None:
        most = max(len(choice.levels) for choice in space.choices)
        self._fixed = space.fixed_cost
        self._levels = torch.zeros(len(space.choices), most)
        for row, choice in enumerate(space.choices):
            self._levels[row, : len(choice.levels)] = torch.tensor([level.cost for level in choice.levels])
        pairs = torch.zeros(len(space.choices), most, len(space.choices), most)
        for one in space.couplings:
            costs = torch.tensor(one.costs)
            pairs[one.first, : len(costs), one.second, : costs.shape[1]] += costs
        self._pairs = pairs.flatten(2).flatten(0, 1)  # one matrix: a loop over 50 pairs takes as long as all the rest

    def __call__(self, probabilities: torch.Tensor) -> torch.Tensor:
        """Return the expected cost for probabilities of the shape (... x choices x most levels of a choice)."""
        flat = probabilities.flatten(-2)
        return self._fixed + flat @ self._levels.flatten() + (flat @ self._pairs * flat).sum(-1)


def relax(
    quadratic: Quadratic, space: Space[Any], *, limit: float, starts: Sequence[Config], options: RelaxationOptions
) -> list[torch.Tensor]:
    """Return, for every start, level probabilities that minimise the expected loss with the latency under `limit`.

    When the levels are drawn independently, the expected loss is b'p + p'Qp/2 plus a correction for the
    block of Q of each sublayer; without it mixtures of levels would look cheaper than any single level. The limit
    enters as the augmented Lagrangian of an inequality, (max(0, m + r h)^2 - m^2) / (2 r), with the multiplier m and
    the penalty r. All starts are optimised in one batch. A start is a config, or empty for equal probabilities.
    """
    index, mask = _padded_index(quadratic.sizes)
    cost = ExpectedCost(space)
    within = _within_blocks(quadratic)
    diagonal = quadratic.Q.diagonal()
    scale = 1 / max(float(diagonal.mean()) * len(quadratic.sizes), 1e-12)  # makes losses of any size comparable with h
    logits = torch.stack([_start_logits(config, mask) for config in starts]).requires_grad_(True)
    adam = torch.optim.Adam([logits], lr=options.learning_rate)
    multiplier = torch.zeros(len(starts))
    for step in range(options.steps):
        progress = step / max(options.steps - 1, 1)
        temperature = _geometric(options.temperature, progress)
        penalty = _geometric(options.penalty, progress)
        p = torch.softmax((logits / temperature).masked_fill(~mask, -torch.inf), -1)
        excess = (cost(p) - limit) / limit
        flat = p.reshape(len(starts), -1)[:, index]
        own = (flat @ diagonal) - torch.einsum("ri,ij,rj->r", flat, within, flat)
        loss = flat @ quadratic.b + 0.5 * torch.einsum("ri,ij,rj->r", flat, quadratic.Q, flat) + 0.5 * own
        lagrangian = ((multiplier + penalty * excess).clamp_min(0).square() - multiplier.square()) / (2 * penalty)
        adam.zero_grad()
        (scale * loss + lagrangian).sum().backward()
        adam.step()
        if step % options.multiplier_every == options.multiplier_every - 1:
            multiplier = (multiplier + penalty * excess.detach()).clamp_min(0)
    return list(flat.detach())


def _padded_index(sizes: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return where the levels lie in a flattened matrix (choices x most levels of a choice), and its mask of levels."""
    mask = torch.arange(max(sizes))[None, :] < torch.tensor(sizes)[:, None]
    return mask.reshape(-1).nonzero().squeeze(1), mask


def _start_logits(config: Config, mask: torch.Tensor) -> torch.Tensor:
    logits = torch.zeros(mask.shape)
    if config:
        logits[torch.arange(len(config)), torch.tensor(config)] = 2.0
    return logits


def _within_blocks(quadratic: Quadratic) -> torch.Tensor:
    """Return Q with zeros for pairs of levels of different choices."""
    owner = quadratic.owner
    return torch.where(owner[:, None] == owner[None, :], quadratic.Q, 0.0)


def _geometric(ends: tuple[float, float], progress: float) -> float:
    return float(ends[0] * (ends[1] / ends[0]) ** progress)


def project(
    quadratic: Quadratic, space: Space[Any], *, limit: float, probabilities: torch.Tensor | None = None
) -> Config:
    """Return the config within `limit` that has the least sum of linear costs, found exactly. Raises Infeasible.

    The cost of a level is its own loss, b + diag(Q)/2, plus, given `probabilities`, its expected interaction with the
    other choices: Q without the blocks of single choices, times p.
    """
    parts = linear_losses(quadratic, probabilities)
    if space.couplings:
        return _solve_coupled(parts, space, limit=limit, probabilities=probabilities)
    return solve(parts, space.level_costs(), limit=limit - space.fixed_cost)


def linear_losses(quadratic: Quadratic, probabilities: torch.Tensor | None = None) -> list[NDArray[np.float64]]:
    """Return what every level of every choice loses, with what it loses together with the others at `probabilities`."""
    losses = quadratic.b + 0.5 * quadratic.Q.diagonal()
    if probabilities is not None:
        between = quadratic.Q - _within_blocks(quadratic)
        losses = losses + between @ probabilities
    return [part.numpy() for part in losses.double().split(list(quadratic.sizes))]


def at_config(quadratic: Quadratic, config: Config) -> torch.Tensor:
    """Return the probabilities of a config, whose levels are certain."""
    return _chosen(quadratic.sizes, config).to(quadratic.Q)


def _solve_coupled(
    costs: Sequence[NDArray[np.float64]], space: Space[Any], *, limit: float, probabilities: torch.Tensor | None
) -> Config:
    """Return a config within `limit` for costs of pairs, which no knapsack holds. Raises Infeasible.

    The costs of the pairs are linearised, first at `probabilities` (or at the dense model) and then at every config
    found; what a config exceeds the limit by is taken off the next one's. It is not always the best config: `swap`
    improves it with the true costs.
    """
    seconds, W = _cost_terms(space)
    sizes, allowed = [len(part) for part in costs], limit
    at = _chosen(sizes, space.dense) if probabilities is None else probabilities.double()
    for _ in range(_LINEARISATIONS):
        pull = W @ at
        spent = allowed - space.fixed_cost + 0.5 * float(at @ pull)  # at @ W @ at has every pair twice
        config = solve(costs, [part.tolist() for part in (seconds + pull).split(sizes)], limit=spent)
        excess = space.cost(config) - limit
        if excess <= 0:
            return config
        allowed, at = allowed - excess, _chosen(sizes, config)
    if space.cost(space.fastest) > limit:
        raise Infeasible(_TOO_SLOW)
    return space.fastest


def _chosen(sizes: Sequence[int], config: Config) -> torch.Tensor:
    """Return the vector over all levels that is 1 for the chosen ones and 0 elsewhere."""
    return torch.cat([functional.one_hot(torch.tensor(k), n) for k, n in zip(config, sizes, strict=True)]).double()


def _cost_terms(space: Space[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the levels' own costs, and the symmetric matrix of what pairs of levels cost together."""
    seconds = torch.tensor([level.cost for choice in space.choices for level in choice.levels], dtype=torch.float64)
    offsets = np.cumsum([0, *(len(choice.levels) for choice in space.choices)])
    W = torch.zeros(len(seconds), len(seconds), dtype=torch.float64)
    for one in space.couplings:
        first, second = (slice(int(offsets[i]), int(offsets[i + 1])) for i in (one.first, one.second))
        W[first, second] += torch.tensor(one.costs, dtype=torch.float64)
        W[second, first] += torch.tensor(one.costs, dtype=torch.float64).T
    return seconds, W


def solve(costs: Sequence[NDArray[np.float64]], seconds: Sequence[Sequence[float]], *, limit: float) -> Config:
    """Choose one level per choice with the least total cost and at most `limit` seconds (a multiple-choice knapsack).

    This is dynamic programming over latencies in whole buckets. It is exact but for the rounding of latencies, which is
    upwards, so that the limit is never exceeded. What rounding leaves of the limit is used by changes of single levels.
    Raises Infeasible when even the fastest levels are too slow.
    """
    fastest = sum(min(part) for part in seconds)
    if fastest > limit:
        raise Infeasible(_TOO_SLOW)
    bucket = max(limit, 1e-30) / _BUCKETS  # at a limit of 0 only free levels fit
    weights = [[int(np.ceil(s / bucket - 1e-9)) for s in part] for part in seconds]
    if sum(min(part) for part in weights) > _BUCKETS:  # they fit but for rounding: take the fastest
        return tuple(int(np.argmin(part)) for part in seconds)
    best = np.zeros(_BUCKETS + 1)
    picks = []
    for part, weight in zip(costs, weights, strict=True):
        table = np.full((len(weight), _BUCKETS + 1), np.inf)
        for level, need in enumerate(weight):
            if need <= _BUCKETS:
                table[level, need:] = best[: _BUCKETS + 1 - need] + part[level]
        picks.append(table.argmin(0).astype(np.int16))
        best = table.min(0)
    config, left = [], _BUCKETS
    for pick, weight in zip(reversed(picks), reversed(weights), strict=True):
        level = int(pick[left])
        config.append(level)
        left -= weight[level]
    return _fill_slack(tuple(reversed(config)), costs, seconds, limit=limit)


def _fill_slack(
    config: Config, costs: Sequence[NDArray[np.float64]], seconds: Sequence[Sequence[float]], *, limit: float
) -> Config:
    """Make single changes that lower the cost and still keep the limit, the best first, until none is left."""
    while True:
        used = sum(part[level] for part, level in zip(seconds, config, strict=True))
        gains = [
            (costs[s][k] - costs[s][config[s]], s, k)
            for s in range(len(config))
            for k in range(len(seconds[s]))
            if costs[s][k] < costs[s][config[s]] and used + seconds[s][k] - seconds[s][config[s]] <= limit
        ]
        if not gains:
            return config
        _, s, k = min(gains)
        config = (*config[:s], k, *config[s + 1 :])


def swap(quadratic: Quadratic, space: Space[Any], config: Config, *, limit: float) -> Config:
    """Change one or two choices at a time within `limit`, the best change first, until none lowers the quadratic."""
    while True:
        gains = move_gains(quadratic, space, config, limit=limit)
        best = int(gains.argmin())
        if gains.reshape(-1)[best] >= -1e-9:
            return config
        config = move(quadratic, config, best)


def move_gains(quadratic: Quadratic, space: Space[Any], config: Config, *, limit: float) -> torch.Tensor:
    """Return how the quadratic changes when two choices move to levels i and j at once (levels x levels).

    It is infinite where the move breaks `limit`, changes nothing or names two levels of one choice. Where one of the
    two levels is chosen already, only the other choice moves.
    """
    offsets = torch.tensor(quadratic.offsets)
    owner = quadratic.owner
    chosen = offsets + torch.tensor(config)
    current = chosen[owner]  # the chosen level of every level's own choice
    seconds, W = _cost_terms(space)
    slower = seconds - seconds[current]
    slower = _changes(seconds, W, chosen, current) if space.couplings else slower[:, None] + slower[None, :]
    allowed = (owner[:, None] != owner[None, :]) & (slower <= limit - space.cost(config))
    unmoved = current == torch.arange(len(current))
    allowed &= ~(unmoved[:, None] & unmoved[None, :])
    changes = _changes(quadratic.b.double(), quadratic.Q.double(), chosen, current)
    return torch.where(allowed, changes, torch.inf)


def _changes(b: torch.Tensor, Q: torch.Tensor, chosen: torch.Tensor, current: torch.Tensor) -> torch.Tensor:
    """Return how b'c + c'Qc/2 changes when two choices move to levels i and j at once (levels x levels).

    `chosen` are the levels of c, `current` for every level the chosen one of its own choice.
    """
    every = torch.arange(len(b))
    pull = b + Q[:, chosen].sum(1)
    # For one choice from `current` to i: the linear part plus its own curvature. For two: also their interaction.
    single = pull - pull[current] + 0.5 * (Q.diagonal() + Q.diagonal()[current]) - Q[every, current]
    interaction = Q - Q[:, current] - Q[current, :] + Q[current][:, current]
    return single[:, None] + single[None, :] + interaction


def move(quadratic: Quadratic, config: Config, index: int) -> Config:
    """Return `config` after the move at this index of the flattened result of `move_gains`."""
    owner = quadratic.owner
    moved = list(config)
    for level in divmod(index, len(quadratic.b)):
        choice = int(owner[level])
        moved[choice] = level - quadratic.offsets[choice]
    return tuple(moved)

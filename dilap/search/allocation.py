"""Choose one level per sublayer under a latency limit, given a quadratic model of the loss.

Notation of the search (sota and search, C2-C3): p_s are the level probabilities of sublayer s, c their one-hot
version, b and Q the linear and quadratic coefficients over all (sublayer, level) pairs, h the relative excess of the
latency over the limit.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from dilap.core.errors import Infeasible
from dilap.core.space import Space

Config = tuple[int, ...]
_BUCKETS = 20_000  # rounding up 60 sublayers to 1/20000 of the limit wastes at most 0.3 % of it


@dataclass(frozen=True, kw_only=True)
class Quadratic:
    """loss(c) = b'c + c'Qc/2 over the concatenated levels of all choices; `sizes` is the levels of each choice."""

    b: torch.Tensor
    Q: torch.Tensor
    sizes: tuple[int, ...]

    @property
    def offsets(self) -> list[int]:
        return [sum(self.sizes[:index]) for index in range(len(self.sizes))]

    def value(self, config: Sequence[int]) -> float:
        chosen = torch.tensor([offset + level for offset, level in zip(self.offsets, config, strict=True)])
        return float(self.b[chosen].sum() + 0.5 * self.Q[chosen][:, chosen].sum())

    def diagonal_only(self) -> "Quadratic":
        """Without the terms between levels of different choices."""
        return Quadratic(b=self.b, Q=torch.diag(self.Q.diagonal()), sizes=self.sizes)

    def shrunk(self, *, num_rows: float) -> "Quadratic":
        """Off-diagonals shrunk by rows / (rows + dimension): few rows make them mostly noise (C3)."""
        keep = num_rows / (num_rows + len(self.b))
        diagonal = torch.diag(self.Q.diagonal())
        return Quadratic(b=self.b, Q=diagonal + keep * (self.Q - diagonal), sizes=self.sizes)


@dataclass(frozen=True, kw_only=True)
class RelaxationOptions:
    """Adam on level logits; `penalty` and `temperature` go geometrically from the first to the second value."""

    steps: int = 400
    learning_rate: float = 0.05
    temperature: tuple[float, float] = (1.0, 0.1)
    penalty: tuple[float, float] = (10.0, 100.0)
    multiplier_every: int = 20


def relax(
    quadratic: Quadratic, space: Space, *, limit: float, starts: Sequence[Config], options: RelaxationOptions
) -> list[torch.Tensor]:
    """Level probabilities that minimise the expected loss with the expected latency under `limit`, per start.

    The differentiable latency is the sum of p_s' T_s. The expected loss under independent sampling of levels is
    b'p + p'Qp/2 plus a term for each sublayer's own block, without which mixtures look cheaper than any vertex. The
    latency enters by an augmented Lagrangian for inequalities (C2 4b). All starts are optimised in one batch.
    """
    index, mask = _padded_index(quadratic.sizes)
    seconds = torch.zeros(mask.shape)
    for row, choice in enumerate(space.choices):
        seconds[row, : len(choice.levels)] = torch.tensor([level.cost for level in choice.levels])
    within = _within_blocks(quadratic)
    diagonal = quadratic.Q.diagonal()
    scale = 1 / max(float(diagonal.mean()) * len(quadratic.sizes), 1e-12)  # losses of any size meet h on one scale
    logits = torch.stack([_start_logits(config, mask) for config in starts]).requires_grad_(True)
    adam = torch.optim.Adam([logits], lr=options.learning_rate)
    multiplier = torch.zeros(len(starts))
    for step in range(options.steps):
        progress = step / max(options.steps - 1, 1)
        temperature = _geometric(options.temperature, progress)
        penalty = _geometric(options.penalty, progress)
        p = torch.softmax((logits / temperature).masked_fill(~mask, -torch.inf), -1)
        excess = (space.fixed_cost + (p * seconds).sum((1, 2)) - limit) / limit
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
    """Positions of the real levels in a (choices x most levels) matrix, and that matrix's mask."""
    mask = torch.arange(max(sizes))[None, :] < torch.tensor(sizes)[:, None]
    return mask.reshape(-1).nonzero().squeeze(1), mask


def _start_logits(config: Config, mask: torch.Tensor) -> torch.Tensor:
    logits = torch.zeros(mask.shape)
    if config:
        logits[torch.arange(len(config)), torch.tensor(config)] = 2.0
    return logits


def _within_blocks(quadratic: Quadratic) -> torch.Tensor:
    """Q with only the terms inside one choice."""
    owner = torch.repeat_interleave(torch.arange(len(quadratic.sizes)), torch.tensor(quadratic.sizes))
    return torch.where(owner[:, None] == owner[None, :], quadratic.Q, 0.0)


def _geometric(ends: tuple[float, float], progress: float) -> float:
    return float(ends[0] * (ends[1] / ends[0]) ** progress)


def project(quadratic: Quadratic, space: Space, *, limit: float, probabilities: torch.Tensor | None = None) -> Config:
    """The exact best config under `limit` for linear costs: each level's own loss plus, given `probabilities`, its
    expected interaction with the other choices (C2 4c)."""
    costs = quadratic.b + 0.5 * quadratic.Q.diagonal()
    if probabilities is not None:
        between = quadratic.Q - _within_blocks(quadratic)
        costs = costs + between @ probabilities
    parts = costs.double().split(list(quadratic.sizes))
    seconds = [[level.cost for level in choice.levels] for choice in space.choices]
    return solve([part.numpy() for part in parts], seconds, limit=limit - space.fixed_cost)


def solve(costs: Sequence[NDArray[np.float64]], seconds: Sequence[Sequence[float]], *, limit: float) -> Config:
    """Multiple-choice knapsack: one level per choice, least total cost, seconds summing to at most `limit`.

    Exact over integer latency buckets rounded up, so the limit is never exceeded; the slack that rounding leaves is
    filled by single upgrades. Raises Infeasible when even the fastest levels are too slow.
    """
    fastest = sum(min(part) for part in seconds)
    if fastest > limit:
        raise Infeasible("even the smallest levels take more than is allowed: take a larger budget or smaller ratio")
    bucket = max(limit, 1e-30) / _BUCKETS  # at a limit of 0 only free levels fit
    weights = [[int(np.ceil(s / bucket - 1e-9)) for s in part] for part in seconds]
    if sum(min(part) for part in weights) > _BUCKETS:  # only rounding stands in the way: take the fastest
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
    """Take single changes that lower the cost and still keep the limit, the best first, until none is left."""
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


def swap(quadratic: Quadratic, space: Space, config: Config, *, limit: float) -> Config:
    """Improve the quadratic by changes of one or two choices at a time within `limit`, until there is none (C2 4d)."""
    while True:
        gains = move_gains(quadratic, space, config, limit=limit)
        best = int(gains.argmin())
        if gains.reshape(-1)[best] >= -1e-9:
            return config
        config = move(quadratic, config, best)


def move_gains(quadratic: Quadratic, space: Space, config: Config, *, limit: float) -> torch.Tensor:
    """Change of the quadratic for moving two choices to levels i and j at once, (levels x levels); infinite where the
    move breaks `limit` or changes nothing. A pair with one level already chosen is a move of one choice."""
    offsets = torch.tensor(quadratic.offsets)
    owner = torch.repeat_interleave(torch.arange(len(quadratic.sizes)), torch.tensor(quadratic.sizes))
    seconds = torch.tensor([level.cost for choice in space.choices for level in choice.levels], dtype=torch.float64)
    Q, b, every = quadratic.Q.double(), quadratic.b.double(), torch.arange(len(quadratic.b))
    chosen = offsets + torch.tensor(config)
    current = chosen[owner]  # the chosen level of every level's own choice
    pull = b + Q[:, chosen].sum(1)
    # One choice from `current` to i: linear part plus its own curvature; two choices: also their interaction.
    single = pull - pull[current] + 0.5 * (Q.diagonal() + Q.diagonal()[current]) - Q[every, current]
    interaction = Q - Q[:, current] - Q[current, :] + Q[current][:, current]
    slower = seconds - seconds[current]
    allowed = (owner[:, None] != owner[None, :]) & (slower[:, None] + slower[None, :] <= limit - space.cost(config))
    unmoved = current == every
    allowed &= ~(unmoved[:, None] & unmoved[None, :])
    return torch.where(allowed, single[:, None] + single[None, :] + interaction, torch.inf)


def move(quadratic: Quadratic, config: Config, index: int) -> Config:
    """`config` after the move at a flat index of `move_gains`."""
    owner = torch.repeat_interleave(torch.arange(len(quadratic.sizes)), torch.tensor(quadratic.sizes))
    moved = list(config)
    for level in divmod(index, len(quadratic.b)):
        choice = int(owner[level])
        moved[choice] = level - quadratic.offsets[choice]
    return tuple(moved)

"""Small problems of allocation: spaces that have only costs, and quadratic models like those of a Fisher pass."""

from collections.abc import Sequence

import numpy as np
import torch

from dilap.core.groups import Block, Group
from dilap.core.space import Choice, Level, Space
from dilap.models.anatomy import architecture_of
from dilap.search.allocation import Quadratic
from standins.models import tiny_model

Table = Sequence[tuple[float, ...]]


def space_of(table: Table, *, fixed_cost: float = 0.0) -> Space:
    """A space whose choices have only costs."""
    choices = []
    for index, row in enumerate(table):
        group = Group(name=f"layers.{index}.channels", num_units=len(row))
        levels = tuple(Level(counts=(len(row) - k,), cost=cost) for k, cost in enumerate(row))
        block = Block(name=f"layers.{index}.ffn", layer=index, kind="ffn", groups=(group,))
        choices.append(Choice(block=block, levels=levels))
    return Space(architecture=architecture_of(tiny_model("llama")), choices=tuple(choices), fixed_cost=fixed_cost)


def random_table(seed: int, *, choices: int = 5, levels: int = 4) -> Table:
    """Falling seconds, as measured levels are."""
    generator = np.random.default_rng(seed)
    return [tuple(sorted(generator.uniform(0, 1e-3, levels).tolist(), reverse=True)) for _ in range(choices)]


def random_quadratic(seed: int, table: Table) -> Quadratic:
    """Losses that grow as levels fall, with interactions; like those of a Fisher pass Q is a product A'A."""
    generator = torch.Generator().manual_seed(seed)
    sizes = tuple(len(row) for row in table)
    scale = torch.cat([torch.linspace(0, 1, size) for size in sizes])
    A = torch.randn(4 * len(scale), len(scale), generator=generator) * scale + 0.5 * scale
    b = 0.2 * torch.randn(len(scale), generator=generator) * scale
    return Quadratic(b=b, Q=A.T @ A / len(A), sizes=sizes)

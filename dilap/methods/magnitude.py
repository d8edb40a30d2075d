"""Structured magnitude pruning: remove units whose weights in the output projection are small, equally in every layer.

FLAP's authors call this baseline mag-sp.
"""

import torch

from dilap.methods.units import unit_scores
from dilap.models.anatomy import sublayers
from dilap.search.method import Pruned, PruneTask


def prune(task: PruneTask) -> Pruned:
    """Score channels by the norm of their column of the output projection, heads by the sum over their columns."""
    scores: dict[str, torch.Tensor] = {}
    for one in sublayers(task.model):
        scores |= unit_scores(one.out.weight.detach().float().norm(dim=0), one)
    return Pruned(plan=task.keep_equal_shares(scores))

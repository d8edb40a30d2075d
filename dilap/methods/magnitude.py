"""Structured magnitude pruning: remove units whose weights in the output projection are small, equally in every layer.

FLAP's authors call this baseline mag-sp.
"""

from dilap.methods.units import by_unit
from dilap.models.anatomy import sublayers
from dilap.search.method import Pruned, PruneTask


def prune(task: PruneTask) -> Pruned:
    """Score channels by the norm of their column of the output projection, KV groups by the sum over their columns."""
    scores = {
        one.block.main.name: by_unit(one.out.weight.detach().float().norm(dim=0), one).sum(1)
        for one in sublayers(task.model)
    }
    return Pruned(plan=task.keep_equal_shares(scores))

"""Magnitude, structured (mag_sp): units whose output projection is small go first, equally many in every layer."""

from dilap.methods.units import by_unit
from dilap.models.anatomy import sublayers
from dilap.search.method import Pruned, PruneTask


def prune(task: PruneTask) -> Pruned:
    """Score of a channel: the norm of its column of the output projection; of a KV group: the sum over its columns."""
    scores = {
        one.block.main.name: by_unit(one.out.weight.detach().float().norm(dim=0), one).sum(1)
        for one in sublayers(task.model)
    }
    return Pruned(plan=task.keep_equal_shares(scores))

"""Wanda, structured (Wanda-sp, as FLAP's authors define it): weight times activation norm, summed over a unit."""

import torch

from dilap.methods.units import by_unit, num_units, out_statistics, removed_columns, restored, zero_columns_
from dilap.models.anatomy import sublayers
from dilap.models.statistics import walk
from dilap.search.method import Pruned, PruneTask


def channel_scores(weight: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
    """mean_o |W_oj| * |x_j|: `weight` (outputs x inputs), `norms` (inputs)."""
    return weight.detach().float().abs().mean(0) * norms


def prune(task: PruneTask) -> Pruned:
    """The same share of every layer's KV groups and channels, scored on what the pruned layers before them give.

    How many units stay does not depend on the scores, so the share is found first, and the layers are walked once.
    """
    outs = list(sublayers(task.model))
    equal = {one.block.main.name: torch.zeros(one.block.main.num_units) for one in outs}
    counts = num_units(task.keep_equal_shares(equal))
    scores: dict[str, torch.Tensor] = {}
    total = task.num_layers * task.text.train.numel()
    with restored(outs), task.bar("wanda_sp", total=total, unit="tok") as bar:
        for step in walk(task.model, task.text.train, propagate="pruned", progress=bar.update):
            for one in (one for one in outs if one.layer == step.index):
                columns = channel_scores(one.out.weight, out_statistics(step, one).norms)
                scores[one.block.main.name] = by_unit(columns, one).sum(1)
                zero_columns_(one.out, removed_columns(task.keep(scores, counts=counts), one))
    return Pruned(plan=task.keep(scores, counts=counts))

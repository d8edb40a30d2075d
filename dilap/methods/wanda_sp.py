"""Structured Wanda (Wanda-sp, as FLAP's authors define it): score units by weights times norms of activations."""

from contextlib import ExitStack

import torch

from dilap.methods.units import num_units, out_statistics, removed_columns, restored, unit_scores, zero_columns_
from dilap.models.anatomy import sublayers
from dilap.models.statistics import layer_statistics
from dilap.search.method import Pruned, PruneTask


def channel_scores(weight: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
    """Return for every input j the mean over outputs o of |W_oj| times its norm (inputs).

    W is `weight` (outputs x inputs); `norms` are those of the activations (inputs).
    """
    return weight.detach().float().abs().mean(0) * norms


def prune(task: PruneTask) -> Pruned:
    """Remove the same share of every layer's heads and channels, scored on the output of the pruned layers before.

    How many units stay does not depend on the scores, so the share is found first, and the model is walked only once.
    No more than one layer is pruned at a time.
    """
    outs = list(sublayers(task.model))
    equal = {group.name: torch.zeros(group.num_units) for one in outs for group in one.block.groups}
    counts = num_units(task.keep_equal_shares(equal))
    scores: dict[str, torch.Tensor] = {}
    total = task.num_layers * task.text.train.numel()
    with ExitStack() as pruned, task.bar("wanda_sp", total=total, unit="tok") as bar:
        for step in layer_statistics(task.model, task.text.train, propagate="pruned", progress=bar.update):
            pruned.close()  # the layer before has run
            own = [one for one in outs if one.layer == step.index]
            pruned.enter_context(restored(own))
            for one in own:
                columns = channel_scores(one.out.weight, out_statistics(step, one).norms)
                scores |= unit_scores(columns, one)
                zero_columns_(one.out, removed_columns(task.keep(scores, counts=counts), one))
    return Pruned(plan=task.keep(scores, counts=counts))

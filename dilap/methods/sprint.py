"""SPRINT: remove the sublayer that costs least quality per second saved, and tune the next feed-forward network.

Written from the published description alone.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn

from dilap.core.errors import Unsupported
from dilap.methods.sprint_settings import SprintSettings
from dilap.methods.sublayer_removal import Removal
from dilap.methods.units import restored
from dilap.models.anatomy import decoder_layers, sublayers
from dilap.models.compute_device import compute_device
from dilap.search.method import Pruned, PruneTask
from dilap.search.refit import refit_refusal


@dataclass(frozen=True, kw_only=True)
class Sprint(SprintSettings):
    """SPRINT with its published settings; see `SprintSettings`."""

    def __call__(self, task: PruneTask) -> Pruned:
        if not (task.rules.attention_removal and task.rules.ffn_removal):
            raise Unsupported("SPRINT removes single sublayers, which this runtime or layout does not load")
        if self.tunes and (reason := refit_refusal(task.model)):
            raise Unsupported(f"SPRINT tunes projections that are only added, and {reason}; use --set tune=false")
        outs = list(sublayers(task.model))
        with restored(outs), _placed(decoder_layers(task.model), self):
            run = Removal(self, task, outs)
            plan = run.after(self.num_remove) if self.num_remove else task.cost_limit.first(run.plans())
        removed, weights = next((gone, weights) for found, gone, weights in run.made if found == plan)
        parameters = {f"{outs[sublayer].path}.weight": weight for sublayer, weight in weights.items()}
        names = [outs[one].name for one in removed]
        facts = {"removed_sublayers": names, **({"perplexities": run.perplexities} if run.perplexities else {})}
        return Pruned(plan=plan, parameters=parameters, facts=facts)


@contextmanager
def _placed(layers: nn.ModuleList, sprint: SprintSettings) -> Iterator[None]:
    """Put the layers that are not kept in host memory on the device where they compute, and back at the end."""
    moved = list(layers)[: max(0, len(layers) - sprint.host_layers)] if sprint.compute_on else []
    homes = [next(layer.parameters()).device for layer in moved]
    try:
        for layer in moved:
            layer.to(compute_device(sprint.compute_on))
        yield
    finally:
        for layer, home in zip(moved, homes, strict=True):
            layer.to(home)

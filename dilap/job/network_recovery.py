"""Recovery of a pruned network: it is trained, and left as it was where that did not help."""

import math
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from torch import nn

from dilap.core.codec import remove
from dilap.core.graph import Network
from dilap.core.plan import Plan
from dilap.job.network_exam import NetworkExam
from dilap.job.network_stages import NetworkStages
from dilap.job.recovery import UNDONE
from dilap.models.convolutional.cut import tensors_of
from dilap.models.distil_network import distil_network
from dilap.models.inner_states import states_of
from dilap.models.tensor_file import load_tensors, save_tensors


@dataclass(frozen=True, kw_only=True)
class Recovered:
    """The distance from the dense model in every step, as long as it was a number, and whether recovery was undone."""

    distances: tuple[float, ...] = ()
    is_undone: bool = False

    @property
    def notes(self) -> tuple[str, ...]:
        return (UNDONE,) if self.is_undone else ()


def recover_network_(
    stages: NetworkStages, exam: NetworkExam[Any], dense: nn.Module, plan: Plan[Network], *, before: float
) -> Recovered:
    """Distil the dense network into the one that was cut by `plan`, in place, and undo it where that does not help.

    It helps where the distance from the dense network on the validation split falls below `before`.
    """
    options, model, workspace = stages.options.recovery, stages.source.model, stages.workspace
    measure, kept = exam.dense.DISTANCE, workspace.cache / "before-recovery.safetensors"
    save_tensors(kept, {name: tensor.detach() for name, tensor in tensors_of(model).items()})
    with workspace.stage("recover"), workspace.log.bar("recover", total=options.steps, unit="step") as bar:

        def show(distance: float) -> None:
            bar.set_postfix_str(f"{measure} {distance:.3f}")
            bar.update(1)

        losses = distil_network(model, dense, stages.shown.trained, options, states=states_of(plan), progress=show)
        after = exam.validation_distance(model)
    workspace.log.say(
        f"recovery ({options.mode}): {measure} on its own examples {losses[0]:.3f} -> {losses[-1]:.3f}, on the "
        f"validation split {before:.3f} -> {after:.3f}"
    )
    is_undone = not after < before  # also where it is no number
    if is_undone:
        workspace.log.say(UNDONE)
        earlier = load_tensors(kept)
        for name, tensor in tensors_of(model).items():
            tensor.data.copy_(earlier[name])
    remove(kept)
    return Recovered(distances=tuple(takewhile(math.isfinite, losses)), is_undone=is_undone)

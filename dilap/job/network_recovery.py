"""Recovery of a pruned network: it is trained, and its best state kept; where nothing helped, it is as it was."""

import math
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
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

_JUDGED = 6  # times in a recovery: the distance on the validation split is computed, and the best state kept


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
    """Distil the dense network into the one that was cut by `plan`, in place, and keep its best state.

    That is the one nearest to the dense network on the validation split. Where none is nearer than `before`, the state
    before, recovery is undone.
    """
    options, model, workspace = stages.options.recovery, stages.source.model, stages.workspace
    measure = exam.dense.DISTANCE
    best = _Best(model=model, path=workspace.cache / "best-of-recovery.safetensors", distance=before)
    every = max(1, options.steps // _JUDGED)
    with workspace.stage("recover"), workspace.log.bar("recover", total=options.steps, unit="step") as bar:

        def show(distance: float) -> None:
            bar.set_postfix_str(f"{measure} {distance:.3f}")
            bar.update(1)
            best.num_steps += 1
            if best.num_steps % every == 0 or best.num_steps == options.steps:
                best.judge(exam.validation_distance(model))

        losses = distil_network(model, dense, stages.shown.trained, options, states=states_of(plan), progress=show)
    best.restore_()
    workspace.log.say(
        f"recovery ({options.mode}): {measure} on its own examples {losses[0]:.3f} -> {losses[-1]:.3f}, on the "
        f"validation split {before:.3f} -> {best.distance:.3f} after step {best.step} of {options.steps}"
    )
    if best.step == 0:
        workspace.log.say(UNDONE)
    return Recovered(distances=tuple(takewhile(math.isfinite, losses)), is_undone=best.step == 0)


@dataclass(kw_only=True)
class _Best:
    """The state of a model in which its `distance` was least: that after `step`, kept in the file `path`.

    `num_steps` is how many there were so far.
    """

    model: nn.Module
    path: Path
    distance: float
    step: int = 0
    num_steps: int = 0

    def __post_init__(self) -> None:
        self._save()

    def judge(self, distance: float) -> None:
        """Keep the model's state if it is nearer than all before; a distance that is no number is not."""
        if distance < self.distance:
            self.distance, self.step = distance, self.num_steps
            self._save()

    def restore_(self) -> None:
        """Give the model its best state back, and remove the file."""
        kept = load_tensors(self.path)
        for name, tensor in tensors_of(self.model).items():
            tensor.data.copy_(kept[name])
        remove(self.path)

    def _save(self) -> None:
        save_tensors(self.path, {name: tensor.detach() for name, tensor in tensors_of(self.model).items()})

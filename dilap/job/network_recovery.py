"""Recovery of a pruned network: it is trained, and left as it was where that did not help."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import takewhile

import torch

from dilap.core.codec import remove
from dilap.job.recovery import UNDONE
from dilap.job.run_folder import Workspace
from dilap.models.tensor_file import load_tensors, save_tensors

Told = Callable[[float], None]


@dataclass(frozen=True, kw_only=True)
class Recovered:
    """The distance from the dense model in every step, as long as it was a number, and whether recovery was undone."""

    distances: tuple[float, ...] = ()
    is_undone: bool = False

    @property
    def notes(self) -> tuple[str, ...]:
        return (UNDONE,) if self.is_undone else ()


def recover_(
    workspace: Workspace,
    tensors: Callable[[], Iterable[tuple[str, torch.Tensor]]],
    train: Callable[[Told], list[float]],
    *,
    name: str,
    steps: int,
    measure: str,
    before: float,
    validation: Callable[[], float],
) -> Recovered:
    """Train a model, in place, and undo it where the distance on the validation split does not fall below `before`.

    The distance is that from the dense model, and `measure` its name. `tensors` gives the names and tensors of the
    model that training changes, `train` the distance in every step, each of which it also tells.
    """
    kept = workspace.cache / "before-recovery.safetensors"
    save_tensors(kept, {path: tensor.detach() for path, tensor in tensors()})
    with workspace.stage("recover"), workspace.log.bar("recover", total=steps, unit="step") as bar:

        def show(distance: float) -> None:
            bar.set_postfix_str(f"{measure} {distance:.3f}")
            bar.update(1)

        losses = train(show)
        after = validation()
    workspace.log.say(
        f"recovery ({name}): {measure} on its own examples {losses[0]:.3f} -> {losses[-1]:.3f}, on the validation "
        f"split {before:.3f} -> {after:.3f}"
    )
    is_undone = not after < before  # also where it is no number
    if is_undone:
        workspace.log.say(UNDONE)
        earlier = load_tensors(kept)
        for path, tensor in tensors():
            tensor.data.copy_(earlier[path])
    remove(kept)
    return Recovered(distances=tuple(takewhile(math.isfinite, losses)), is_undone=is_undone)

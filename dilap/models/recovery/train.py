"""The training loop of a recovery, on accelerate: the best state is kept, and a killed run goes on in its folder.

Where there are several processes, each takes its share of every batch and of the validation text.
"""

import math
import re
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from dilap.core.codec import checked, read_json, remove, write_json, written_aside
from dilap.core.errors import InvalidInput, Unavailable, reason_of
from dilap.models.anatomy import decoder_layers
from dilap.models.compute_device import HOST
from dilap.models.processes import ALONE, Processes
from dilap.models.recovery.lessons import Lessons, Rows
from dilap.models.recovery.optimizer import adamw, set_rate_, stepping
from dilap.models.recovery.options import RecoveryOptions
from dilap.models.recovery.trainable import Trainable
from dilap.models.reference import AtHead, Teacher, final_hidden, head_of
from dilap.models.tensor_file import load_tensors, opened_tensors, save_tensors

# Tokens in one forward and backward pass: those of all tokens of a step would hold gigabytes of a small machine.
_PIECE_TOKENS_OF_HOST, _PIECE_TOKENS = 512, 8192
_TRACKED = "dilap-recovery"


@dataclass(frozen=True, kw_only=True)
class Told:
    """What is said of a step: its number from 1 on, the KL of its batch in nats, and tokens a second so far."""

    step: int
    kl: float
    tokens_per_second: float


@dataclass(kw_only=True)
class Recovered:
    """How a recovery went.

    `kls` are those of every step's own batch, as long as they are numbers; `validation` has, by step, the KL on the
    validation split, with that before the first one as step 0. The model has the state of `best_step`: with 0 nothing
    helped, and it is as it was.
    """

    kls: list[float] = field(default_factory=list)
    validation: dict[int, float] = field(default_factory=dict)
    best_step: int = 0


class _Student(nn.Module):
    """The pruned model as what is trained: its final hidden states, of which the loss and its gradient are made."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return final_hidden(self.model, tokens)


def recover_(
    model: PreTrainedModel,
    lessons: Lessons,
    options: RecoveryOptions,
    *,
    validation: Teacher,
    folder: Path,
    processes: Processes = ALONE,
    progress: Callable[[Told], None] = lambda _: None,
) -> Recovered:
    """Train `model` in place to predict what the dense model does, and return how that went.

    It ends in the state that had the least KL on the text of `validation`. `folder` keeps that state and what a killed
    run needs: the same call goes on in it, and its loss is that of a run that was not killed. Several
    `processes` do this together, with the same arguments. Raises InvalidInput for a damaged folder, Unavailable for a
    tracker whose library is missing.
    """
    require_tracker(options.tracker)
    trainable = Trainable(model, options)
    run = _Run(trainable, lessons, options, validation=validation, folder=folder, processes=processes)
    with _activations_computed_again(model) if options.checkpoint_activations else nullcontext():
        for told in run.steps():
            progress(told)
    trainable.finish()
    return run.done


def require_tracker(name: str | None) -> None:
    """Raise Unavailable for a tracker that accelerate does not know, or whose library is not installed."""
    there = [one.value for one in get_available_trackers()]
    if name is not None and name not in there:
        found = f"installed are: {', '.join(there)}" if there else "none is installed: pip install tensorboard, for one"
        raise Unavailable(f"tracker {name!r:.40} is none of accelerate's, or its library is missing; {found}")


class _Run:
    """One recovery; `done` is how it went so far."""

    def __init__(
        self,
        trainable: Trainable,
        lessons: Lessons,
        options: RecoveryOptions,
        *,
        validation: Teacher,
        folder: Path,
        processes: Processes,
    ) -> None:
        self.trainable, self.lessons, self.options = trainable, lessons, options
        self.model, self.validation, self.folder = trainable.model, validation.share(processes), folder
        self.head, self.processes = head_of(self.model), processes
        # The model stays where it is: where that is, is decided in one place. Only of several processes has accelerate
        # to be told that they compute on the host.
        self.accelerator = Accelerator(
            device_placement=False,
            cpu=processes.count > 1 and self.model.device == HOST,
            log_with=options.tracker,
            project_dir=folder,
        )
        self.accelerator.register_save_state_pre_hook(self._only_trained)
        groups = trainable.groups()
        self.rates = [group["lr"] for group in groups]
        adam = adamw(groups, has_8bit_states=options.has_8bit_states)
        self.student, self.adam = self.accelerator.prepare(_Student(self.model), adam)
        self.done = Recovered()

    def steps(self) -> Iterator[Told]:
        """Run all steps that are left, and set the model to its best state."""
        if not self._go_on():
            self.done.validation[0] = self._validation_kl()
            self._keep_best()
        if self.options.tracker is not None:
            self.accelerator.init_trackers(_TRACKED)
        begun = kept = time.monotonic()
        first = len(self.done.kls)
        for step in range(first + 1, self.options.num_steps + 1):
            kl = self._step(step)
            if not math.isfinite(kl):
                break  # the weights are no numbers any more
            self.done.kls.append(kl)
            if step % self.options.steps_between_evaluations == 0 or step == self.options.num_steps:
                self._evaluate(step)
            now = time.monotonic()
            if self.processes.of_main(now - kept >= self.options.checkpoint_seconds):
                self._checkpoint(step)
                kept = now
            tokens = (step - first) * self.options.tokens_in_step
            told = Told(step=step, kl=kl, tokens_per_second=tokens / max(now - begun, 1e-9))
            self._track(told)
            yield told
        if self.options.tracker is not None:
            self.accelerator.end_training()
        self._take_best()

    def _step(self, step: int) -> float:
        """Run one batch forward and backward, in pieces, change the weights, and return the batch's KL a position."""
        rate = self.options.rate(step - 1)
        for group, own in zip(self.adam.param_groups, self.rates, strict=True):
            set_rate_(group, rate * own)
        self.adam.zero_grad()
        batch = self.lessons.batch()
        num_positions, count = len(batch) * self.lessons.length, self.processes.count
        share, weight = batch[self.processes.rank :: count], 1
        if len(share) == 0:  # it takes part in the exchange of gradients all the same
            share, weight = batch[:1], 0
        pieces = share.split(max(1, self._piece_tokens // self.lessons.length))
        total = torch.zeros((), dtype=torch.float64)
        for number, few in enumerate(pieces, start=1):
            # Gradients are exchanged once, with those of the last piece; their mean over processes is taken.
            with nullcontext() if number == len(pieces) else self.accelerator.no_sync(self.student):
                total += weight * self._learn(few, scale=weight * count / num_positions)
        self.processes.sum_(total)
        self.accelerator.clip_grad_norm_(self.trainable.parameters.values(), 1.0)
        with stepping(self.model.device, has_8bit_states=self.options.has_8bit_states):
            self.adam.step()
        return float(total) / num_positions

    def _learn(self, few: torch.Tensor, *, scale: float) -> float:
        """Add the gradients of a piece, and return the sum of its KLs."""
        teacher, rows = self.lessons.lesson(few)
        tokens = teacher.tokens[rows]
        hidden = self.student(tokens)
        with torch.no_grad():
            labels = tokens.roll(-1, 1).reshape(1, -1).to(hidden.device) if self.options.next_token else None
            at_head = teacher.at_head(hidden.detach(), self.head, rows=rows, labels=labels)
            slope = slope_of(at_head, teacher, hidden.detach(), tokens, rows, options=self.options)
        self.accelerator.backward(hidden, gradient=(scale * slope).to(hidden.dtype))
        return float(at_head.kls.sum())

    @property
    def _piece_tokens(self) -> int:
        suggested = _PIECE_TOKENS_OF_HOST if self.model.device == HOST else _PIECE_TOKENS
        return self.options.piece_tokens or suggested

    def _validation_kl(self) -> float:
        return float(self.processes.joined(self.validation.kls(self.model)).double().mean())

    def _evaluate(self, step: int) -> None:
        kl = self._validation_kl()
        if not math.isfinite(kl):
            return
        is_best = kl < self.done.validation[self.done.best_step]
        self.done.validation[step] = kl
        if is_best:
            self.done.best_step = step
            self._keep_best()

    def _keep_best(self) -> None:
        if self.processes.is_main:
            save_tensors(self._best, {name: one.detach() for name, one in self.trainable.parameters.items()})
        self.processes.wait()

    def _require_best(self) -> None:
        """Raise InvalidInput where the best state is not there, which is asked for only at the very end."""
        with opened_tensors(self._best, what="best state") as file:
            if missing := set(self.trainable.parameters) - set(file.keys()):
                raise ValueError(f"it has no {sorted(missing)[0]}")

    @torch.no_grad()
    def _take_best(self) -> None:
        best = load_tensors(self._best)
        for name, parameter in self.trainable.parameters.items():
            parameter.copy_(best[name])

    def _only_trained(self, _: object, weights: list[dict[str, torch.Tensor]], __: object) -> None:
        """Leave out of what is saved what is not trained."""
        trained = {f"model.{name}" for name in self.trainable.parameters}

        def is_trained(name: str) -> bool:
            return name.removeprefix("module.") in trained  # torch's data parallel puts that in front

        weights[:] = [{name: one for name, one in each.items() if is_trained(name)} for each in weights]

    def _checkpoint(self, step: int) -> None:
        """Keep everything that a killed run needs to go on behind this step."""
        earlier = self._checkpoints()
        with self._made_by_main(self.folder / f"step-{step}") as folder:
            self.accelerator.save_state(str(folder))
            if self.processes.is_main:
                write_json(folder / "position.json", {"lessons": self.lessons.state_dict(), "done": vars(self.done)})
            self.processes.wait()
        if self.processes.is_main:
            for one in earlier:
                remove(one)

    @contextmanager
    def _made_by_main(self, place: Path) -> Iterator[Path]:
        """Give all processes a new folder, which the main one moves to its place in the end."""
        if not self.processes.is_main:
            yield self.processes.of_main(place)
            return
        with written_aside(place) as folder:
            folder.mkdir(parents=True)
            yield self.processes.of_main(folder)

    def _checkpoints(self) -> list[Path]:
        found = {re.fullmatch(r"step-(\d+)", one.name): one for one in self.folder.glob("step-*")}
        numbered = {int(match[1]): one for match, one in found.items() if match is not None}
        return [one for _, one in sorted(numbered.items())]

    def _go_on(self) -> bool:
        """Go on where an earlier start of this run stopped, and return whether there was one."""
        if not (found := self.processes.of_main(self._checkpoints())):
            return False
        folder = found[-1]
        try:
            self.accelerator.load_state(str(folder), strict=False)
            position = read_json(folder / "position.json")
            self.lessons.load_state_dict(position["lessons"])
            self.done = _done(position["done"], source=str(folder))
            self._require_best()
        except Exception as error:  # torch, safetensors and accelerate raise many types for damaged files
            raise InvalidInput(
                f"{folder}: the recovery cannot go on from it ({reason_of(error)}); remove that folder, and run again"
            ) from error
        return True

    @property
    def _best(self) -> Path:
        return self.folder / "best.safetensors"

    def _track(self, told: Told) -> None:
        if self.options.tracker is not None:
            rate, kls = self.options.rate(told.step - 1), self.done.validation
            values = {"kl": told.kl, "rate": rate, "tokens_per_second": told.tokens_per_second}
            self.accelerator.log(values | ({"validation_kl": kls[told.step]} if told.step in kls else {}), told.step)


def _done(document: Any, *, source: str) -> Recovered:
    """Read how a recovery went from JSON, whose names are text. Raises InvalidInput for anything else."""
    validation = checked(dict[str, float], document["validation"], source=source)
    return Recovered(
        kls=list(checked(tuple[float, ...], document["kls"], source=source)),
        validation={int(step): kl for step, kl in validation.items()},
        best_step=checked(int, document["best_step"], source=source),
    )


def slope_of(
    at_head: AtHead,
    teacher: Teacher,
    hidden: torch.Tensor,
    tokens: torch.Tensor,
    rows: Rows,
    *,
    options: RecoveryOptions,
) -> torch.Tensor:
    """Return the gradient of the loss with respect to the final hidden states (positions x hidden), a position each."""
    slope = (1 - options.next_token) * at_head.slope
    if options.next_token:
        label = -at_head.scores[0].reshape(*tokens.shape, -1)
        label[:, -1] = 0  # what follows a sequence is not known
        slope += options.next_token * label.reshape(slope.shape)
    if options.hidden:
        assert teacher.states is not None
        wanted = teacher.states[rows].to(hidden.device).reshape(hidden.shape).float()
        slope += options.hidden * 2 * (hidden.float() - wanted) / wanted.square().sum(-1).mean()
    return slope


@contextmanager
def _activations_computed_again(model: PreTrainedModel) -> Iterator[None]:
    """Let every decoder layer keep its input alone, and compute the rest again in the backward pass.

    The model stays one that evaluates: in transformers' own way it would train, with dropout.
    """
    with ExitStack() as stack:
        for layer in decoder_layers(model):
            own: Any = layer.forward
            layer.forward = partial(checkpoint, own, use_reentrant=False, preserve_rng_state=False)
            stack.callback(delattr, layer, "forward")
        yield

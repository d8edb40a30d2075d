"""LLM-Streamline: replace a window of layers that hardly turns the residual stream by one trained layer."""

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from dilap.core.plan import Plan
from dilap.methods.shortgpt import mean_cosine
from dilap.models.anatomy import decoder_layers
from dilap.models.compute import batches, compute_precision
from dilap.models.families import family_of
from dilap.models.reference import next_token_loss
from dilap.models.skipping import layers_replaced
from dilap.models.statistics import State, first_of, layer_calls, layer_statistics
from dilap.models.tensor_file import Tensors
from dilap.search.method import Pruned, PruneTask

_BATCH_TOKENS = 2048


@dataclass(frozen=True, kw_only=True)
class Streamline:
    """LLM-Streamline with its published settings, trained on `steps` batches of 2,048 tokens.

    Windows are chosen by cosines over 50 sequences. A copy of the window's first layer is trained by AdamW on the mean
    squared error of its output (objective `mse`), or in its place in the model on the language-modelling loss (`llm`).
    The learning rate goes from 2e-4 to 5e-5 by half a cosine, the weight decay is 1e-3, gradients are clipped at 5, and
    the weights that are best on validation text are kept. The authors read 100,000 documents once.
    """

    objective: Literal["mse", "llm"] = "mse"
    num_scored_sequences: int = 50
    steps: int = 200
    learning_rate: float = 2e-4
    least_learning_rate: float = 5e-5
    weight_decay: float = 1e-3

    def __call__(self, task: PruneTask) -> Pruned:
        plan = task.cost_limit.first(self._plans(task))
        removed = [index for index, widths in enumerate(plan.all_widths()) if widths.is_empty]
        if not removed:
            return Pruned(plan=plan)
        first = removed[0] - 1
        trained = self._train(task, first=first, last=removed[-1])
        prefix = f"{family_of(task.model.config).layers}.{first}."
        parameters = {prefix + name: value.detach() for name, value in trained.named_parameters()}
        return Pruned(plan=plan, parameters=parameters, facts={"replaced_layers": [first, *removed]})

    def _plans(self, task: PruneTask) -> Iterator[Plan]:
        """Yield ever smaller plans; the first layer of a window of n + 1 stays to replace it, and n are removed."""
        yield task.without_layers([])
        starts = task.once("streamline-windows", lambda: best_windows(task, num_sequences=self.num_scored_sequences))
        for removed, start in enumerate(starts["starts"].tolist(), start=1):
            yield task.without_layers(range(start + 1, start + 1 + removed))

    def _train(self, task: PruneTask, *, first: int, last: int) -> nn.Module:
        """Return a trained layer that does the work of the layers from `first` to `last`."""
        kind = Regression if self.objective == "mse" else LanguageModelling
        lessons = kind.of(task, task.training_tokens, first=first, last=last)
        exam = kind.of(task, task.text.validation, first=first, last=last)
        layer = copy.deepcopy(decoder_layers(task.model)[first]).float().eval().requires_grad_(True)
        task.model.requires_grad_(False)
        adam = torch.optim.AdamW(layer.parameters(), lr=self.learning_rate, weight_decay=self.weight_decay)
        schedule = torch.optim.lr_scheduler.LambdaLR(adam, self._rate)
        start = least = _mean_loss(exam, layer)
        best = copy.deepcopy(layer.state_dict())
        generator = torch.Generator().manual_seed(task.seed)
        with task.bar("LLM-Streamline", total=self.steps, unit="step") as bar:
            for step in range(self.steps):
                index = int(torch.randint(lessons.num_batches, (1,), generator=generator))
                adam.zero_grad()
                lessons.loss(layer, index).backward()
                nn.utils.clip_grad_norm_(layer.parameters(), 5.0)
                adam.step()
                schedule.step()
                bar.update(1)
                if (step + 1) % max(1, self.steps // 10) == 0 and (loss := _mean_loss(exam, layer)) < least:
                    least, best = loss, copy.deepcopy(layer.state_dict())
        layer.load_state_dict(best)
        task.report(f"LLM-Streamline: loss ({self.objective}) on the validation split {start:.4g} -> {least:.4g}")
        return layer.to(task.model.dtype).requires_grad_(False)

    def _rate(self, step: int) -> float:
        """Return the learning rate at `step` relative to the first one: half a cosine between the two rates."""
        low = self.least_learning_rate / self.learning_rate
        return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / max(1, self.steps))))


def best_windows(task: PruneTask, *, num_sequences: int) -> Tensors:
    """Return the first layer of the best window of every length, as `starts` (lengths from two layers on)."""
    states: list[torch.Tensor] = []  # inputs of all layers, and the output of the last one (before the final norm)
    for step in layer_statistics(task.model, task.text.train[:num_sequences], roles=()):
        if not states:
            states.append(torch.cat(list(step.inputs)))
        states.append(torch.cat(list(step.outputs)))
    starts = [best_window(states, length=length) for length in range(2, task.num_layers + 1)]
    return {"starts": torch.tensor(starts)}


def best_window(states: Sequence[torch.Tensor], *, length: int) -> int:
    """Return the first layer of the window of `length` layers whose input and output are most alike."""
    starts = range(len(states) - length)
    return max(starts, key=lambda first: (mean_cosine(states[first], states[first + length]), -first))


class Objective(Protocol):
    """What the replacement of a window is trained on, in batches."""

    @property
    def num_batches(self) -> int:
        """Number of batches."""

    def loss(self, layer: nn.Module, index: int) -> torch.Tensor:
        """Return the loss of one batch with `layer` as the replacement."""


@dataclass(frozen=True)
class Regression:
    """The mean squared error of the window's output; holds its inputs, its first layer's arguments and its outputs."""

    arguments: list[dict[str, Any]]
    inputs: list[State]
    outputs: list[State]

    @classmethod
    def of(cls, task: PruneTask, tokens: torch.Tensor, *, first: int, last: int) -> "Regression":
        calls = layer_calls(task.model, tokens, batch_tokens=_BATCH_TOKENS)
        inputs: list[State] = []
        for step in layer_statistics(task.model, tokens, roles=(), batch_tokens=_BATCH_TOKENS):
            if step.index == first:
                inputs = list(step.inputs)
            if step.index == last:
                return cls([call.arguments[first] for call in calls], inputs, list(step.outputs))
        raise AssertionError("the window ends behind the last layer")

    @property
    def num_batches(self) -> int:
        return len(self.inputs)

    def loss(self, layer: nn.Module, index: int) -> torch.Tensor:
        """Return the mean squared error of one batch, a mean over positions and channels."""
        with compute_precision(self.inputs[index].device):
            found = first_of(layer(self.inputs[index].float(), **self.arguments[index]))
        return functional.mse_loss(found.float(), self.outputs[index].float())


@dataclass(frozen=True)
class LanguageModelling:
    """The cross entropy of the next token in the model that has the replacement in place of the window."""

    model: PreTrainedModel
    tokens: list[torch.Tensor]
    first: int
    others: dict[int, nn.Module]

    @classmethod
    def of(cls, task: PruneTask, tokens: torch.Tensor, *, first: int, last: int) -> "LanguageModelling":
        layers = enumerate(decoder_layers(task.model))
        few = list(batches(tokens, batch_tokens=_BATCH_TOKENS // 2, device=task.model.device))
        return cls(task.model, few, first, {index: one for index, one in layers if not first <= index <= last})

    @property
    def num_batches(self) -> int:
        return len(self.tokens)

    def loss(self, layer: nn.Module, index: int) -> torch.Tensor:
        with layers_replaced(self.model, {**self.others, self.first: layer}):
            return next_token_loss(self.model, self.tokens[index])


@torch.no_grad()
def _mean_loss(objective: Objective, layer: nn.Module) -> float:
    return sum(float(objective.loss(layer, index)) for index in range(objective.num_batches)) / objective.num_batches

"""Run a model without some of its layers or sublayers, from any layer on, without changing its weights."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel

from dilap.models.anatomy import decoder_layers
from dilap.models.families import family_of
from dilap.models.reference import negative_log_likelihood
from dilap.models.statistics import LayerCall, State, layer_calls, run_layer

_BATCH_TOKENS = 2048


class Known(nn.Module):
    """Stands for the first layers, whose output for every batch is known."""

    def __init__(self, states: Sequence[State]) -> None:
        super().__init__()
        self.states = iter(states)

    def forward(self, hidden_states: torch.Tensor, **_: object) -> torch.Tensor:  # noqa: ARG002
        return next(self.states)


class Stack:
    """A model's layers with some of them skipped, on fixed `tokens` (sequences x length).

    What enters every layer that is left is kept, so that trying to skip a late layer costs only the layers after it.
    """

    def __init__(self, model: PreTrainedModel, tokens: torch.Tensor) -> None:
        self.model, self.tokens = model, tokens
        self.layers = list(decoder_layers(model))
        self.alive = list(range(len(self.layers)))
        self.calls: list[LayerCall] = layer_calls(model, tokens, batch_tokens=_BATCH_TOKENS)
        self._states: dict[int, list[State]] = {0: [call.hidden for call in self.calls]}
        self._fill(0)

    def remove(self, layer: int) -> None:
        """Skip `layer` from now on."""
        position = self.alive.index(layer)
        entering = self._states[layer]
        self.alive.remove(layer)
        if position < len(self.alive):
            self._states[self.alive[position]] = entering
            self._fill(position)

    @torch.no_grad()
    def _fill(self, position: int) -> None:
        """What enters the layers after `alive[position]`, whose own input is known."""
        for before, after in zip(self.alive[position:], self.alive[position + 1 :], strict=False):
            pairs = zip(self.calls, self._states[before], strict=True)
            self._states[after] = [run_layer(self.layers[before], call, state) for call, state in pairs]

    @contextmanager
    def resumed(self, layer: int, *, skipping: bool = False) -> Iterator[None]:
        """The model from `layer` on, for one pass over the tokens in batches of 2,048; `skipping` leaves it out."""
        rest = self.alive[self.alive.index(layer) + skipping :]
        known = Known(self._states[layer])
        with layers_replaced(self.model, [known, *(self.layers[index] for index in rest)]):
            yield

    def loss_without(self, layer: int) -> float:
        """Mean negative log-likelihood of the tokens, with `layer` skipped too."""
        with self.resumed(layer, skipping=True):
            return negative_log_likelihood(self.model, self.tokens)


@contextmanager
def layers_replaced(model: PreTrainedModel, layers: Sequence[nn.Module]) -> Iterator[None]:
    """The model with these decoder layers in place of its own."""
    path, own = family_of(model.config).layers, decoder_layers(model)
    model.set_submodule(path, nn.ModuleList(layers))
    try:
        yield
    finally:
        model.set_submodule(path, own)


@contextmanager
def sublayer_skipped(layer: nn.Module, model: PreTrainedModel, kind: str) -> Iterator[None]:
    """A layer whose attention or feed-forward network adds nothing to the stream."""
    replacements = family_of(model.config).absent(kind)
    own = {path: layer.get_submodule(path) for path in replacements}
    try:
        for path, module in replacements.items():
            layer.set_submodule(path, module)
        yield
    finally:
        for path, module in own.items():
            layer.set_submodule(path, module)

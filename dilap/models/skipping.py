"""Run a model without some of its layers or sublayers, starting at any layer, without changing its weights."""

from collections.abc import Iterator, Mapping, Sequence
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
    """Takes the place of the first layers of a model, and returns their known output for one batch after another."""

    def __init__(self, states: Sequence[State]) -> None:
        super().__init__()
        self.states = iter(states)

    def forward(self, hidden_states: torch.Tensor, **_: object) -> torch.Tensor:  # noqa: ARG002
        return next(self.states)


class Skipped(nn.Module):
    """Takes the place of a removed layer and changes nothing."""

    def forward(self, hidden_states: torch.Tensor, **_: object) -> torch.Tensor:
        return hidden_states


class Stack:
    """A model's layers with some of them skipped, on fixed `tokens` (sequences x length).

    The input of every layer that is left is kept, so that only the later layers have to be run when a layer is skipped.
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
        """Compute the inputs of the layers after `alive[position]`, whose own input is known."""
        for before, after in zip(self.alive[position:], self.alive[position + 1 :], strict=False):
            pairs = zip(self.calls, self._states[before], strict=True)
            self._states[after] = [
                run_layer(self.layers[before], call.arguments[before], state) for call, state in pairs
            ]

    @contextmanager
    def resumed(self, layer: int, *, skipping: bool = False) -> Iterator[None]:
        """Make the model start at `layer`, or behind it if `skipping`, for one pass over the tokens.

        The pass has to be made in batches of 2,048 tokens.
        """
        rest = self.alive[self.alive.index(layer) + skipping :]
        first = rest[0] if rest else len(self.layers)
        known = {first - 1: Known(self._states[layer])} if first else {}  # nothing comes before layer 0 but the text
        with layers_replaced(self.model, {**known, **{index: self.layers[index] for index in rest}}):
            yield

    def loss_without(self, layer: int) -> float:
        """Return the mean negative log-likelihood of the tokens when `layer` is skipped too."""
        with self.resumed(layer, skipping=True):
            return negative_log_likelihood(self.model, self.tokens)


@contextmanager
def layers_replaced(model: PreTrainedModel, layers: Mapping[int, nn.Module]) -> Iterator[None]:
    """Give the model these decoder layers, by index, in place of all its own while the context is entered.

    Without one for its index, a layer is skipped. Layers stay at their places, because a model of several kinds of
    layers calls each of them as the kind that is due there.
    """
    path, own = family_of(model.config).layers, decoder_layers(model)
    model.set_submodule(path, nn.ModuleList(layers.get(index, Skipped()) for index in range(len(own))))
    try:
        yield
    finally:
        model.set_submodule(path, own)


@contextmanager
def sublayer_skipped(layer: nn.Module, model: PreTrainedModel, kind: str) -> Iterator[None]:
    """Make the attention or feed-forward network of a layer add nothing while the context is entered."""
    replacements = family_of(model.config).absent(kind)
    own = {path: layer.get_submodule(path) for path in replacements}
    try:
        for path, module in replacements.items():
            layer.set_submodule(path, module)
        yield
    finally:
        for path, module in own.items():
            layer.set_submodule(path, module)

"""Run one config after another on the same text fast: layers are cut instead of masked, and shared layers run once.

A masked model takes as long as the dense one. Here the layers of a config are really narrower. The inputs of all layers
are kept for the last few configs, so that a config starts at the first layer in which it differs from one of them.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from dilap.core.groups import indices_kept
from dilap.models.anatomy import ExpertSublayer, Sublayer, decoder_layers
from dilap.models.cut import Parameters, cut_
from dilap.models.families import family_of
from dilap.models.routing import Routing
from dilap.models.skipping import Known, layers_replaced
from dilap.models.statistics import State
from dilap.search.library import LevelFit

# The cut layers of a model with more bytes than this in its layers are made when they run, again for every batch, and
# not kept: a second model has no room beside a large one. Cutting a layer takes far less time than running a batch.
_MOST_CUT_BYTES = 2 << 30
_PATHS = 3  # configs whose layers' inputs are kept: the one with which others share most, and the latest ones
Level = tuple[int, ...]  # one level index for every sublayer of a layer, and for what else it depends on
# A sublayer, its level, and the values of those of its matrices that are not the dense model's, by name.
Cut = tuple[Sublayer | ExpertSublayer, LevelFit, Parameters]


@dataclass(frozen=True, eq=False)
class _Path:
    """The inputs of every layer at a config, by batch; none are kept for the first layer, whose input is the text."""

    levels: tuple[Level, ...]
    entering: list[list[State]]

    def num_shared(self, levels: Sequence[Level]) -> int:
        """Return how many layers from the first on have the same levels."""
        pairs = enumerate(zip(self.levels, levels, strict=True))
        return next((number for number, (a, b) in pairs if a != b), len(levels))


class Stitcher:
    """Runs a model with its layers at any levels.

    `build` makes the layer of an index at its level; it must not change the model.
    """

    def __init__(self, model: PreTrainedModel, build: Callable[[int, Level], nn.Module]) -> None:
        self.model, self.build = model, build
        self._paths: list[_Path] = []
        self._text: object = None
        self._keeps_layers = sum(one.nbytes for one in decoder_layers(model).parameters()) <= _MOST_CUT_BYTES

    @contextmanager
    def stitched(self, levels: Sequence[Level], *, text: object) -> Iterator[None]:
        """Set the model to `levels` for one pass over `text`, from start to end, which always has the same batches.

        `text` is any object that stands for the text: where it is another one than before, nothing known is used.
        """
        if text is not self._text:
            self.forget()
            self._text = text
        path, first = self._known(levels)
        makers = [partial(self.build, index, levels[index]) for index in range(first, len(levels))]
        layers = [make() if self._keeps_layers else _MadeWhenRun(make) for make in makers]
        with ExitStack() as stack:
            for layer, states in zip(layers[1:], path.entering[first + 1 :], strict=True):
                stack.callback(layer.register_forward_pre_hook(_keeping(states), with_kwargs=True).remove)
            known = {first - 1: Known(path.entering[first])} if first else {}
            stack.enter_context(layers_replaced(self.model, {**known, **dict(enumerate(layers, start=first))}))
            yield
        self._paths = [*self._paths[:1], path, *self._paths[1 : _PATHS - 1]]

    def _known(self, levels: Sequence[Level]) -> tuple[_Path, int]:
        """Return a path for `levels` with the inputs that are known, and the first layer to run.

        The inputs are taken from the kept path that shares most layers. That path moves to the front, where it is kept
        longest, because the neighbours of a config all share layers with it.
        """
        first = 0
        shared: list[list[State]] = [[]]
        if self._paths:
            best = max(self._paths, key=lambda path: path.num_shared(levels))  # of equal ones, that kept longest
            self._paths.sort(key=lambda path: path is not best)
            first = min(best.num_shared(levels), len(levels) - 1)
            shared = best.entering[: first + 1]
        rest: list[list[State]] = [[] for _ in range(len(levels) - len(shared))]
        return _Path(tuple(levels), [*shared, *rest]), first

    def forget(self) -> None:
        """Drop all kept inputs, because the weights have changed or memory is needed."""
        self._paths, self._text = [], None


class _MadeWhenRun(nn.Module):
    """A layer of which nothing is kept between its runs."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.make = make

    def forward(self, hidden_states: State, **arguments: Any) -> torch.Tensor:
        found: torch.Tensor = self.make()(hidden_states, **arguments)
        return found


def _keeping(states: list[State]) -> Callable[[nn.Module, tuple[State, ...], dict[str, Any]], None]:
    def hook(_: nn.Module, arguments: tuple[State, ...], named: dict[str, Any]) -> None:
        states.append(arguments[0] if arguments else named["hidden_states"])

    return hook


def cut_layer(model: PreTrainedModel, index: int, own: nn.Module, cuts: Sequence[Cut]) -> nn.Module:
    """Return a dense model's layer `own`, of an index, with some of its sublayers cut to levels; it stays as it is.

    Experts are only left out by the router, which computes the same, and as fast.
    """
    family = family_of(model.config)
    if not cuts:
        return own
    same = {id(one): one for one in (*own.parameters(), *own.buffers(), model.config)}
    layer: nn.Module = copy.deepcopy(own, same)  # new modules around the same tensors
    prefix = f"{family.layers}.{index}."
    for sublayer, fit, matrices in cuts:
        if len(fit.columns) == 0:
            for path, module in family.absent(sublayer.kind).items():
                layer.set_submodule(path, module)
            continue
        values = {name.removeprefix(prefix): value for name, value in matrices.items()}
        if isinstance(sublayer, ExpertSublayer):
            network, router = (layer.get_submodule(path or "") for path in (family.ffn, family.router))
            Routing(network, router).choose_among(fit.columns, fit.weight)
            cut_(layer, {}, values=values, requires_grad=False)
            continue
        cut_(layer, indices_kept(sublayer.block.groups, fit.units), prefix=prefix, values=values, requires_grad=False)
        family.tell_widths_(layer, sublayer.block, fit.units)
    return layer

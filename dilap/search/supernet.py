"""A dense model whose sublayers can be set to any level: to a width with a refitted projection, and to a precision."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from dilap.models.anatomy import ExpertSublayer, Sublayer, all_sublayers, decoder_layers, norm_behind
from dilap.models.compute import compute_precision, product_type
from dilap.models.cut import Parameters
from dilap.models.matrices import embedding_name, head_name, matrices_of, put_, replaced
from dilap.models.reference import Head, Teacher, head_of
from dilap.models.routing import Routing
from dilap.models.skipping import Skipped
from dilap.search.allocation import Config
from dilap.search.library import LevelFit
from dilap.search.rounded import RoundedMatrices
from dilap.search.stitcher import Cut, Level, Stitcher, cut_layer

_NONE: Mapping[str, torch.Tensor] = MappingProxyType({})
# Rounded matrices are kept in so many bytes beyond those of the model itself.
_ROUNDED_BYTES = 2 << 30


@dataclass(frozen=True, kw_only=True)
class HeadLevel:
    """A level of the head: its precision, and that of the embedding; an empty one is the reference."""

    head: str = ""
    embedding: str = ""


class Supernet:
    """A model whose sublayers can be set to levels of a library; `config` holds the current level of every choice.

    A level is set by writing its projection into the dense matrix, with zeros at the removed inputs, or by letting the
    router choose among its experts; in another precision than the reference all matrices of the sublayer are rounded.
    The output is that of the cut model, and gradients reach all levels. The last entry of a config is the level of the
    head where it has `head_levels`. `close` restores the dense model. Scoring a config by `kl` writes nothing into the
    model: it runs layers that are cut, which is faster.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        library: Sequence[Sequence[LevelFit]],
        *,
        head_levels: Sequence[HeadLevel] = (),
    ) -> None:
        self.model, self.library, self.head_levels = model, library, tuple(head_levels)
        self.sublayers = list(all_sublayers(model))
        self.outs: list[Any] = [sublayer.out for sublayer in self.sublayers]  # matrices, or networks of experts
        assert len(self.outs) == len(library)
        for sublayer, levels in zip(self.sublayers, library, strict=True):
            own = sublayer.weight.float()
            assert torch.equal(own, levels[0].weight.to(own)), "another supernet was left open"
        self.config: Config = (0,) * len(self.sizes)
        self.biases = [_bias_of(sublayer) for sublayer in self.sublayers]
        self.routings = {
            index: Routing(one.out, one.router)
            for index, one in enumerate(self.sublayers)
            if isinstance(one, ExpertSublayer)
        }
        self.norms_behind = [norm_behind(model, sublayer) for sublayer in self.sublayers]
        self.matrices = [matrices_of(model, sublayer) for sublayer in self.sublayers]
        self.embedding_name, self.head_name = embedding_name(model), head_name(model)
        names = (name for own in self.matrices for name in own)
        self.dense = {name: model.get_parameter(name) for name in (*names, self.embedding_name, self.head_name)}
        self._embeddings = ["", *(one.embedding for one in self.head_levels)]
        self._rounded = RoundedMatrices(_ROUNDED_BYTES + sum(one.nbytes for one in model.parameters()))
        self._layers = list(decoder_layers(model))
        self._stitcher = Stitcher(model, self._layer)
        self._faced: tuple[Teacher | None, dict[str, Teacher]] = (None, {})  # a teacher, for heads in other precisions
        model.requires_grad_(False)

    @property
    def sizes(self) -> tuple[int, ...]:
        """The number of levels of every choice."""
        of_head = (len(self.head_levels),) if self.head_levels else ()
        return (*(len(levels) for levels in self.library), *of_head)

    def head_level(self, config: Sequence[int]) -> HeadLevel:
        return self.head_levels[config[-1]] if self.head_levels else HeadLevel()

    def fits(self, config: Sequence[int]) -> list[LevelFit]:
        """Return the levels of all sublayers at `config`."""
        return [levels[config[index]] for index, levels in enumerate(self.library)]

    def is_rounded(self, config: Sequence[int]) -> bool:
        """Return whether any part is in another precision than the reference."""
        return self.head_level(config) != HeadLevel() or any(fit.precision for fit in self.fits(config))

    def set(self, config: Sequence[int]) -> None:
        """Write the projections of `config` into the model, round it, and let its routers choose among its experts."""
        for index, (old, new) in enumerate(zip(self.config, config, strict=True)):
            if old != new and index < len(self.library):
                self._set(index, new)
        if self.head_level(self.config) != self.head_level(config):
            for name, value in self.whole(self.head_level(config)).items():
                put_(self.model, name, value)
        self.config = tuple(config)

    def _set(self, index: int, level: int) -> None:
        fit = self.library[index][level]
        self.write(index, fit.columns, self.projection(index, fit))
        for name in self.inputs(index):
            put_(self.model, name, self.matrix(name, fit.precision))

    @torch.no_grad()
    def write(self, index: int, columns: torch.Tensor, weight: torch.Tensor) -> None:
        """Give one sublayer the projection `weight` (hidden x columns) over `columns`, and zeros elsewhere.

        Where its units are experts, `columns` are those that stay, and `weight` has the router's rows for them.
        """
        if index in self.routings:
            self.routings[index].choose_among(columns, weight)
            return
        out = self.outs[index]
        out.weight.zero_()
        out.weight[:, columns] = weight.to(out.weight)
        bias = self.biases[index]
        if bias is not None:
            out.bias.copy_(bias if len(columns) else torch.zeros_like(bias))

    def restore(self, index: int) -> None:
        """Make one sublayer dense again."""
        self._set(index, 0)

    def inputs(self, index: int) -> tuple[str, ...]:
        """Return the names of a sublayer's matrices but its output projection; those of experts are all among them."""
        return self.matrices[index] if index in self.routings else self.matrices[index][:-1]

    def matrix(self, name: str, precision: str) -> torch.Tensor:
        """Return a matrix of the dense model in a precision."""
        return self._rounded.of(id(self.dense[name]), self.dense[name], precision)

    def projection(self, index: int, fit: LevelFit, precision: str | None = None) -> torch.Tensor:
        """Return the projection of a level in its own precision or another one; a router's rows are not rounded."""
        if index in self.routings:
            return fit.weight
        precision = fit.precision if precision is None else precision
        weight = fit.weight.to(self.outs[index].weight.device) if precision else fit.weight
        return self._rounded.of((index, fit.counts), weight, precision)

    def masked(self, index: int, fit: LevelFit, precision: str) -> dict[str, torch.Tensor]:
        """Return a sublayer's matrices at the width of a level and in a precision, in their dense shapes, by name."""
        values = {name: self.matrix(name, precision) for name in self.inputs(index)}
        if index not in self.routings:
            values[self.matrices[index][-1]] = self.masked_projection(index, fit, precision)
        return values

    def masked_projection(self, index: int, fit: LevelFit, precision: str = "") -> torch.Tensor:
        """Return the projection of a level in a precision over all inputs, with zeros at those that are removed."""
        weight = torch.zeros_like(self.outs[index].weight)
        weight[:, fit.columns] = self.projection(index, fit, precision).to(weight)
        return weight

    def parameters(self, config: Sequence[int]) -> Parameters:
        """Return the parameters that the levels of `config` change, by name, and all output projections that stay.

        Output projections have only the columns that stay, and routers the rows.
        """
        found: dict[str, torch.Tensor] = {}
        for index, (sublayer, fit) in enumerate(zip(self.sublayers, self.fits(config), strict=True)):
            if len(fit.columns):
                found |= self._values(index, fit)
                found[f"{sublayer.path}.weight"] = self.projection(index, fit)
        level = self.head_level(config)
        whole = self.whole(level)
        if self.is_tied(level):
            del whole[self.head_name]
        return found | {name: value for name, value in whole.items() if value is not self.dense[name]}

    def _values(self, index: int, fit: LevelFit, given: Parameters = _NONE) -> dict[str, torch.Tensor]:
        """Return the matrices that a level changes, by name, or those `given` in their places."""
        inputs = self.inputs(index)
        names = (name for name in self.matrices[index] if fit.precision or name not in inputs)
        values: dict[str, torch.Tensor] = {}
        for name in names:
            if name in given:
                values[name] = given[name]
            else:
                values[name] = self.matrix(name, fit.precision) if name in inputs else self.projection(index, fit)
        return values

    def whole(self, level: HeadLevel) -> dict[str, torch.Tensor]:
        """Return embedding and head at a level of the head, by name; they are the same tensor where they are tied."""
        names = {self.embedding_name: level.embedding, self.head_name: level.head}
        return {name: self.matrix(name, precision) for name, precision in names.items()}

    def is_tied(self, level: HeadLevel) -> bool:
        """Return whether one matrix serves as embedding and head at a level of the head."""
        return self.dense[self.embedding_name] is self.dense[self.head_name] and level.embedding == level.head

    def is_linear(self, index: int) -> bool:
        """Return whether the output of a sublayer, behind its norm if it has one there, is a matrix times its inputs.

        It is no such product behind a norm, nor where levels change the experts to which tokens are sent.
        """
        return self.norms_behind[index] is None and index not in self.routings

    def output_at(self, index: int, fit: LevelFit, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return the output at a level of a sublayer that is not linear, behind its norm, in f32.

        `x` are the inputs of its projection, which is not rounded, or of its experts, and `dtype` is the type of its
        outputs.
        """
        bias, norm, kind = self.biases[index], self.norms_behind[index], product_type(torch.float32, x.device)
        if index in self.routings:
            current = self.library[index][self.config[index]]
            self.write(index, fit.columns, fit.weight)
            with compute_precision(x.device):
                y: torch.Tensor = self.outs[index].forward(x)  # past the hooks on it
            self.write(index, current.columns, current.weight)
        else:
            y = functional.linear(x[..., fit.columns].to(kind), fit.weight.to(x.device, kind)).to(dtype)
            y = y if bias is None else y + bias
        found: torch.Tensor = y if norm is None else norm.forward(y)
        return found.float()

    def kl(self, teacher: Teacher, config: Sequence[int], *, parameters: Parameters = _NONE) -> float:
        """Return the mean KL(dense || config) per position, in nats, on the teacher's tokens.

        `parameters` replace those of the levels, by name. The model is dense again afterwards.
        """
        return float(self.kls(teacher, config, parameters=parameters).double().mean())

    def kls(self, teacher: Teacher, config: Sequence[int], *, parameters: Parameters = _NONE) -> torch.Tensor:
        """Return the mean KL(dense || config) per position of every sequence (sequences); see `kl`."""
        with self.cut(config, text=teacher, parameters=parameters):
            if self.head_name in parameters:
                return self._facing(teacher, parameters[self.head_name]).kls(self.model)
            return self.facing(teacher, config).kls(self.model)

    def facing(self, teacher: Teacher, config: Sequence[int]) -> Teacher:
        """Return the teacher for models with the head of `config`; those of one teacher are kept."""
        precision = self.head_level(config).head
        if self._faced[0] is not teacher:
            self._faced = (teacher, {"": teacher})
        known = self._faced[1]
        if precision not in known:
            known[precision] = self._facing(teacher, self.matrix(self.head_name, precision))
        return known[precision]

    def _facing(self, teacher: Teacher, weight: torch.Tensor) -> Teacher:
        return teacher.facing(self.head_of(weight), dense_head=self.head_of(self.dense[self.head_name]))

    def head_of(self, weight: torch.Tensor) -> Head:
        """Return the model's head with another matrix."""
        return head_of(self.model, weight=weight)

    @contextmanager
    def cut(self, config: Sequence[int], *, text: object, parameters: Parameters = _NONE) -> Iterator[None]:
        """Cut the model's layers to `config` for one pass over `text`, which always has the same batches.

        `parameters` replace those of the levels, by name.
        """
        self.close()
        levels: list[Level] = [() for _ in decoder_layers(self.model)]
        for index, sublayer in enumerate(self.sublayers):
            levels[sublayer.layer] += (config[index],)
        level = self.head_level(config)
        levels[0] += (self._embeddings.index(level.embedding),)  # what enters the first layer depends on it
        stitcher = Stitcher(self.model, partial(self._layer, parameters=parameters)) if parameters else self._stitcher
        whole = {name: parameters.get(name, value) for name, value in self.whole(level).items()}
        with replaced(self.model, whole), stitcher.stitched(levels, text=text):
            yield

    def _layer(self, index: int, level: Level, parameters: Parameters = _NONE) -> nn.Module:
        """Return a layer with its sublayers cut to their levels, with other matrices where `parameters` has them."""
        cuts: list[Cut] = []
        own = [i for i, sublayer in enumerate(self.sublayers) if sublayer.layer == index]
        for i, chosen in zip(own, level, strict=False):  # the first layer's level ends with that of the embedding
            fit = self.library[i][chosen]
            if chosen or any(name in parameters for name in self.matrices[i]):
                cuts.append((self.sublayers[i], fit, self._values(i, fit, parameters)))
        is_gone = len(cuts) == len(own) and not any(len(fit.columns) for _, fit, _ in cuts)
        return Skipped() if is_gone else cut_layer(self.model, index, self._layers[index], cuts)

    def forget(self) -> None:
        """Free the inputs of layers that scoring keeps for the last few configs."""
        self._stitcher.forget()

    def close(self) -> None:
        """Restore the dense model."""
        self.set((0,) * len(self.sizes))


def _bias_of(sublayer: Sublayer | ExpertSublayer) -> torch.Tensor | None:
    bias = sublayer.out.bias if isinstance(sublayer, Sublayer) else None
    return None if bias is None else bias.detach().clone()

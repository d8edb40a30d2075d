"""A dense model whose sublayers can be set to any level, and a quadratic model of its loss over all levels at once."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from dilap.models.anatomy import ExpertSublayer, Sublayer, all_sublayers, decoder_layers, norm_behind
from dilap.models.compute import batches, compute_precision, product_type
from dilap.models.reference import Teacher, before_head, head_of
from dilap.models.routing import Routing
from dilap.models.skipping import Skipped
from dilap.search.allocation import Config
from dilap.search.library import LevelFit
from dilap.search.stitcher import Level, Stitcher, cut_layer

_NONE: Mapping[str, torch.Tensor] = MappingProxyType({})
# What the levels change in the projections is kept for a whole pass for as many sublayers as this holds, which is all
# of them for a model of 135M parameters; for the others it is made again for every batch.
_CHANGES_BYTES = 2 << 30


class Supernet:
    """A model whose sublayers can be set to levels of a library; `config` holds the current level of every choice.

    A level is set by writing its projection into the dense matrix, with zeros at the removed inputs, or by letting the
    router choose among its experts. The output is that of the cut model, and gradients reach all levels. `close`
    restores the dense model. Scoring a config by `kl` writes nothing into the model: it runs layers that are cut, which
    is faster.
    """

    def __init__(self, model: PreTrainedModel, library: Sequence[Sequence[LevelFit]]) -> None:
        self.model, self.library = model, library
        self.sublayers = list(all_sublayers(model))
        self.outs: list[Any] = [sublayer.out for sublayer in self.sublayers]  # matrices, or networks of experts
        assert len(self.outs) == len(library)
        for sublayer, levels in zip(self.sublayers, library, strict=True):
            assert torch.equal(sublayer.weight.float(), levels[0].weight.float()), "another supernet was left open"
        self.config: Config = (0,) * len(library)
        self.biases = [_bias_of(sublayer) for sublayer in self.sublayers]
        self.routings = {
            index: Routing(one.out, one.router)
            for index, one in enumerate(self.sublayers)
            if isinstance(one, ExpertSublayer)
        }
        self.norms_behind = [norm_behind(model, sublayer) for sublayer in self.sublayers]
        self._stitcher = Stitcher(model, self._layer)
        model.requires_grad_(False)

    def set(self, config: Sequence[int]) -> None:
        """Write the projections of `config` into the model, and let its routers choose among its experts."""
        for index, (old, new) in enumerate(zip(self.config, config, strict=True)):
            if old != new:
                fit = self.library[index][new]
                self.write(index, fit.columns, fit.weight)
        self.config = tuple(config)

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
        out.weight[:, columns] = weight.to(out.weight.dtype)
        bias = self.biases[index]
        if bias is not None:
            out.bias.copy_(bias if len(columns) else torch.zeros_like(bias))

    def is_linear(self, index: int) -> bool:
        """Return whether the output of a sublayer, behind its norm if it has one there, is a matrix times its inputs.

        It is no such product behind a norm, nor where levels change the experts to which tokens are sent.
        """
        return self.norms_behind[index] is None and index not in self.routings

    def output_at(self, index: int, fit: LevelFit, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return the output at a level of a sublayer that is not linear, behind its norm, in f32.

        `x` are the inputs of its projection or of its experts, and `dtype` is the type of its outputs.
        """
        bias, norm, kind = self.biases[index], self.norms_behind[index], product_type(torch.float32)
        if index in self.routings:
            current = self.library[index][self.config[index]]
            self.write(index, fit.columns, fit.weight)
            with compute_precision():
                y: torch.Tensor = self.outs[index].forward(x)  # past the hooks on it
            self.write(index, current.columns, current.weight)
        else:
            y = functional.linear(x[..., fit.columns].to(kind), fit.weight.to(kind)).to(dtype)
            y = y if bias is None else y + bias
        found: torch.Tensor = y if norm is None else norm.forward(y)
        return found.float()

    def kl(
        self, teacher: Teacher, config: Sequence[int], *, weights: Mapping[str, torch.Tensor] | None = None
    ) -> float:
        """Return the mean KL(dense || config) per position, in nats, on the teacher's tokens.

        `weights` replace the library's projections, by sublayer name. The model is dense again afterwards.
        """
        return float(self.kls(teacher, config, weights=weights).double().mean())

    def kls(
        self, teacher: Teacher, config: Sequence[int], *, weights: Mapping[str, torch.Tensor] | None = None
    ) -> torch.Tensor:
        """Return the mean KL(dense || config) per position of every sequence (sequences); see `kl`."""
        with self.cut(config, text=teacher, weights=weights):
            return teacher.kls(self.model)

    @contextmanager
    def cut(
        self, config: Sequence[int], *, text: object, weights: Mapping[str, torch.Tensor] | None = None
    ) -> Iterator[None]:
        """Cut the model's layers to `config` for one pass over `text`, which always has the same batches."""
        self.close()
        levels: list[Level] = [() for _ in decoder_layers(self.model)]
        for sublayer, level in zip(self.sublayers, config, strict=True):
            levels[sublayer.layer] += (level,)
        build = self._layer if weights is None else partial(self._layer, weights=weights)
        stitcher = self._stitcher if weights is None else Stitcher(self.model, build)
        with stitcher.stitched(levels, text=text):
            yield

    def _layer(self, index: int, level: Level, weights: Mapping[str, torch.Tensor] = _NONE) -> nn.Module:
        """Return a layer with its sublayers cut to their levels, with other projections where `weights` has them."""
        fits: list[tuple[Sublayer | ExpertSublayer, LevelFit]] = []
        own = [i for i, sublayer in enumerate(self.sublayers) if sublayer.layer == index]
        for i, chosen in zip(own, level, strict=True):
            fit, sublayer = self.library[i][chosen], self.sublayers[i]
            if chosen or sublayer.name in weights:
                fits.append((sublayer, replace(fit, weight=weights.get(sublayer.name, fit.weight))))
        is_gone = len(fits) == len(own) and not any(len(fit.columns) for _, fit in fits)
        return Skipped() if is_gone else cut_layer(self.model, index, fits)

    def forget(self) -> None:
        """Free the inputs of layers that scoring keeps for the last few configs."""
        self._stitcher.forget()

    def close(self) -> None:
        """Restore the dense model."""
        self.set((0,) * len(self.library))


def _bias_of(sublayer: Sublayer | ExpertSublayer) -> torch.Tensor | None:
    bias = sublayer.out.bias if isinstance(sublayer, Sublayer) else None
    return None if bias is None else bias.detach().clone()


@dataclass(frozen=True, kw_only=True)
class Curvature:
    """A quadratic model of KL(dense || config) near the current config: value + b'c + c'Qc/2.

    c is 1 for the chosen levels and 0 elsewhere. `b` (levels) and `Q` (levels x levels) are over the levels of all
    choices, one after the other; the entries of the current levels are zero. `b_error` is the standard error of `b`
    over sequences. `num_rows` is the number of rows from which Q was estimated.
    """

    value: float
    b: torch.Tensor
    b_error: torch.Tensor
    Q: torch.Tensor
    num_rows: int


def linearise(
    net: Supernet,
    teacher: Teacher,
    *,
    samples: int,
    seed: int,
    batch_tokens: int = 1024,
    progress: Callable[[int], None] = lambda _: None,
) -> Curvature:
    """Return the quadratic model of the KL around the current config, from one pass over the teacher's text.

    Both parts come from a matrix A with a row for every sequence r and a column for every level k of every sublayer s:
    A[r, (s, k)] is the sum over the positions t of <g_st, delta_skt>, with g the gradient at the sublayer's output,
    behind its norm if it has one there, and delta the change that the level makes there. For b the gradient is that of
    KL(dense || current). For Q, the mean of A'A / T over `samples` draws with T the number of positions, it is that of
    the log-likelihood of labels drawn from the current model itself. So Q is an unbiased estimate of the Fisher matrix,
    which at the dense model is the curvature of the KL. Rows are sequences, because rows of single positions would miss
    how the changes at several positions add up.
    """
    net.forget()
    generator = torch.Generator().manual_seed(seed)
    size = sum(len(levels) for levels in net.library)
    slopes = torch.zeros(len(teacher.tokens), size)
    Q, value, start = torch.zeros(size, size), 0.0, 0
    head = head_of(net.model)
    with _Tap(net) as tap:
        for batch in batches(teacher.tokens, batch_tokens=batch_tokens):
            rows = slice(start, start + len(batch))
            start += len(batch)
            hidden = tap.forward(batch)
            at_head = teacher.at_head(hidden.detach(), head, rows=rows, samples=samples, generator=generator)
            value += float(at_head.kls.sum())
            if any(net.config):  # at the dense model the KL is least, so its gradient is zero
                slopes[rows] = tap.backward(hidden, at_head.slope) / batch.shape[1]
            for gradient in at_head.scores:
                products = tap.backward(hidden, gradient)
                Q += products.T @ products
            progress(batch.numel())
    total = teacher.tokens.numel()
    return Curvature(
        value=value / total,
        b=slopes.mean(0),
        b_error=slopes.std(0, correction=0) / len(slopes) ** 0.5,
        Q=Q / (total * samples),
        num_rows=len(teacher.tokens) * samples,
    )


class _Tap:
    """Computes rows of A (see `linearise`) for one batch at a time.

    It keeps the inputs of the projections in the forward pass, and multiplies them with the gradients at the outputs in
    the backward passes.
    """

    def __init__(self, net: Supernet) -> None:
        self.net = net
        self.dtype = product_type(torch.float32)
        self.offsets = [0]
        for levels in net.library:
            self.offsets.append(self.offsets[-1] + len(levels))
        self.kept: dict[int, torch.Tensor] = {}  # the changes of as many sublayers as fit, by index
        left = _CHANGES_BYTES
        for index, (sublayer, levels) in enumerate(zip(net.sublayers, net.library, strict=True)):
            if not net.is_linear(index):
                continue  # `_multiply_outputs` needs none
            left -= len(levels) * sublayer.weight.numel() * self.dtype.itemsize
            if left < 0:
                break
            self.kept[index] = self._weight_changes(index)
        self.products = torch.zeros(0)
        self.hooks: list[torch.utils.hooks.RemovableHandle] = []

    def _weight_changes(self, index: int) -> torch.Tensor:
        """Return every level's projection minus the current one (levels x hidden * inputs)."""
        weight, levels = self.net.sublayers[index].weight.detach(), self.net.library[index]
        changes = torch.zeros(len(levels), *weight.shape, dtype=self.dtype)
        for level, fit in enumerate(levels):
            if level != self.net.config[index]:
                change = -weight.float()
                change[:, fit.columns] += fit.weight
                changes[level] = change
        return changes.flatten(1)

    def _bias_changes(self, index: int) -> torch.Tensor | None:
        """Return every level's bias minus the current one (levels x hidden); a removed sublayer has no bias."""
        bias, levels = self.net.biases[index], self.net.library[index]
        if bias is None:
            return None
        has_bias = torch.tensor([float(len(fit.columns) > 0) for fit in levels])
        return (has_bias - has_bias[self.net.config[index]])[:, None] * bias.float()

    def __enter__(self) -> "_Tap":
        for index, out in enumerate(self.net.outs):
            if self.net.is_linear(index):
                self.hooks.append(out.register_forward_hook(self._record(index)))
            else:
                self.hooks += self._hooks_around(index)
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the final hidden states (positions x hidden), with a graph back to the outputs of the projections."""
        model = self.net.model
        embeddings = model.get_input_embeddings()(tokens).detach().requires_grad_(True)
        with compute_precision():
            hidden: torch.Tensor = model.model(inputs_embeds=embeddings, use_cache=False).last_hidden_state
        self.products = torch.zeros(len(tokens), self.offsets[-1])
        return before_head(model, hidden)

    def backward(self, hidden: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        """Return rows of A (sequences x levels) for a loss with that `gradient` at the final hidden states."""
        hidden.backward(gradient.to(hidden.dtype), retain_graph=True)
        return self.products

    def _record(self, index: int) -> Callable[[nn.Module, tuple[torch.Tensor, ...], torch.Tensor], None]:
        def hook(_: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            x = inputs[0].detach().to(self.dtype)
            output.register_hook(lambda gradient: self._multiply(index, x, gradient))

        return hook

    def _hooks_around(self, index: int) -> list[torch.utils.hooks.RemovableHandle]:
        """Hook a sublayer that is not linear: the inputs of its projection or experts, and the gradient behind all."""
        inputs: list[torch.Tensor] = []

        def keep(_: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            inputs[:] = [arguments[0].detach()]

        def record(_: nn.Module, __: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            x, before = inputs[0], output.detach()
            output.register_hook(lambda gradient: self._multiply_outputs(index, x, before, gradient))

        out = self.net.outs[index]
        last = self.net.norms_behind[index] or out
        return [out.register_forward_pre_hook(keep), last.register_forward_hook(record)]

    @torch.no_grad()
    def _multiply_outputs(self, index: int, x: torch.Tensor, before: torch.Tensor, gradient: torch.Tensor) -> None:
        """Compute rows of A for one sublayer that is not linear, from its inputs x, its output and the gradient there.

        The output of a norm is the same for every length of its input, so a gradient before it would say that the loss
        does not change when a sublayer is removed; and a token goes to other experts where its own are removed. The
        output of every level is computed instead.
        """
        for level, fit in enumerate(self.net.library[index]):
            change = -before.float()
            if len(fit.columns):
                change += self.net.output_at(index, fit, x, before.dtype)
            column = self.offsets[index] + level
            self.products[:, column] = (gradient.float() * change).flatten(1).sum(1)
        self.products[:, self.offsets[index] + self.net.config[index]] = 0  # not quite, in another order of sums

    @torch.no_grad()
    def _multiply(self, index: int, x: torch.Tensor, gradient: torch.Tensor) -> None:
        """Compute rows of A for one sublayer from its inputs x and the gradient g at its output.

        The sum of <g_t, change x_t> over the positions t of a sequence is <sum of g_t x_t', change>, so a sequence
        takes only one product with the changes of the levels.
        """
        g = gradient.to(self.dtype).reshape(len(self.products), -1, gradient.shape[-1])
        outer = torch.bmm(g.mT, x.reshape(*g.shape[:2], -1))
        changes = self.kept[index] if index in self.kept else self._weight_changes(index)
        products = (outer.reshape(len(g), -1) @ changes.T).float()
        bias = self._bias_changes(index)
        if bias is not None:
            products += g.float().sum(1) @ bias.T
        self.products[:, self.offsets[index] : self.offsets[index + 1]] = products

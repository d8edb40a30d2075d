"""What gradients at a supernet's sublayers say about every change of them: rows of the matrix that `linearise` sums."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import nn

from dilap.models.anatomy import decoder_layers
from dilap.models.compute import compute_precision, product_type
from dilap.models.families import family_of
from dilap.models.matrices import replaced
from dilap.models.reference import before_head
from dilap.models.statistics import first_of
from dilap.search.library import LevelFit
from dilap.search.supernet import Supernet

# What the levels change in the projections is kept for a whole pass for as many sublayers as this holds, which is all
# of them for a model of 135M parameters; for the others it is made again for every batch. What precisions change in
# the outputs is kept for one batch, which is no larger than this allows.
_CHANGES_BYTES = 2 << 30


@dataclass(frozen=True, kw_only=True)
class Changes:
    """The changes of which the levels of a supernet consist, seen from its current config.

    For every sublayer they are the different `widths`, each with one of the levels that have it, and then the
    `precisions` other than the current one. Last come the other precisions of the `head`. `offsets` are the indices of
    every sublayer's first change, and of the head's; `parts` those of every level's two changes, -1 for none (levels x
    2).
    """

    widths: tuple[tuple[LevelFit, ...], ...]
    precisions: tuple[tuple[str, ...], ...]
    head: tuple[str, ...]
    offsets: tuple[int, ...]
    parts: torch.Tensor

    @classmethod
    def of(cls, net: Supernet) -> "Changes":
        widths = tuple(map(_widths, net.library))
        precisions = tuple(
            _others((fit.precision for fit in levels), base_fit(net, index).precision)
            for index, levels in enumerate(net.library)
        )
        head = _others((one.head for one in net.head_levels), net.head_level(net.config).head)
        sizes = (len(own) + len(others) for own, others in zip(widths, precisions, strict=True))
        offsets = tuple(accumulate(sizes, initial=0))
        parts: list[tuple[int, int]] = []
        for levels, own, others, offset in zip(net.library, widths, precisions, offsets, strict=False):
            counts = [fit.counts for fit in own]
            for fit in levels:
                rounding = _index(others, fit.precision, offset + len(own)) if len(fit.columns) else -1
                parts.append((offset + counts.index(fit.counts), rounding))
        parts += [(-1, _index(head, one.head, offsets[-1])) for one in net.head_levels]
        return cls(widths=widths, precisions=precisions, head=head, offsets=offsets, parts=torch.tensor(parts))

    @property
    def count(self) -> int:
        return self.offsets[-1] + len(self.head)


def base_fit(net: Supernet, index: int) -> LevelFit:
    """Return the level at which a sublayer's precision changes: the current one, or the full one if it is removed."""
    current = net.library[index][net.config[index]]
    return current if len(current.columns) else net.library[index][0]


def _widths(levels: Sequence[LevelFit]) -> tuple[LevelFit, ...]:
    """Return the first of the levels with each width."""
    found: dict[tuple[int, ...], LevelFit] = {}
    for fit in levels:
        found.setdefault(fit.counts, fit)
    return tuple(found.values())


def _others(precisions: Iterable[str], current: str) -> tuple[str, ...]:
    return tuple(one for one in dict.fromkeys(precisions) if one != current)


def _index(precisions: Sequence[str], precision: str, offset: int) -> int:
    return offset + precisions.index(precision) if precision in precisions else -1


class Tap:
    """Computes rows of A (see `linearise`) for one batch at a time.

    It keeps the inputs of the projections in the forward pass, and multiplies them with the gradients at the outputs in
    the backward passes. What other precisions change in the outputs is computed in the forward pass.
    """

    def __init__(self, net: Supernet, changes: Changes) -> None:
        self.net, self.changes = net, changes
        self.device = net.model.device
        self.dtype = product_type(torch.float32, self.device)
        self.kept: dict[int, torch.Tensor] = {}  # the changes of as many sublayers as fit, by index
        left = _CHANGES_BYTES
        for index, (sublayer, widths) in enumerate(zip(net.sublayers, changes.widths, strict=True)):
            if not net.is_linear(index):
                continue  # `_multiply_outputs` needs none
            left -= len(widths) * sublayer.weight.numel() * self.dtype.itemsize
            if left < 0:
                break
            self.kept[index] = self._weight_changes(index)
        self.products = torch.zeros(0)
        self.hooks: list[torch.utils.hooks.RemovableHandle] = []

    def batch_tokens(self, wanted: int) -> int:
        """Return how many tokens a batch may have, at most `wanted`, for what precisions change in it to be kept."""
        num_outputs = sum(map(len, self.changes.precisions)) * self.net.model.config.hidden_size
        return min(wanted, max(1, _CHANGES_BYTES // (num_outputs * self.dtype.itemsize))) if num_outputs else wanted

    def _weight_changes(self, index: int) -> torch.Tensor:
        """Return every width's projection minus the current one, neither rounded (widths x hidden * inputs).

        Removal takes away the current one as it is.
        """
        current, widths = self.net.library[index][self.net.config[index]], self.changes.widths[index]
        weight, rounded = self.net.masked_projection(index, current), self.net.sublayers[index].weight.detach()
        changes = weight.new_zeros(len(widths), *weight.shape, dtype=self.dtype)
        for number, fit in enumerate(widths):
            if fit.counts != current.counts:
                change = -(weight if len(fit.columns) else rounded).float()
                change[:, fit.columns] += fit.weight.to(change.device)
                changes[number] = change
        return changes.flatten(1)

    def _bias_changes(self, index: int) -> torch.Tensor | None:
        """Return every width's bias minus the current one (widths x hidden); a removed sublayer has no bias."""
        bias, current = self.net.biases[index], self.net.library[index][self.net.config[index]]
        if bias is None:
            return None
        widths = self.changes.widths[index]
        has_bias = torch.tensor([float(len(fit.columns) > 0) for fit in widths], device=bias.device)
        return (has_bias - float(len(current.columns) > 0))[:, None] * bias.float()

    def __enter__(self) -> "Tap":
        for index, out in enumerate(self.net.outs):
            if self.net.is_linear(index):
                self.hooks.append(out.register_forward_hook(self._record(index)))
            else:
                self.hooks += self._hooks_around(index)
            if self.changes.precisions[index]:
                self.hooks += self._hooks_at_ends(index)
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the final hidden states (positions x hidden), with a graph back to the outputs of the projections."""
        model = self.net.model
        embeddings = model.get_input_embeddings()(tokens).detach().requires_grad_(True)
        self.products = torch.zeros(len(tokens), self.changes.count, device=self.device)
        with compute_precision(self.device):
            hidden: torch.Tensor = model.model(inputs_embeds=embeddings, use_cache=False).last_hidden_state
        return before_head(model, hidden)

    def backward(self, hidden: torch.Tensor, gradient: torch.Tensor, *, at_logits: torch.Tensor) -> torch.Tensor:
        """Return rows of A (sequences x changes) for a loss with that `gradient` at the final hidden states.

        `at_logits` are the products with the changes of the head, for every position (positions x changes of the head).
        """
        hidden.backward(gradient.to(hidden.dtype), retain_graph=True)
        self.products[:, self.changes.offsets[-1] :] = at_logits.unflatten(0, (len(self.products), -1)).sum(1)
        return self.products

    def _record(self, index: int) -> Callable[[nn.Module, tuple[torch.Tensor, ...], torch.Tensor], None]:
        def hook(_: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            if torch.is_grad_enabled():  # else it runs in another precision
                x = inputs[0].detach().to(self.dtype)
                output.register_hook(lambda gradient: self._multiply(index, x, gradient))

        return hook

    def _hooks_around(self, index: int) -> list[torch.utils.hooks.RemovableHandle]:
        """Hook a sublayer that is not linear: the inputs of its projection or experts, and the gradient behind all."""
        inputs: list[torch.Tensor] = []

        def keep(_: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            if torch.is_grad_enabled():
                inputs[:] = [arguments[0].detach()]

        def record(_: nn.Module, __: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            if torch.is_grad_enabled():
                x, before = inputs[0], output.detach()
                output.register_hook(lambda gradient: self._multiply_outputs(index, x, before, gradient))

        out = self.net.outs[index]
        last = self.net.norms_behind[index] or out
        return [out.register_forward_pre_hook(keep), last.register_forward_hook(record)]

    def _hooks_at_ends(self, index: int) -> list[torch.utils.hooks.RemovableHandle]:
        """Hook the ends of a sublayer, to run it in other precisions, and the gradient at its output."""
        sublayer, norm = self.net.sublayers[index], self.net.norms_behind[index]
        layer = decoder_layers(self.net.model)[sublayer.layer]
        first, last = map(layer.get_submodule, family_of(self.net.model.config).ends_of(sublayer.kind))
        called: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        changes: list[torch.Tensor] = []

        def keep(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            if torch.is_grad_enabled():
                called[:] = [(arguments, keywords)]

        def run(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
            if torch.is_grad_enabled():
                changes[:] = self._precision_changes(index, *called.pop(), output=first_of(output).detach())

        def record(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
            if torch.is_grad_enabled():
                own = list(changes)
                first_of(output).register_hook(lambda gradient: self._multiply_changes(index, own, gradient))

        return [
            first.register_forward_pre_hook(keep, with_kwargs=True),
            last.register_forward_hook(run),
            (norm or last).register_forward_hook(record),
        ]

    @torch.no_grad()
    def _precision_changes(
        self, index: int, arguments: tuple[Any, ...], keywords: dict[str, Any], *, output: torch.Tensor
    ) -> list[torch.Tensor]:
        """Return what every other precision changes in a sublayer's output, behind its norm if it has one there.

        `arguments` and `keywords` are those that the sublayer is called with.
        """
        fit, sublayer, norm = base_fit(self.net, index), self.net.sublayers[index], self.net.norms_behind[index]
        layer, family = decoder_layers(self.net.model)[sublayer.layer], family_of(self.net.model.config)

        def behind(y: torch.Tensor) -> torch.Tensor:
            return y.float() if norm is None else norm.forward(y).float()

        def output_in(precision: str) -> torch.Tensor:
            with replaced(self.net.model, self.net.masked(index, fit, precision)):
                return behind(first_of(family.computed(layer, sublayer.kind, *arguments, **keywords)))

        is_removed = fit is not self.net.library[index][self.net.config[index]]
        own = output_in(fit.precision) if is_removed else behind(output)
        return [(output_in(precision) - own).to(self.dtype) for precision in self.changes.precisions[index]]

    @torch.no_grad()
    def _multiply_changes(self, index: int, changes: Sequence[torch.Tensor], gradient: torch.Tensor) -> None:
        """Compute rows of A for one sublayer's precisions, from the changes of its output and the gradient there."""
        g = gradient.float().reshape(len(self.products), -1)
        start = self.changes.offsets[index] + len(self.changes.widths[index])
        for column, change in enumerate(changes, start=start):
            self.products[:, column] = (g * change.reshape(g.shape)).sum(1)

    @torch.no_grad()
    def _multiply_outputs(self, index: int, x: torch.Tensor, before: torch.Tensor, gradient: torch.Tensor) -> None:
        """Compute rows of A for one sublayer that is not linear, from its inputs x, its output and the gradient there.

        The output of a norm is the same for every length of its input, so a gradient before it would say that the loss
        does not change when a sublayer is removed; and a token goes to other experts where its own are removed. The
        output of every width is computed instead.
        """
        current = self.net.library[index][self.net.config[index]]
        is_rounded = current.precision and index not in self.net.routings
        unrounded = self.net.output_at(index, current, x, before.dtype) if is_rounded else before.float()
        for column, fit in enumerate(self.changes.widths[index], start=self.changes.offsets[index]):
            change = -before.float()
            if len(fit.columns):
                change = self.net.output_at(index, fit, x, before.dtype) - unrounded
            self.products[:, column] = (gradient.float() * change).flatten(1).sum(1)
            if fit.counts == current.counts:
                self.products[:, column] = 0  # not quite, in another order of sums

    @torch.no_grad()
    def _multiply(self, index: int, x: torch.Tensor, gradient: torch.Tensor) -> None:
        """Compute rows of A for one sublayer from its inputs x and the gradient g at its output.

        The sum of <g_t, change x_t> over the positions t of a sequence is <sum of g_t x_t', change>, so a sequence
        takes only one product with the changes of the widths.
        """
        g = gradient.to(self.dtype).reshape(len(self.products), -1, gradient.shape[-1])
        outer = torch.bmm(g.mT, x.reshape(*g.shape[:2], -1))
        changes = self.kept[index] if index in self.kept else self._weight_changes(index)
        products = (outer.reshape(len(g), -1) @ changes.T).float()
        bias = self._bias_changes(index)
        if bias is not None:
            products += g.float().sum(1) @ bias.T
        start = self.changes.offsets[index]
        self.products[:, start : start + len(self.changes.widths[index])] = products

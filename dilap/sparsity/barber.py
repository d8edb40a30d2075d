"""LLM-Barber: exchange a few zeros for other weights, by the error of a whole attention or feed-forward block."""

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from dilap.core.errors import InvalidInput
from dilap.models.anatomy import decoder_layers
from dilap.models.families import family_of
from dilap.models.families.family import Family
from dilap.models.modeling_dilap import linear_at
from dilap.models.statistics import State, first_of, layer_calls
from dilap.sparsity.pattern import Pattern

Granularity = Literal["block", "layer", "output1", "input1"]
Metric = Literal["WD", "W", "D"]
# The published granularity and share of swaps, by the method that made the first mask.
PUBLISHED: Mapping[str, tuple[Granularity, float]] = {
    "magnitude": ("block", 0.1),
    "sparsegpt": ("layer", 0.1),
    "wanda": ("output1", 0.01),
}
OWN: tuple[Granularity, float] = PUBLISHED["wanda"]  # for the first mask of a user's own rule
Weights = dict[str, torch.Tensor]


def swapped(kept: torch.Tensor, scores: torch.Tensor, *, threshold: float, group: int | None = None) -> torch.Tensor:
    """Return the mask after swapping, in every row of `kept` (groups x entries), the best pruned for the worst kept.

    Of the K swaps that would raise the row's score, floor(K * threshold) are made. With `group`, an entry that is kept
    anew takes the place of the worst kept one of its own N:M group, if it is better than that.
    """
    grows = _lowest_ranks(torch.where(kept, torch.inf, -scores))
    falls = _lowest_ranks(torch.where(kept, scores, torch.inf))
    pruned_down = torch.where(kept, -torch.inf, scores).sort(-1, descending=True).values
    kept_up = torch.where(kept, scores, torch.inf).sort(-1).values
    swaps = ((pruned_down > kept_up).sum(-1, keepdim=True) * threshold).floor()
    grown = ~kept & (grows < swaps)
    if group is None:
        return (kept & (falls >= swaps)) | grown
    shape = (*kept.shape[:-1], -1, group)
    inner_grown, inner_kept, inner = grown.reshape(shape), kept.reshape(shape), scores.reshape(shape)
    down = torch.where(inner_grown, inner, -torch.inf).sort(-1, descending=True).values
    up = torch.where(inner_kept, inner, torch.inf).sort(-1).values
    count = (down > up).sum(-1, keepdim=True)
    rises = _lowest_ranks(torch.where(inner_grown, -inner, torch.inf)) < count
    drops = _lowest_ranks(torch.where(inner_kept, inner, torch.inf)) < count
    return ((inner_kept & ~drops) | (inner_grown & rises)).reshape(kept.shape)


def _lowest_ranks(values: torch.Tensor) -> torch.Tensor:
    """Return the rank of every entry in its row; the lowest has rank 0."""
    return values.argsort(dim=-1, stable=True).argsort(dim=-1)


def rebuilt_masks(
    kept: Weights, scores: Weights, *, granularity: Granularity, threshold: float, group: int | None = None
) -> Weights:
    """Return the masks of a block's matrices after swaps inside the groups that `granularity` says.

    The groups are the whole block, single matrices (`layer`), their rows (`output1`) or their columns (`input1`).
    """
    if granularity == "block":
        names = list(kept)
        flat_kept = torch.cat([kept[name].flatten() for name in names])
        flat = torch.cat([scores[name].flatten() for name in names])
        parts = swapped(flat_kept[None], flat[None], threshold=threshold)[0].split([kept[n].numel() for n in names])
        return {name: part.reshape(kept[name].shape) for name, part in zip(names, parts, strict=True)}
    found = {}
    for name, mask in kept.items():
        match granularity:
            case "layer":
                new = swapped(mask.reshape(1, -1), scores[name].reshape(1, -1), threshold=threshold)
            case "output1":
                new = swapped(mask, scores[name], threshold=threshold, group=group)
            case "input1":
                new = swapped(mask.T.contiguous(), scores[name].T.contiguous(), threshold=threshold).T
        found[name] = new.reshape(mask.shape).contiguous()
    return found


@dataclass(frozen=True, kw_only=True)
class Barber:
    """LLM-Barber's second pass over a sparse model.

    The score of a weight is its size in the dense model times the root mean square over sequences of a gradient: that
    of the squared difference between the sparse and the dense block's outputs, taken at the dense weights, on the
    inputs of the sparse model. The `metric` W is the size alone, D the gradient alone. Weights that are kept get their
    dense values again; `retain` leaves them the values that SparseGPT gave them, and takes sizes from these.
    """

    granularity: Granularity = "output1"
    threshold: float = 0.01
    metric: Metric = "WD"
    retain: bool = False

    def rebuild_(
        self,
        model: PreTrainedModel,
        dense: Mapping[str, torch.Tensor],
        tokens: torch.Tensor,
        pattern: Pattern,
        *,
        progress: Callable[[int], None] = lambda _: None,
    ) -> None:
        """Swap weights of the model in place, block by block; `dense` are the layers' dense matrices by `layer.path`.

        The inputs of a block are the outputs of the sparse layers before it, which are rebuilt already. Raises
        InvalidInput for an N:M pattern with a granularity other than output1.
        """
        if pattern.group and self.granularity != "output1":
            raise InvalidInput(f"N:M patterns are rebuilt inside output rows only: output1, not {self.granularity}")
        family = family_of(model.config)
        calls = layer_calls(model, tokens, batch_tokens=1)  # one sequence each: their gradients are squared
        states = [call.hidden for call in calls]
        for index, layer in enumerate(decoder_layers(model)):
            reference = copy.deepcopy(layer).float()
            with torch.no_grad():
                for path, matrix in _matrices(reference):
                    matrix.weight.copy_(dense[f"{index}.{path}"])
            for kind in family.kinds:
                block = Block(sparse=layer, dense=reference, family=family, kind=kind)
                if block.paths:
                    self._rebuild_(block, [call.arguments[index] for call in calls], states, pattern)
            with torch.no_grad():
                pairs = zip(calls, states, strict=True)
                states = [first_of(layer(state, **call.arguments[index])) for call, state in pairs]
            progress(tokens.numel())

    def _rebuild_(self, block: "Block", arguments: list[dict[str, Any]], states: list[State], pattern: Pattern) -> None:
        squares = {path: torch.zeros_like(weight) for path, weight in block.weights(block.dense).items()}
        for given, state in zip(arguments, states, strict=True):
            for path, gradient in block.gradients(given, state).items():
                squares[path] += gradient.square() / len(states)
        sparse, dense = block.weights(block.sparse), block.weights(block.dense)
        kept = {path: weight != 0 for path, weight in sparse.items()}
        values = {path: weight.detach() for path, weight in dense.items()}
        if self.retain:
            values = {path: torch.where(kept[path], sparse[path].detach().float(), values[path]) for path in values}
        scores = {path: self._scores(values[path], squares[path]) for path in values}
        masks = rebuilt_masks(kept, scores, granularity=self.granularity, threshold=self.threshold, group=pattern.group)
        with torch.no_grad():
            for path, weight in sparse.items():
                weight.data = values[path].to(weight.dtype) * masks[path]

    def _scores(self, weight: torch.Tensor, squared_gradient: torch.Tensor) -> torch.Tensor:
        match self.metric:
            case "W":
                return weight.abs()
            case "D":
                return squared_gradient.sqrt()
            case "WD":
                return weight.abs() * squared_gradient.sqrt()


@dataclass(frozen=True, kw_only=True)
class Block:
    """Attention or feed-forward network of one layer: in the sparse model, and in an f32 copy with dense weights."""

    sparse: nn.Module
    dense: nn.Module
    family: Family
    kind: str

    @property
    def paths(self) -> tuple[str, ...]:
        """Paths of the block's matrices; none where its sublayer was removed."""
        family = self.family
        paths = (*family.inputs_of(self.kind), family.output_of(self.kind))
        return tuple(path for path in paths if linear_at(self.sparse, path) is not None)

    def weights(self, layer: nn.Module) -> dict[str, nn.Parameter]:
        """Return the weights of the block's matrices in `layer`, by path."""
        return {path: layer.get_parameter(f"{path}.weight") for path in self.paths}

    def gradients(self, arguments: dict[str, Any], state: State) -> Weights:
        """Return the gradient of mean((sparse - dense output)^2) with respect to the dense weights, by path.

        Both blocks get the input that the sparse model has for the hidden states `state` and the layer's `arguments`.
        """
        given: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        outputs: list[torch.Tensor] = []
        first, last = (self.sparse.get_submodule(path) for path in self.family.ends_of(self.kind))
        hooks = [
            first.register_forward_pre_hook(lambda _, args, keywords: given.append((args, keywords)), with_kwargs=True),
            last.register_forward_hook(lambda _, __, output: outputs.append(first_of(output))),
        ]
        with torch.no_grad():
            self.sparse(state, **arguments)
        for hook in hooks:
            hook.remove()
        inputs, keywords = given[0]
        weights = self.weights(self.dense)
        self.dense.requires_grad_(False)
        for weight in weights.values():
            weight.requires_grad_(True)
        with torch.enable_grad():
            found = first_of(self.family.computed(self.dense, self.kind, *_in_f32(inputs), **_in_f32(keywords)))
            loss = functional.mse_loss(found, outputs[0].reshape(found.shape).float())
            gradients = torch.autograd.grad(loss, list(weights.values()))
        return dict(zip(weights, gradients, strict=True))


def decoder_matrices(model: PreTrainedModel) -> Weights:
    """Return the decoder layers' matrices by `layer.path`, without copying them.

    They do not change later, because pruning and rebuilding put new matrices in their place. So the dense matrices of a
    large model may stay in its file's memory map.
    """
    return {
        f"{index}.{path}": matrix.weight.detach()
        for index, layer in enumerate(decoder_layers(model))
        for path, matrix in _matrices(layer)
    }


def _in_f32(value: Any) -> Any:
    """Return the arguments of a block with all floating-point tensors in them converted to f32."""
    if isinstance(value, torch.Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, tuple):
        return tuple(_in_f32(one) for one in value)
    return {name: _in_f32(one) for name, one in value.items()} if isinstance(value, dict) else value


def _matrices(layer: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    for path, module in layer.named_modules():
        if isinstance(module, nn.Linear):
            yield path, module

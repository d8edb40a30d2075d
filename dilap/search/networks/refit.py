"""Refit the weights of a pruned network layer by layer, each on what it really reads after those before it.

The library fits every level beside a dense rest of the network. In the pruned network a layer reads something else; its
weights are fitted again, so that its outputs are as near to the dense layer's as they can be on the training images.
"""

from dataclasses import dataclass

import torch
from torch import nn

from dilap.core.graph import Layer
from dilap.models.convolutional.norm_statistics import followed, write_norm_
from dilap.models.convolutional.readers import Passage, Passing, norms_behind
from dilap.models.network import Examples, batches_of, evaluating, outputs_of
from dilap.search.allocation import Config
from dilap.search.library import regularised
from dilap.search.networks.library import sample_positions
from dilap.search.networks.supernet import NetworkSupernet

_AT_ONCE = 32  # images


class _Reached(Exception):
    """The layer is reached beyond which nothing is needed."""


@dataclass(frozen=True, kw_only=True)
class _Seen:
    """What a layer reads in the pruned network, around its mean (inputs), and how far its outputs are from the dense.

    `moments` are inputs x inputs; `errors`, the dense outputs less its own, times its inputs (outputs x inputs).
    `dense_outputs` are mean and variance of the dense layer's outputs (2 x outputs).
    """

    moments: torch.Tensor
    errors: torch.Tensor
    mean: torch.Tensor
    dense_outputs: torch.Tensor


@torch.no_grad()
def refit_(
    net: NetworkSupernet, config: Config, dense: nn.Module, images: Examples, *, ridge: float, seed: int
) -> tuple[float, float]:
    """Refit all layers that read units at `config`, and return the distance on the validation split before and after.

    The weights are drawn to the library's, by `ridge` relative to the mean variance of what a layer reads. A batch norm
    behind a layer follows at once, so that those after it read what they will read in the end.
    """
    before = net.kl(config)
    net.set(config)
    stays = net.stays(config)
    with Passing(net.model, net.library.layers) as passing:
        norms = norms_behind(
            net.model, net.library.layers, lambda: outputs_of(net.model, next(batches_of(images, 2, model=net.model)))
        )
    gone = {name for branch in net.removed(config) for name in branch.modules}
    for name in dict.fromkeys(one.layer.name for one in passing.passages if one.layer.name not in gone):
        kept = stays[name]
        seen = _seen(net, dense, net.library.layers[name], images, seed=seed)
        matrix = net.matrix(name).clone()
        damped = regularised(seen.moments[kept][:, kept], ridge=ridge)
        matrix[:, kept] += torch.linalg.solve(damped, seen.errors[:, kept].T).T
        net.write_(name, matrix, mean=seen.mean)
        if name in norms:
            outputs = torch.stack([matrix @ seen.mean, ((matrix @ seen.moments) * matrix).sum(1)])
            outputs[0] += _bias_of(net.model, name)
            norm = norms[name]
            own, eps = net.norms.own[norm], float(getattr(net.model.get_submodule(norm), "eps", 0))
            write_norm_(net.model, norm, followed(outputs, own=own, seen=seen.dense_outputs, eps=eps))
    net.measure_norms_()
    net.config = ()  # it is at none
    return before, float(net.differences().double().mean())


def _seen(net: NetworkSupernet, dense: nn.Module, layer: Layer, images: Examples, *, seed: int) -> _Seen:
    keeps_mean = bool(net.library.means[layer.name].any())
    own, theirs = net.matrix(layer.name), net.dense[layer.name]
    about = net.library.means[layer.name][:, None]  # what the dense layer reads in the mean: more digits are right so
    sums: list[torch.Tensor] | None = None
    count = 0
    for batch in batches_of(images, _AT_ONCE, model=dense):
        with evaluating(dense):
            wanted = _inputs(dense, layer, batch, torch.Generator().manual_seed(seed)) - about
        read = _inputs(net.model, layer, batch, torch.Generator().manual_seed(seed)) - about
        outputs = theirs @ wanted
        error = outputs - own @ read
        found = [read @ read.T, error @ read.T, read.sum(1), error.sum(1), outputs.sum(1), outputs.square().sum(1)]
        sums = found if sums is None else [a + b for a, b in zip(sums, found, strict=True)]
        count += read.shape[1]
    assert sums is not None
    moments, errors, mean, mean_error, first, second = (one / count for one in sums)
    dense_mean = first + theirs @ about[:, 0] + _bias_of(dense, layer.name)
    dense_outputs = torch.stack([dense_mean, second - first.square()])
    if keeps_mean:
        moments, errors = moments - torch.outer(mean, mean), errors - torch.outer(mean_error, mean)
    else:
        mean = torch.zeros_like(mean)
    return _Seen(moments=moments, errors=errors, mean=about[:, 0] + mean, dense_outputs=dense_outputs)


def _bias_of(model: nn.Module, name: str) -> torch.Tensor | float:
    bias: torch.Tensor | None = getattr(model.get_submodule(name), "bias", None)
    return 0.0 if bias is None else bias


def _inputs(model: nn.Module, layer: Layer, batch: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return what a layer reads of a batch at some positions (inputs x positions), without what runs after it."""

    def stop(_: nn.Module, __: object, ___: object) -> None:
        raise _Reached

    hook = model.get_submodule(layer.name).register_forward_hook(stop)
    passages: list[Passage] = []
    try:
        with Passing(model, {layer.name: layer}) as passing:
            passages = passing.passages
            outputs_of(model, batch)
    except _Reached:
        pass
    finally:
        hook.remove()
    inputs = sample_positions(passages[0].inputs(len(batch)), generator)
    return inputs.movedim(1, 0).flatten(1)

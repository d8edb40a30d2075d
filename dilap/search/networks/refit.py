"""Refit the weights of a pruned network layer by layer, each on what it really reads after those before it.

The library fits every level beside a dense rest of the network. In the pruned network a layer reads something else; its
weights are fitted again, so that its outputs are as near to the dense layer's as they can be on the training images.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from dilap.core.graph import Layer
from dilap.models.convolutional.readers import Passage, Passing
from dilap.models.network import Examples, batches_of, evaluating, outputs_of
from dilap.search.allocation import Config
from dilap.search.library import regularised
from dilap.search.networks.library import sample_positions
from dilap.search.networks.supernet import NetworkSupernet

_AT_ONCE = 32  # images, over which batch norms take means and variances


class _Reached(Exception):
    """The layer is reached beyond which nothing is needed."""


@dataclass(frozen=True, kw_only=True)
class _Seen:
    """What a layer reads in the pruned network, around its mean (inputs), and how far its outputs are from the dense.

    `moments` are inputs x inputs; `errors`, the dense outputs less its own, times its inputs (outputs x inputs).
    """

    moments: torch.Tensor
    errors: torch.Tensor
    mean: torch.Tensor


@torch.no_grad()
def refit_(
    net: NetworkSupernet, config: Config, dense: nn.Module, images: Examples, *, ridge: float, seed: int
) -> tuple[float, float]:
    """Refit all layers that read units at `config`, and return the distance on the validation split before and after.

    The weights are drawn to the library's, by `ridge` relative to the mean variance of what a layer reads.
    """
    before = net.kl(config)
    net.set(config)
    stays = net.stays(config)
    with Passing(net.model, net.library.layers) as passing:
        outputs_of(net.model, next(batches_of(images, 2, model=net.model)))
    gone = {name for branch in net.removed(config) for name in branch.modules}
    for name in dict.fromkeys(one.layer.name for one in passing.passages if one.layer.name not in gone):
        kept = stays[name]
        seen = _seen(net, dense, net.library.layers[name], images, seed=seed)
        matrix = net.matrix(name).clone()
        damped = regularised(seen.moments[kept][:, kept], ridge=ridge)
        matrix[:, kept] += torch.linalg.solve(damped, seen.errors[:, kept].T).T
        net.write_(name, matrix, mean=seen.mean)
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
        if len(batch) == 1 and sums is not None:
            continue  # one vector alone has no variance
        with evaluating(dense):
            wanted = _inputs(dense, layer, batch, torch.Generator().manual_seed(seed))
        with _on_batches(net.model):
            read = _inputs(net.model, layer, batch, torch.Generator().manual_seed(seed))
        wanted, read = wanted - about, read - about
        error = theirs @ wanted - own @ read
        found = [read @ read.T, error @ read.T, read.sum(1), error.sum(1)]
        sums = found if sums is None else [a + b for a, b in zip(sums, found, strict=True)]
        count += read.shape[1]
    assert sums is not None
    moments, errors, mean, mean_error = (one / count for one in sums)
    if not keeps_mean:
        return _Seen(moments=moments, errors=errors, mean=torch.zeros_like(mean))
    centred = moments - torch.outer(mean, mean)
    return _Seen(moments=centred, errors=errors - torch.outer(mean_error, mean), mean=about[:, 0] + mean)


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


@contextmanager
def _on_batches(model: nn.Module) -> Iterator[None]:
    """Let batch norms use the statistics of the batch, and remember none of them."""
    norms = [one for one in model.modules() if isinstance(one, _BatchNorm) and one.track_running_stats]
    momenta = [one.momentum for one in norms]
    for one in norms:
        one.training, one.momentum = True, 0.0
    try:
        yield
    finally:
        for one, momentum in zip(norms, momenta, strict=True):
            one.training, one.momentum = False, momentum

"""What a network of experts loses without some of them; nothing makes up for it, and the others stay as they are."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from dilap.models.anatomy import ExpertSublayer
from dilap.models.compute import compute_precision
from dilap.models.routing import Routing

Batches = Sequence[torch.Tensor]  # what enters a network of experts (each: sequences x tokens x hidden)


@contextmanager
def inputs_recorded(sublayers: Sequence[ExpertSublayer]) -> Iterator[dict[str, list[torch.Tensor]]]:
    """Keep what enters the networks of experts, by the name of the sublayer, until it is taken out."""
    inputs: dict[str, list[torch.Tensor]] = {one.name: [] for one in sublayers}

    def keeping(name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def hook(_: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            if name in inputs:
                inputs[name].append(arguments[0].detach())

        return hook

    hooks = [one.out.register_forward_pre_hook(keeping(one.name)) for one in sublayers]
    try:
        yield inputs
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def importances(sublayer: ExpertSublayer, batches: Batches) -> torch.Tensor:
    """Return the importance of every expert (experts): the mean of the router's weight times the norm of its output.

    The mean is over the tokens that are sent to the expert, as in REAP, router-weighted expert activation pruning
    (arXiv 2510.13999); an expert without any has none.
    """
    experts = sublayer.out.get_submodule("experts")
    sums, counts = sublayer.weight.new_zeros(2, len(sublayer.weight), dtype=torch.float32)
    for batch in batches:
        x = batch.reshape(-1, batch.shape[-1])
        with compute_precision(x.device):
            _, weights, chosen = sublayer.router(x)
            for rank in range(chosen.shape[1]):  # every token's first expert, then its second
                outputs = experts(x, chosen[:, rank : rank + 1], torch.ones_like(weights[:, :1]))
                sums.index_add_(0, chosen[:, rank], weights[:, rank].float() * outputs.float().norm(dim=-1))
                counts.index_add_(0, chosen[:, rank], counts.new_ones(len(x)))
    found: torch.Tensor = sums / counts.clamp_min(1)
    return found


@torch.no_grad()
def output_errors(sublayer: ExpertSublayer, kept: Sequence[torch.Tensor], batches: Batches) -> list[float]:
    """Return the mean squared change of the output when only the experts `kept` are left, for each of these.

    It is relative to that of removing all of them.
    """
    routing, weight = Routing(sublayer.out, sublayer.router), sublayer.weight.detach()
    dense = [_output(sublayer.out, batch) for batch in batches]
    total, errors = max(sum(float(y.square().sum()) for y in dense), 1e-30), []
    try:
        for experts in kept:
            routing.choose_among(experts, weight[experts])
            lost = (_output(sublayer.out, batch) - y for batch, y in zip(batches, dense, strict=True))
            errors.append(sum(float(change.square().sum()) for change in lost) / total)
    finally:
        routing.choose_among(torch.arange(len(weight)), weight)
    return errors


def _output(network: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    with compute_precision(inputs.device):
        found: torch.Tensor = network(inputs)
    return found.float()

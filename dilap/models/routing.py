"""Send tokens to some of a network's experts only, without a copy of the experts' large tensors."""

from functools import partial

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

Routed = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # logits, weights and numbers of the experts of every token


class Routing:
    """The experts among which the router of a network chooses; at first those that it has.

    The weights of a router have a row for every expert. With the rows of some experts it computes what the router of a
    network with only these does, and its choices are then given the numbers that the experts have in the whole network.
    """

    def __init__(self, network: nn.Module, router: nn.Module) -> None:
        self._network, self._router = network, router
        self._all = router.get_parameter("weight")
        self._handle: RemovableHandle | None = None

    def choose_among(self, experts: torch.Tensor, rows: torch.Tensor) -> None:
        """Choose among `experts` only, of which `rows` are the weights; without any the network's output is zero."""
        experts = experts.to(self._all.device)
        if self._handle is not None:
            self._handle.remove()
        if len(experts) == 0:
            # before all other hooks, which then see the zeros
            self._handle = self._network.register_forward_hook(_nothing, prepend=True)
        elif len(experts) == len(self._all):
            self._router.weight, self._handle = self._all, None
        else:
            self._router.weight = nn.Parameter(rows.to(self._all), requires_grad=False)
            self._handle = self._router.register_forward_hook(partial(_renumbered, experts))


def _nothing(_: nn.Module, __: object, output: torch.Tensor) -> torch.Tensor:
    """Return zeros through which gradients can be asked for."""
    return 0 * output


def _renumbered(experts: torch.Tensor, _: nn.Module, __: object, output: Routed) -> Routed:
    logits, weights, chosen = output
    return logits, weights, experts[chosen]

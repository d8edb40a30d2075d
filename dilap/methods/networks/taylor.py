"""Units whose removal changes the loss least, to first order, go first.

Molchanov et al., Importance Estimation for Neural Network Pruning (arXiv 1906.10771): the importance of a unit is the
squared sum, over its scale and shift in a batch norm, of parameter times gradient, in the mean over batches. A unit
without a batch norm is scored by the weights and biases of its filters. Without labels the classes that the network
itself predicts take their place.

Embeddings of texts are compared with the dense network's, from which they are first not apart: their squared change, to
first order, is that of their product with a random vector, squared, in the mean over such vectors.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _NormBase

from dilap.core.graph import Network
from dilap.core.groups import Group, Member
from dilap.core.plan import Plan
from dilap.methods.networks.scores import by_unit, filters_of, over_axis
from dilap.models.network import batches_of, evaluating, gives_embeddings, outputs_of
from dilap.search.network_task import NetworkTask


@dataclass(frozen=True, kw_only=True)
class Taylor:
    """First-order Taylor importance, compared over the whole network.

    Gradients are those of batches of `batch_size` images.
    """

    batch_size: int = 32

    def __call__(self, task: NetworkTask) -> Plan[Network]:
        return task.keep_highest(self.scores(task))

    def scores(self, task: NetworkTask) -> dict[str, torch.Tensor]:
        """Return the importance of every unit by group; the model is left as it was, without gradients."""
        gates = {group.name: gates_of(task.model, task.network, group) for group in task.network.groups}
        names = sorted({one.tensor for members in gates.values() for one in members})
        found = {group.name: torch.zeros(group.num_units) for group in task.network.groups}
        parameters = dict(task.model.named_parameters())
        known = None if task.labels is None else torch.tensor(task.labels).split(self.batch_size)
        with evaluating(task.model), _gradients(task.model):
            for number, batch in enumerate(batches_of(task.images, self.batch_size, model=task.model)):
                loss = _loss(task.model, batch, None if known is None else known[number], number)
                gradients = dict(zip(names, torch.autograd.grad(loss, [parameters[one] for one in names]), strict=True))
                for name, members in gates.items():
                    change = torch.zeros(len(found[name]))
                    for one in members:
                        product = (parameters[one.tensor].detach() * gradients[one.tensor]).float()
                        change += by_unit(over_axis(product, one.axis), one)
                    found[name] += change.square() * (len(batch) / len(task.images))
        return found


def _loss(model: nn.Module, batch: torch.Tensor, labels: torch.Tensor | None, number: int) -> torch.Tensor:
    outputs = outputs_of(model, batch)[0]
    if gives_embeddings(model):
        drawn = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(number)).to(outputs)
        return (outputs * drawn).sum() / math.sqrt(len(batch))  # whose square is the mean over the batch
    return functional.cross_entropy(
        outputs, outputs.detach().argmax(1) if labels is None else labels.to(outputs.device)
    )


def gates_of(model: nn.Module, network: Network, group: Group) -> list[Member]:
    """Return where the parameters lie that a group's units are scored by: of batch norms, or else of filters."""
    norms = [one for one in group.members if _is_norm(model, one.tensor) and one.tensor.endswith(("weight", "bias"))]
    if norms:
        return norms
    filters = filters_of(network, group)
    biases = {f"{one.tensor.removesuffix('weight')}bias" for one in filters}
    return filters + [one for one in group.members if one.tensor in biases]


def _is_norm(model: nn.Module, tensor: str) -> bool:
    return isinstance(model.get_submodule(tensor.rpartition(".")[0]), _NormBase)


@contextmanager
def _gradients(model: nn.Module) -> Iterator[None]:
    """Let all parameters have gradients; at the end those that had none do so no longer."""
    required = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.requires_grad_(True)
    try:
        yield
    finally:
        for parameter, was_required in required:
            parameter.requires_grad_(was_required)

"""What a prune job of a network that is no decoder will take, stage by stage; see `dilap.job.forecast`.

The network itself is loaded, which takes a second, because only running it shows its shape. Examples are counted as if
there were as many as methods see at most.
"""

import math
from collections.abc import Callable
from functools import partial
from math import prod

import torch

from dilap import methods
from dilap.core.graph import Layer, Network
from dilap.job.forecast import Machine, Need
from dilap.job.network_options import ExampleOptions, NetworkOptions
from dilap.job.network_prune import load_source
from dilap.methods import NETWORK_METHODS
from dilap.methods.networks.halp import Halp
from dilap.methods.networks.taylor import Taylor
from dilap.models.compute_device import HOST
from dilap.search.networks.prune import Dilap
from dilap.search.options import SearchOptions

_F32 = 4
# What is kept of a layer's output for a backward pass, in outputs: itself, and what norms and activations make of it.
# ResNet-50 at 224x224, whose layers give 11.1 M numbers an image, takes 100 MB.
_KEPT_OUTPUTS = 2.25
_IN_PASS, _IN_RECOVERY = 4, 8  # examples in a backward pass of the search, and of recovery
_NORM_EXAMPLES = 128  # on which batch norms are measured for every config
_LEVELS = 10  # of a group, half of whose units stay in the mean
_MATRICES = 3  # of all layers: the dense network's, those of its copy, and those of the config that is being made


def of_job(options: NetworkOptions) -> tuple[Callable[[NetworkOptions], list[Need]], Machine]:
    """Return what says the needs of such jobs of this network on this machine, and the machine."""
    network = load_source(options).traced.network
    return partial(needs_of, network), Machine.here(HOST).timed(torch.float32)


def needs_of(network: Network, options: NetworkOptions) -> list[Need]:
    """Return the needs of a job's stages. Raises InvalidInput for a method that is not known."""
    asked, weights = _examples(options), _F32 * network.num_parameters
    searched = asked.most_train + asked.most_validation
    held = weights + searched * _F32 * prod(network.input_size)
    flops = float(network.flops())
    found = [
        Need(stage="load the model", device_bytes=weights),
        _pruning(network, options, held=held),
        Need(stage="score both models", device_bytes=held, flops=2 * (searched + asked.most_validation) * flops),
    ]
    if options.recovery.mode != "none":
        steps, batch = options.recovery.steps, options.recovery.batch_images
        found.append(
            Need(
                stage="recover",
                # the dense network, and of the pruned one weights, gradients and two states of each
                device_bytes=held + 4 * weights + activations(network, _IN_RECOVERY),
                file_bytes=weights,
                flops=4 * steps * batch * flops,
            )
        )
    return found


def _examples(options: NetworkOptions) -> ExampleOptions:
    assert options.examples is not None  # nothing is pruned without them
    return options.examples


def _pruning(network: Network, options: NetworkOptions, *, held: int) -> Need:
    method = methods.get(options.method, options.settings, table=NETWORK_METHODS)
    train, flops = _examples(options).most_train, float(network.flops())
    if isinstance(method, Dilap):
        return _search(network, options, method, held=held)
    if isinstance(method, Halp):
        batch = min(method.batch_size, train)
        steps = method.rounds * max(1, round(method.scale * method.steps))
        weights = _F32 * network.num_parameters
        need = held + 3 * weights + activations(network, batch)  # a copy, its gradients, and their momentum
        return Need(stage="prune", device_bytes=need, flops=3 * steps * batch * flops)
    if isinstance(method, Taylor):
        need = held + _F32 * network.num_parameters + activations(network, min(method.batch_size, train))
        return Need(stage="prune", device_bytes=need, flops=3 * train * flops)
    return Need(stage="prune", device_bytes=held)  # scored by the weights alone


def _search(network: Network, options: NetworkOptions, method: Dilap, *, held: int) -> Need:
    """Return the needs of DiLAP's search: its library, its quadratic models, and the configs that it scores."""
    asked, flops = _examples(options), float(network.flops())
    weights, vectors = _F32 * network.num_parameters, 1 + method.draws
    outputs = _F32 * sum(map(partial(_outputs, network), network.layers))
    widest = _F32 * max(_inputs(network, one) * one.num_positions // len(one.output_sizes) for one in network.layers)
    in_pass = activations(network, _IN_PASS) + _IN_PASS * (vectors * outputs + widest)
    share = options.budget.fraction if options.budget.fraction is not None else 1 - (options.budget.ratio or 0.5)
    rounds = math.ceil(max(0.0, 1 - share) / SearchOptions().step) + 2
    scored = (rounds + method.evaluations) * (asked.most_validation + min(_NORM_EXAMPLES, asked.most_train))
    return Need(
        stage="prune",
        device_bytes=held + _MATRICES * weights + library_bytes(network) + in_pass,
        flops=flops * (3 * asked.most_train + rounds * asked.most_validation * (1 + 2 * vectors) + scored),
    )


def library_bytes(network: Network) -> int:
    """Return about how many bytes the statistics and the weights of all levels take that are fitted before a search."""
    readers = [one for one in network.layers if one.num_groups == 1]
    moments = sum(_inputs(network, one) ** 2 for one in readers)
    return _F32 * (moments + _LEVELS * sum(network.num_weights(one) for one in readers) // 2)


def activations(network: Network, count: int) -> int:
    """Return the bytes that a backward pass needs of a forward pass of so many examples."""
    outputs = sum(_outputs(network, one) for one in network.layers)
    return round(_KEPT_OUTPUTS * _F32 * count * outputs)


def _outputs(network: Network, layer: Layer) -> int:
    """Return how many numbers a layer gives for one example."""
    return network.channels(layer)[1] * layer.num_positions


def _inputs(network: Network, layer: Layer) -> int:
    """Return how many numbers one position of a layer's output is a product of."""
    return network.num_weights(layer) // network.channels(layer)[1]

"""DiLAP's own search for networks that are no decoders: levels of all groups chosen together.

It is the search for decoders (`dilap.search.dilap`) with other levels, whose costs come in pairs: what a convolution
takes depends on the widths before and after it. The levels are fitted on the images to calibrate on, and the distance
from the dense network is that on the validation split.
"""

from dataclasses import asdict, dataclass

import torch

from dilap.core.codec import digest
from dilap.core.errors import InvalidInput
from dilap.core.graph import Network
from dilap.core.plan import Plan
from dilap.core.space import plan_of
from dilap.models.convolutional.cut import constant_of, tensors_of
from dilap.models.network import gives_embeddings, in_f32
from dilap.search import dilap
from dilap.search.allocation import Config
from dilap.search.levels import search_within
from dilap.search.method import Pruned
from dilap.search.network_task import NetworkTask
from dilap.search.networks.library import LibraryOptions, build_library
from dilap.search.networks.space import network_space
from dilap.search.networks.supernet import NetworkSupernet
from dilap.search.options import SearchOptions
from dilap.search.task import SearchTask

_NUM_MEASURED = 128  # images on which batch norms are measured during the search


@dataclass(frozen=True, kw_only=True)
class Dilap:
    """DiLAP's search.

    `evaluations` is how many configs are scored by their real distance at the end, `draws` how many random vectors tell
    the curvature for every example, and `ridge` is relative to the mean variance of what a layer reads.
    """

    evaluations: int = 40
    draws: int = 4
    ridge: float = 0.01

    def __call__(self, task: NetworkTask) -> Pruned[Network]:
        options = SearchOptions(evaluations=self.evaluations, label_samples=self.draws, seed=task.seed)
        return pruned(task, supernet_of(task, LibraryOptions(ridge=self.ridge)), options)


def supernet_of(task: NetworkTask, options: LibraryOptions) -> NetworkSupernet:
    """Return the network of a task with the levels that it can be set to. Raises InvalidInput.

    Levels and answers are kept in the task's cache, where a search that was killed finds them.
    """
    if task.validation is None:
        raise InvalidInput("DiLAP's search needs a validation split")
    space = network_space(task.network, task.require_costs(), widths=task.widths)
    model, images = in_f32(task.model), task.images
    library, journal = None, None
    if task.cache is not None:
        levels = [[choice.name, [level.counts for level in choice.levels]] for choice in space.choices]
        name = digest([asdict(options), task.seed, levels])[:16]
        library, journal = task.cache / f"library-{name}.safetensors", task.cache / f"journal-{name}"
    return NetworkSupernet(
        model,
        space,
        build_library(model, space, images, options=options, seed=task.seed, kept=library),
        images=images[:_NUM_MEASURED],
        validation=task.validation,
        journal=journal,
    )


def pruned(task: NetworkTask, net: NetworkSupernet, options: SearchOptions) -> Pruned[Network]:
    """Return what the search finds within the limit of a task, with the library's weights. Raises Infeasible.

    They are not fitted again on what layers read in the pruned network, as those of decoders are: for
    EfficientNet-Lite0 at 70 % of its latency that took half of the time, and raised the KL on the validation split
    from 0.338 to 0.490.
    """
    asked = SearchTask(
        evaluator=net,
        space=net.space,
        limit=task.cost_limit.limit,
        options=options,
        distance="cosine distance" if gives_embeddings(task.model) else "KL",
        report=task.report,
    )

    def plan(config: Config) -> Plan[Network]:
        return plan_of(net.space, net.units(config), base=task.base)

    found = search_within(asked, dilap.search, task.cost_limit, plan=plan)
    net.set(found.config)
    return Pruned(plan=plan(found.config), parameters=parameters_of(net, found.config))


def parameters_of(net: NetworkSupernet, config: Config) -> dict[str, torch.Tensor]:
    """Return the values that the layers that read units have now, at `config`, in the dense shape.

    A removed branch adds the mean of what it added, where its last layer can keep that.
    """
    found = {}
    tensors = tensors_of(net.model)
    for layer in net.library.layers.values():
        for name in (layer.weight, f"{layer.name}.bias"):
            if name in tensors:
                found[name] = tensors[name].detach().clone()
    for branch in net.removed(config):
        found[f"{branch.last}.bias"] = constant_of(net.model, branch)
    return found

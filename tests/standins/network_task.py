"""What methods for networks are asked in tests: to keep a share of the multiply-adds of a tiny network."""

from typing import Any

from torch import nn

from dilap.profilers.tables.networks.costs import counted
from dilap.search.limit import CostLimit
from dilap.search.network_task import NetworkTask
from standins.networks import network, random_pixels, shape_of
from tools.tiny_networks import NUM_CLASSES

IMAGES, VALIDATION = random_pixels(8, seed=3), random_pixels(6, seed=4)
LABELS = tuple(number % NUM_CLASSES for number in range(len(IMAGES)))


def task_of(model: nn.Module, *, share: float = 0.5, multiple: int = 1, **given: Any) -> NetworkTask:
    """A limit on the multiply-adds that are left; other fields of the task are as `given`."""
    costs = counted(shape_of(model), "operations")
    fields: dict[str, Any] = {"images": IMAGES, "labels": LABELS, "validation": VALIDATION, **given}
    return NetworkTask(
        model=model,
        base="",
        network=costs.network,
        costs=costs,
        cost_limit=CostLimit(limit=share * costs.predict({}), predict=costs.predict),
        multiple=multiple,
        **fields,
    )


def task(name: str = "lite", *, share: float = 0.5, multiple: int = 1) -> NetworkTask:
    """The same for a network of NETWORKS."""
    return task_of(network(name), share=share, multiple=multiple)

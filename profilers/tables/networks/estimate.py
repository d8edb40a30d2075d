"""Estimate how fast a device would run a network, from its published bandwidth and compute."""

from collections.abc import Mapping

from dilap.core.graph import Network
from dilap.core.shape import PRECISION_BITS
from dilap.core.workload import Workload
from dilap.profilers.devices.device import Device, Reach
from dilap.profilers.tables.networks.model import NetworkLatency
from dilap.profilers.tables.networks.works import KINDS, Kind, LayerWork, amount, in_seconds, layer_works
from dilap.profilers.tables.roofline import METHOD, published, reaches

_MOVED: tuple[Kind, ...] = ("reads", "writes", "weights")


def network_roofline(
    network: Network, workload: Workload, device: Device, *, reach: Reach | None = None
) -> NetworkLatency:
    """Return costs by which a layer takes as long as what it moves or what it computes, and what it takes to start.

    It is the one that takes longer in the dense network, at every width, so that costs are sums of products of widths.
    `reach` says what is had of the device's peaks, by default what is likely. Raises InvalidInput for a device without
    published numbers.
    """
    counts, reach = network.widths_at({}), reach or reaches(device)[1]
    works = layer_works(network)
    return NetworkLatency(
        network=network,
        workload=workload,
        method=METHOD,
        terms={one.layer: in_seconds(one, _speeds(one, counts, workload, device, reach)) for one in works},
        cross_validation={},
        noise_seconds=0.0,
        holdout=(),
    )


def _speeds(
    layer: LayerWork, counts: Mapping[str, int], workload: Workload, device: Device, reach: Reach
) -> dict[Kind, float]:
    """Return the seconds of a unit of every kind of work in one layer; 0 for what the other kinds hide."""
    bytes_per_second, flops_per_second = (reach.share * peak for peak in published(device, workload.precision))
    number = PRECISION_BITS[workload.precision] / 8 / bytes_per_second
    moving = {"reads": workload.batch * number, "writes": workload.batch * number, "weights": number}
    multiplying = 2 * workload.batch / flops_per_second
    moved = sum(moving[kind] * amount(layer.works[kind], counts) for kind in _MOVED)
    is_moving = multiplying * amount(layer.works["operations"], counts) < moved
    found = moving if is_moving else {"operations": multiplying}
    return {kind: {**found, "launch": reach.operator_seconds}.get(kind, 0.0) for kind in KINDS}

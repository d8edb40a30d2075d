"""Estimate how fast a device would run a network at best, from its published bandwidth and compute."""

from collections.abc import Mapping

from dilap.core.graph import Network
from dilap.core.shape import PRECISION_BITS
from dilap.core.workload import Workload
from dilap.profilers.devices.device import Device
from dilap.profilers.tables.networks.model import NetworkLatency
from dilap.profilers.tables.networks.works import KINDS, Kind, LayerWork, amount, in_seconds, layer_works
from dilap.profilers.tables.roofline import METHOD, published

_MOVED: tuple[Kind, ...] = ("reads", "writes", "weights")


def network_roofline(network: Network, workload: Workload, device: Device) -> NetworkLatency:
    """Return costs by which a layer takes as long as what it moves or as what it computes.

    It is the one that takes longer in the dense network, at every width, so that costs are sums of products of widths.
    Raises InvalidInput for a device without published numbers.
    """
    counts = network.widths_at({})
    return NetworkLatency(
        network=network,
        workload=workload,
        method=METHOD,
        terms={one.layer: in_seconds(one, _speeds(one, counts, workload, device)) for one in layer_works(network)},
        cross_validation={},
        noise_seconds=0.0,
        holdout=(),
    )


def _speeds(layer: LayerWork, counts: Mapping[str, int], workload: Workload, device: Device) -> dict[Kind, float]:
    """Return the seconds of a unit of every kind of work in one layer; 0 for what the other kinds hide."""
    bytes_per_second, flops_per_second = published(device)
    number = PRECISION_BITS[workload.precision] / 8 / bytes_per_second
    moving = {"reads": workload.batch * number, "writes": workload.batch * number, "weights": number}
    multiplying = 2 * workload.batch / flops_per_second
    moved = sum(moving[kind] * amount(layer.works[kind], counts) for kind in _MOVED)
    if multiplying * amount(layer.works["operations"], counts) < moved:
        return {kind: moving.get(kind, 0.0) for kind in KINDS}
    return {kind: multiplying if kind == "operations" else 0.0 for kind in KINDS}

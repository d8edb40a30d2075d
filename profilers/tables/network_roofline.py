"""Estimate how fast an image network would be at best: a roofline of a device's published bandwidth and compute."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from dilap.core.graph import Layer, Network
from dilap.core.shape import PRECISION_BITS, UNMIXED
from dilap.core.workload import Workload
from dilap.profilers.devices.device import Device
from dilap.profilers.tables.roofline import published


@dataclass(frozen=True, kw_only=True)
class NetworkRoofline:
    """What a network takes at best: every layer as long as its bytes or its operations, whichever are slower.

    The bytes are those of its weights, of what it takes in and of what it gives. Only the proportions are of use for a
    device that is measured. Raises InvalidInput for a device without published numbers.
    """

    network: Network
    workload: Workload
    device: Device

    @property
    def caveats(self) -> tuple[str, ...]:
        """What a reader has to know of the predictions."""
        return ("latencies were predicted from operations and bytes, not from a latency table",)

    def predict(self, widths: Mapping[str, int], precisions: Mapping[str, str] = UNMIXED) -> float:  # noqa: ARG002
        """Return the seconds of one run with so many units left in the groups, all of those that are not named."""
        return sum(self._seconds(layer, widths) for layer in self.network.layers)

    def _seconds(self, layer: Layer, counts: Mapping[str, int]) -> float:
        weights, batch = self.network.num_weights(layer, counts), self.workload.batch
        if not weights:  # of a removed branch
            return 0.0
        taken, given = self.network.channels(layer, counts)
        step = prod(layer.stride)
        positions = layer.num_positions
        read = positions / step if layer.kind == "transposed" else positions * step
        numbers = weights + batch * (taken * read + given * positions)
        num_bytes = numbers * PRECISION_BITS[self.workload.precision] / 8
        flops = batch * self.network.layer_flops(layer, counts)
        bytes_per_second, flops_per_second = published(self.device)
        return max(num_bytes / bytes_per_second, flops / flops_per_second)

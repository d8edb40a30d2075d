"""The roofline of image networks."""

from dataclasses import replace

import pytest
from standins.networks import shape

from dilap.core.errors import InvalidInput
from dilap.core.workload import Workload
from dilap.profilers.devices import device as devices
from dilap.profilers.tables.network_roofline import NetworkRoofline

FORWARD = Workload(phase="forward", precision="f32")
HOST = devices.get("host_cpu")


def test_fewer_channels_and_no_branch_take_less() -> None:
    network = shape("resnet_basic")
    roofline = NetworkRoofline(network=network, workload=FORWARD, device=HOST)
    halves = {group.name: group.num_units // 2 for group in network.groups}
    without = {name: 0 for branch in network.branches for name in branch.groups}
    assert without
    assert roofline.predict(halves) < roofline.predict({})
    assert roofline.predict(without) < roofline.predict({})


def test_a_device_that_is_bound_by_compute_takes_as_long_as_its_operations() -> None:
    network = shape("resnet_basic")
    device = replace(HOST, bytes_per_second=1e30, flops_per_second=1e9)
    roofline = NetworkRoofline(network=network, workload=replace(FORWARD, batch=3), device=device)
    assert roofline.predict({}) == pytest.approx(3e-9 * network.flops())


def test_a_device_without_published_numbers_cannot_be_estimated() -> None:
    device = replace(HOST, bytes_per_second=None)
    with pytest.raises(InvalidInput, match="no bandwidth and compute are published for host_cpu"):
        NetworkRoofline(network=shape("plain"), workload=FORWARD, device=device).predict({})

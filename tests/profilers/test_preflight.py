"""Whether a device's state is worth measuring."""

import pytest

from dilap.core.errors import Unfit
from dilap.core.measurement import DeviceState
from dilap.profilers.devices import device as devices
from dilap.profilers.devices.preflight import find_problems, require_fit, settled_state

STATES = {
    "hot": ("jetson_cpu", DeviceState(temperatures_celsius={"cpu": 50.0, "tj": 61.0}), "61 °C warm, 60 are allowed"),
    "warm phone": ("s23", DeviceState(temperatures_celsius={"battery": 38.0}), "38 °C warm"),
    "throttling": ("s23", DeviceState(thermal_status=1), "thermal status 1"),
    "empty": ("s23", DeviceState(battery_percent=20.0, ac_power=False), "battery is at 20 %"),
    "unplugged": ("snapdragon_x", DeviceState(ac_power=False), "runs on battery"),
    "busy": ("jetson_cpu", DeviceState(num_cores=6, load=3.5), "keep 3.5 of its 6 cores busy"),
    "throttled clocks": (
        "jetson_cpu",
        DeviceState(clocks_khz={"policy0": 1_400_000}, pinned_khz={"policy0": 1_510_400}),
        "policy0 runs at 1.40 GHz and is pinned to 1.51",
    ),
    "emulated": ("snapdragon_x", DeviceState(emulated=True), "another processor"),
    "small mode": ("jetson_cpu", DeviceState(num_cores=4), "6 threads on 4 cores"),
}
FIT = {
    "silent": ("jetson_cpu", DeviceState()),
    "cool": ("jetson_cpu", DeviceState(temperatures_celsius={"tj": 59.0}, num_cores=6, load=2.9)),
    "clocks nearly as pinned": (
        "jetson_cpu",
        DeviceState(clocks_khz={"policy0": 1_500_000}, pinned_khz={"policy0": 1_510_400}),
    ),
    "charging": ("s23", DeviceState(battery_percent=20.0, ac_power=True, thermal_status=0)),
    "plugged": ("snapdragon_x", DeviceState(ac_power=True, battery_percent=100.0)),
    "busy host": ("host_cpu", DeviceState(num_cores=1024, load=9999.0)),
}


@pytest.mark.parametrize("name", STATES)
def test_an_unfit_state_is_refused_with_the_reason(name: str) -> None:
    device, state, reason = STATES[name]
    known = devices.get(device)
    with pytest.raises(Unfit, match=reason):
        require_fit(state, known, threads=known.default_threads(), force=False)


@pytest.mark.parametrize("name", STATES)
def test_every_problem_says_what_mends_it(name: str) -> None:
    device, state, _ = STATES[name]
    known = devices.get(device)
    assert all(problem.mend for problem in find_problems(state, known, threads=known.default_threads()))


@pytest.mark.parametrize("name", FIT)
def test_a_fit_state_has_no_problem(name: str) -> None:
    device, state = FIT[name]
    known = devices.get(device)
    assert require_fit(state, known, threads=known.default_threads(), force=False) == ()


def test_a_forced_measurement_knows_why_it_was_refused() -> None:
    state = DeviceState(temperatures_celsius={"tj": 61.0})
    assert require_fit(state, devices.get("jetson_gpu"), threads=1, force=True) == ("it is 61 °C warm, 60 are allowed",)


class Cooling:
    """A Jetson that loses a degree at every look."""

    def __init__(self, celsius: float) -> None:
        self.celsius = celsius
        self.slept: list[float] = []
        self.told: list[str] = []

    def state(self) -> DeviceState:
        self.celsius -= 1
        return DeviceState(temperatures_celsius={"tj": self.celsius}, num_cores=6)

    def settle(self, *, threads: int = 6, seconds: int = 600) -> DeviceState:
        return settled_state(
            self.state,
            devices.get("jetson_cpu"),
            threads=threads,
            seconds=seconds,
            tell=self.told.append,
            sleep=self.slept.append,
        )


def test_a_hot_device_is_waited_for() -> None:
    jetson = Cooling(64.0)
    assert jetson.settle().hottest_celsius == 60
    assert jetson.slept == [15, 15, 15]
    assert jetson.told[0] == "waiting for jetson_cpu: it is 63 °C warm, 60 are allowed"


def test_a_device_that_stays_hot_is_not_waited_for_longer_than_that() -> None:
    jetson = Cooling(1000.0)
    assert jetson.settle(seconds=60).hottest_celsius == 995
    assert sum(jetson.slept) == 60


def test_what_time_does_not_mend_is_not_waited_for() -> None:
    jetson = Cooling(64.0)
    jetson.settle(threads=8)
    assert jetson.slept == []

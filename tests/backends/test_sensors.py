"""What the machine says of itself, from files as Linux and a Jetson have them."""

from pathlib import Path

import pytest

from dilap.backends import sensors

FILES = {
    "devices/system/cpu/cpu0/cpufreq/scaling_governor": "schedutil",
    "devices/system/cpu/cpufreq/policy0/scaling_cur_freq": "1510400",
    "devices/system/cpu/cpufreq/policy0/scaling_min_freq": "729600",
    "devices/system/cpu/cpufreq/policy0/scaling_max_freq": "1510400",
    "class/devfreq/17000000.gpu/cur_freq": "918000000",
    "class/devfreq/17000000.gpu/min_freq": "1020000000",
    "class/devfreq/17000000.gpu/max_freq": "1020000000",
    "class/thermal/thermal_zone0/type": "cpu-thermal",
    "class/thermal/thermal_zone0/temp": "48125",
    "class/thermal/thermal_zone1/type": "cv0-thermal",
    "class/thermal/thermal_zone1/temp": "-256000",
    "class/hwmon/hwmon1/oc1_event_cnt": "3",
    "class/hwmon/hwmon1/oc2_event_cnt": "4",
    "class/power_supply/AC/type": "Mains",
    "class/power_supply/AC/online": "0",
    "class/power_supply/BAT0/type": "Battery",
    "class/power_supply/BAT0/capacity": "77",
}


@pytest.fixture
def sysfs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, text in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    monkeypatch.setattr(sensors, "_SYS", tmp_path)
    return tmp_path


@pytest.mark.usefixtures("sysfs")
def test_clocks_are_in_khz() -> None:
    assert sensors.state().clocks_khz == {"policy0": 1510400, "17000000.gpu": 918000}


@pytest.mark.usefixtures("sysfs")
def test_a_clock_that_may_have_one_value_only_is_pinned() -> None:
    assert sensors.state().pinned_khz == {"17000000.gpu": 1020000}


@pytest.mark.usefixtures("sysfs")
def test_a_clock_below_what_it_is_pinned_to_is_slow() -> None:
    state = sensors.state()
    assert state.slow_clocks(state.pinned_khz) == ["17000000.gpu"]


@pytest.mark.usefixtures("sysfs")
def test_temperatures_are_in_degrees_and_sensors_that_are_off_are_left_out() -> None:
    assert sensors.state().temperatures_celsius == {"cpu-thermal": 48.125}


@pytest.mark.usefixtures("sysfs")
def test_over_current_events_are_added_up() -> None:
    assert sensors.state().throttle_events == 7


@pytest.mark.usefixtures("sysfs")
def test_power_and_battery_are_read() -> None:
    assert (sensors.state().ac_power, sensors.state().battery_percent) == (False, 77.0)


@pytest.mark.usefixtures("sysfs")
def test_the_power_mode_is_the_governor_where_there_is_no_nvpmodel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sensors, "_said", lambda *words: "")
    assert sensors.power_mode() == "schedutil"


def test_the_power_mode_of_a_jetson_is_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sensors, "_said", lambda *words: "NV Power Mode: MAXN_SUPER\n2\n" * (words[0] == "nvpmodel"))
    assert sensors.power_mode() == "MAXN_SUPER"


def test_the_power_mode_of_windows_is_the_schemes_name(monkeypatch: pytest.MonkeyPatch) -> None:
    words = "Power Scheme GUID: 8c5e7fda-e8bf-4a96-9a85-a6e23a8c635c  (High performance)\n"
    monkeypatch.setattr(sensors, "_said", lambda *argv: words * (argv[0] == "powercfg"))
    assert sensors.power_mode() == "High performance"


def test_a_machine_that_says_nothing_has_no_readings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sensors, "_SYS", tmp_path)
    state = sensors.state()
    assert (state.clocks_khz, state.temperatures_celsius, state.throttle_events, state.ac_power) == ({}, {}, None, None)

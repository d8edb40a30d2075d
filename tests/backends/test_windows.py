"""What Windows is asked, through a kernel32 that writes down how it was called."""

import ctypes
import sysconfig
from types import SimpleNamespace
from typing import Any

import pytest

from dilap.backends import host, windows


class Kernel32:
    """Of a laptop with an ARM64 processor, at 77 % and on battery."""

    def __init__(self) -> None:
        self.throttling: tuple[int, ...] = ()
        self.mask = 0

    def GetSystemPowerStatus(self, status: Any) -> int:  # noqa: N802
        status[0], status[2] = 0, 77
        return 1

    def IsWow64Process2(self, process: ctypes.c_void_p, kind: Any, native: Any) -> int:  # noqa: N802
        kind._obj.value, native._obj.value = 0, 0xAA64
        return 1

    def SetProcessInformation(self, process: ctypes.c_void_p, what: int, state: Any, size: int) -> int:  # noqa: N802
        self.throttling = (what, state._obj.version, state._obj.control, state._obj.state, size)
        return 1

    def SetProcessAffinityMask(self, process: ctypes.c_void_p, mask: ctypes.c_size_t) -> int:  # noqa: N802
        self.mask = mask.value
        return 1

    def K32GetProcessMemoryInfo(self, process: ctypes.c_void_p, counters: Any, size: int) -> int:  # noqa: N802
        assert size == counters._obj.size == 72
        counters._obj.peak, counters._obj.resident = 9 << 20, 7 << 20
        return 1


@pytest.fixture
def kernel32(monkeypatch: pytest.MonkeyPatch) -> Kernel32:
    made = Kernel32()
    monkeypatch.setattr(ctypes, "windll", SimpleNamespace(kernel32=made), raising=False)
    return made


@pytest.mark.usefixtures("kernel32")
def test_power_and_battery_are_read() -> None:
    assert windows.power() == (False, 77.0)


@pytest.mark.usefixtures("kernel32")
@pytest.mark.parametrize(("platform", "emulated"), [("win-arm64", False), ("win-amd64", True)])
def test_a_python_of_another_processor_is_emulated(
    monkeypatch: pytest.MonkeyPatch, platform: str, emulated: bool
) -> None:
    monkeypatch.setattr(sysconfig, "get_platform", lambda: platform)
    assert windows.is_emulated() is emulated


def test_full_speed_clears_the_throttling_of_execution_speed(kernel32: Kernel32) -> None:
    windows.ask_full_speed()
    version, control, state = 1, 1, 0
    size = 3 * ctypes.sizeof(ctypes.c_ulong)
    assert kernel32.throttling == (4, version, control, state, size)


@pytest.mark.usefixtures("kernel32")
def test_the_memory_of_a_process_is_its_working_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "win32")
    assert host.memory_use() == host.MemoryUse(peak_bytes=9 << 20, resident_bytes=7 << 20)


def test_cores_are_chosen_by_a_mask(kernel32: Kernel32) -> None:
    assert windows.pin(0xF0)
    assert kernel32.mask == 0xF0

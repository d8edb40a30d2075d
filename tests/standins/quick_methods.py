"""Every method with settings that take a moment."""

from collections.abc import Mapping

from dilap import methods
from dilap.search.method import Method
from dilap.search.network_task import NetworkMethod

# Small enough for tests where the published settings would train for minutes.
QUICK: Mapping[str, dict[str, str]] = {
    "llm_streamline": {"steps": "10"},
    "loraprune": {"steps": "12"},
    "compresso": {"steps": "12"},
    "ziplm": {"starts": "5", "failures": "2"},
    "halp": {"rounds": "8", "steps": "1"},
}
NAMES = [name for name in methods.METHODS if name not in ("equal_widths", "quantise")]


def method(name: str) -> Method:
    found: Method = methods.get(name, QUICK.get(name, {}))
    return found


def network_method(name: str) -> NetworkMethod:
    found: NetworkMethod = methods.get(name, QUICK.get(name, {}), table=methods.NETWORK_METHODS)
    return found

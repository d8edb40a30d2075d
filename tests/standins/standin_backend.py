"""A stand-in runtime for tests: a run takes as many nanoseconds as the model file has bytes, on nobody's clock."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dilap.core.rules import Capabilities, NetworkCapabilities
from dilap.core.shape import Architecture
from dilap.core.workload import Workload


class StandIn:
    """Travels to a device in the place of a real runtime."""

    name = "standin"
    format = "standin"
    load_seconds = 60.0
    shares_threads = False
    lossy_switches: frozenset[str] = frozenset()

    def unavailable(self) -> str | None:
        return None

    def version(self) -> str:
        return "stand-in"

    def build(self) -> str:
        return "none"

    def precisions(self) -> tuple[str, ...]:
        return ("f32",)

    def network_precisions(self) -> tuple[str, ...]:
        return ("f32",)

    def switches(self) -> dict[str, tuple[str, ...]]:
        return {}

    def how_to_run(self, file: str, workload: Workload) -> dict[str, str]:
        return {}

    def cache_bits(self, workload: Workload) -> float:
        return 16.0

    def after_a_crash(self) -> str:
        return "try another"

    def capabilities(self, architecture: Architecture, *, precision: str) -> Capabilities:
        return Capabilities()

    def network_capabilities(self, *, precision: str) -> NetworkCapabilities:
        return NetworkCapabilities()

    def load(self, path: Path, workload: Workload) -> Any:
        return StandInSession(path.stat().st_size)


class StandInSession:
    """One model."""

    def __init__(self, nanoseconds: int) -> None:
        self._nanoseconds = nanoseconds

    def sample(self) -> int:
        return self._nanoseconds

    def logits(self, token_ids: Sequence[int], *, incremental: bool) -> Any:
        raise NotImplementedError

    def close(self) -> None:
        """Nothing is open."""

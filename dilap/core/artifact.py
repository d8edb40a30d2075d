"""A model file in a runtime's format, as its sidecar describes it."""

from dataclasses import dataclass, field
from typing import Any

from dilap.core.documents import is_plain_name
from dilap.core.shape import Architecture


@dataclass(frozen=True, kw_only=True)
class HowToRun:
    """The configuration in which a model file was measured, and how the stock runtime runs it in that configuration:
    commands, calls and environment variables by the name of the program or language."""

    work: str
    threads: int
    switches: dict[str, str]
    commands: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """A model file in a runtime's format; written beside it as a JSON sidecar. `path` is relative to the sidecar.

    `companions` are the files beside it that the runtime reads too, by name, with their SHA-256; `sha256` is that of
    `path` alone, `num_bytes` counts all of them. `run` is there where the file's latency was measured.
    """

    path: str
    format: str
    backend: str
    precision: str
    plan_digest: str
    architecture: Architecture
    sha256: str
    num_bytes: int
    sqnr_db: float | None
    companions: dict[str, str] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if odd := next((name for name in (self.path, *self.companions) if not is_plain_name(name)), None):
            raise ValueError(f"{odd!r:.80} is no name of a file beside the sidecar")
        if self.num_bytes < 0:
            raise ValueError(f"{self.num_bytes} bytes")

    run: HowToRun | None = None

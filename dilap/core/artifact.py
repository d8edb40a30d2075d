"""The description of a model file in a runtime's format, which is kept beside the file as JSON (its sidecar)."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from dilap.core.documents import is_plain_name
from dilap.core.errors import Unsupported
from dilap.core.network_input import NetworkInput
from dilap.core.shape import Architecture


@dataclass(frozen=True, kw_only=True)
class HowToRun:
    """The configuration in which a model file was measured, and how the stock runtime runs it in that configuration.

    `work` describes the workload in words; `commands` has commands, calls and environment variables by the name of the
    program or language.
    """

    work: str
    threads: int
    switches: dict[str, str]
    commands: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """A model file in a runtime's format, with what has to be known of it; written beside the file as a JSON sidecar.

    `path` is relative to the sidecar. `companions` are other files beside it that the runtime reads, by name, with
    their SHA-256; `sha256` is that of `path` alone, `num_bytes` counts all files. `precisions` has, by name, those of
    the parts that were given one of their own (see `dilap.core.precisions`). `run` is set only where the latency of the
    file was measured. A decoder has an `architecture`, any other network an `input`; the other one is None.
    """

    VERSION: ClassVar[int] = 2  # 1 was of decoders alone, with every part in the artifact's precision

    path: str
    format: str
    backend: str
    precision: str
    plan_digest: str
    architecture: Architecture | None
    sha256: str
    num_bytes: int
    sqnr_db: float | None
    companions: dict[str, str] = field(default_factory=dict)
    precisions: dict[str, str] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    run: HowToRun | None = None
    input: NetworkInput | None = None

    def __post_init__(self) -> None:
        if odd := next((name for name in (self.path, *self.companions) if not is_plain_name(name)), None):
            raise ValueError(f"{odd!r:.80} is no name of a file beside the sidecar")
        if self.num_bytes < 0:
            raise ValueError(f"{self.num_bytes} bytes")
        if (self.architecture is None) == (self.input is None):
            raise ValueError("an artifact has the architecture of a decoder or the input of another network")

    @property
    def decoder(self) -> Architecture:
        """The shape of a decoder. Raises Unsupported for another network."""
        if self.architecture is None:
            raise Unsupported(f"{self.path} is no decoder, and one is needed here")
        return self.architecture

"""The host's end of the agent's protocol."""

import itertools
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from dilap import backends, codec, errors
from dilap.errors import DilapError
from dilap.profilers.transports import Transport
from dilap.types import Fingerprint, Workload

_TIMEOUT_SECONDS = 300.0  # of all but a load, which has its runtime's own: TensorRT may build an engine for an hour
# /proc/stat counts in ticks of 10 ms per core: less than this is indistinguishable from nothing
_TICK_SLACK_SECONDS = 0.02


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A model that the agent holds open."""

    handle: int
    load_seconds: float
    peak_memory_bytes: int


class AgentClient:
    """A running agent. Its failures are raised here as the error they were there."""

    def __init__(self, transport: Transport, *, backend: str, device: str) -> None:
        self._transport = transport
        self._seq = itertools.count(1)
        self._load_seconds = backends.get(backend).load_seconds
        self._process = transport.start([*transport.python, "-m", "dilap.backends.agent"])
        try:
            hello = self.call("hello", backend=backend, device=device)
        except DilapError:
            self._process.close()
            raise
        self.fingerprint: Fingerprint = codec.decode(Fingerprint, hello["fingerprint"], source="the agent's hello")

    def load(
        self, path: str, *, sha256: str, workload: Workload, companions: Mapping[str, str] | None = None
    ) -> Loaded:
        """Open a model; `companions` are the files that lie beside it there, with their SHA-256."""
        fields = {"path": path, "sha256": sha256, "companions": companions or {}}
        return Loaded(**self.call("load", timeout=self._load_seconds, workload=codec.encode(workload), **fields))

    def unload(self, handle: int) -> None:
        self.call("unload", handle=handle)

    def call(self, operation: str, *, timeout: float = _TIMEOUT_SECONDS, **fields: Any) -> dict[str, Any]:
        """One request and its response. Raises what the agent raised, and Unavailable where it is gone."""
        seq = next(self._seq)
        line = json.dumps({"seq": seq, "op": operation, **fields})
        response: dict[str, Any] = json.loads(self._process.request(line, timeout=timeout))
        if "error" in response:
            raise _as_error(response["error"])
        assert response.pop("seq") == seq
        return response

    def close(self) -> None:
        self._process.close()

    def __enter__(self) -> "AgentClient":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _as_error(error: Mapping[str, str]) -> DilapError:
    kind = getattr(errors, error["type"], DilapError)
    return kind(error["message"]) if issubclass(kind, DilapError) else DilapError(error["message"])


class AgentBench:
    """The models an agent holds, as the measuring loop wants them."""

    def __init__(self, client: AgentClient, handles: Sequence[int]) -> None:
        self._client, self._handles = client, handles
        self._seconds = self._other_seconds = 0.0

    def sample(self, case: int, count: int) -> Sequence[int]:
        answer = self._client.call("sample", handle=self._handles[case], n=count)
        self._seconds += answer["seconds"]
        self._other_seconds += answer["other_seconds"] or 0.0
        samples: list[int] = answer["samples_ns"]
        return samples

    def other_load(self) -> float:
        load = max(0.0, self._other_seconds - _TICK_SLACK_SECONDS) / self._seconds if self._seconds else 0.0
        self._seconds = self._other_seconds = 0.0
        return load

    def now(self) -> float:
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

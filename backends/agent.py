"""The part that runs on the device: `python -m dilap.backends.agent`.

It speaks JSON lines over stdin and stdout: one request, one response with the same `seq`. It keeps all models
of an interleaved measurement open in one process, because the threads of idle runtimes spin for a while after
each run and would disturb one another across processes. End of input ends it.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

from dilap import __version__, backends, codec
from dilap.backends import host
from dilap.errors import DilapError, InvalidInput, Mismatch, Unavailable
from dilap.types import Workload


class Agent:
    """The open sessions and the operations on them; every `op_` method answers one request."""

    def __init__(self) -> None:
        self._backend: backends.Backend | None = None
        self._sessions: dict[int, backends.Session] = {}
        self._num_loaded = 0
        self._resident_before: dict[int, int] = {}
        self._last_sampled: int | None = None

    def answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The response to one request; a failure is part of the response."""
        seq = request.get("seq")
        operation: Callable[..., dict[str, Any]] | None = getattr(self, f"op_{request.get('op')}", None)
        fields = {key: value for key, value in request.items() if key not in ("seq", "op")}
        try:
            if operation is None:
                raise InvalidInput(f"the agent knows no operation {request.get('op')!r}")  # noqa: TRY301
            return {"seq": seq, **operation(**fields)}
        except Exception as error:  # whatever a runtime raises, the host must hear of it
            kind = type(error).__name__
            message = str(error) if isinstance(error, DilapError) else f"{kind}: {error}"
            return {"seq": seq, "error": {"type": kind, "message": message}}

    def op_hello(self, *, backend: str, device: str) -> dict[str, Any]:
        """Choose the runtime; answers who and what is here."""
        chosen = backends.get(backend)
        if reason := chosen.unavailable():
            raise Unavailable(reason)
        self._backend = chosen
        return {"dilap": __version__, "fingerprint": codec.encode(host.fingerprint(chosen, device=device))}

    def op_load(
        self, *, path: str, sha256: str, workload: Mapping[str, Any], companions: Mapping[str, str] | None = None
    ) -> dict[str, Any]:
        """Open a model and run it once; `peak_memory_bytes` is what it added to this process until then.

        `companions` are the other files that the runtime reads, by their names beside it, with their SHA-256.
        """
        if self._backend is None:
            raise InvalidInput("load came before hello")
        _require_content(Path(path), sha256)
        for name, digest in (companions or {}).items():
            _require_content(Path(path).with_name(name), digest)
        host.reset_peak_memory_()
        before = host.memory_use().resident_bytes
        start = time.perf_counter()
        session = self._backend.load(Path(path), codec.decode(Workload, workload, source="load request"))
        session.sample()
        self._num_loaded += 1
        self._sessions[self._num_loaded] = session
        self._resident_before[self._num_loaded] = before
        return {
            "handle": self._num_loaded,
            "load_seconds": time.perf_counter() - start,
            "peak_memory_bytes": max(0, host.memory_use().peak_bytes - before),
        }

    def op_sample(self, *, handle: int, n: int) -> dict[str, Any]:
        """Time a model `n` times; also the CPU seconds that other processes took meanwhile."""
        session = self._session(handle)
        if handle != self._last_sampled:
            session.sample()  # untimed: the first run after another model's takes up to twice as long
            self._last_sampled = handle
        clock = host.BusyClock()
        samples = [session.sample() for _ in range(n)]
        seconds, other_seconds = clock.lap()
        return {"samples_ns": samples, "seconds": seconds, "other_seconds": other_seconds}

    def op_watch_memory(self, *, handle: int, n: int) -> dict[str, Any]:
        """Run a model `n` times, untimed; the memory that it adds to this process on average meanwhile."""
        session = self._session(handle)
        with host.MemoryWatch() as watch:
            for _ in range(n):
                session.sample()
        return {"average_bytes": max(0, round(watch.average_bytes) - self._resident_before[handle])}

    def op_memory(self) -> dict[str, Any]:
        """The whole process's memory."""
        use = host.memory_use()
        return {
            "peak_bytes": use.peak_bytes,
            "anonymous_bytes": use.anonymous_bytes,
            "file_bytes": use.file_bytes,
        }

    def op_unload(self, *, handle: int) -> dict[str, Any]:
        self._session(handle).close()
        del self._sessions[handle]
        return {}

    def op_bye(self) -> dict[str, Any]:
        for handle in list(self._sessions):
            self.op_unload(handle=handle)
        return {}

    def _session(self, handle: int) -> backends.Session:
        if handle not in self._sessions:
            raise InvalidInput(f"no model is loaded under handle {handle}")
        return self._sessions[handle]


def _require_content(path: Path, sha256: str) -> None:
    if not path.is_file():
        raise InvalidInput(f"{path}: no such file")
    if codec.file_sha256(path) != sha256:
        raise Mismatch(f"{path}: its content is not the one that was sent (sha256 differs from {sha256[:12]})")


def serve(requests: IO[str], responses: IO[str]) -> None:
    """Answer until `bye` or the end of the requests."""
    agent = Agent()
    for line in requests:
        try:
            request = json.loads(line)
            if not isinstance(request, dict):
                raise TypeError("a request is an object")  # noqa: TRY301
        except (ValueError, TypeError) as error:
            request = {"op": f"unreadable ({error})"}
        responses.write(json.dumps(agent.answer(request)) + "\n")
        responses.flush()
        if request.get("op") == "bye":
            return
    agent.op_bye()


def main() -> None:
    # native libraries print to descriptor 1: the protocol moves to a copy, and the name 1 becomes stderr
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as responses:
        os.dup2(2, 1)
        serve(sys.stdin, responses)


if __name__ == "__main__":
    main()

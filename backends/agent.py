"""The agent: the program that runs on a device and times models there (`python -m dilap.backends.agent`).

It reads requests from stdin and writes responses to stdout, each a JSON object on one line. Every request gets one
response with the same `seq`; the first request is `hello`:

    {"seq": 1, "op": "hello", "backend": "llamacpp", "device": "jetson_cpu"}

All models that are measured in turns are open in this one process: the threads of an idle runtime spin for a while
after each run, and would disturb the models of other processes. The agent ends when its input ends, whatever it is
doing then.
"""

import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from dilap import __version__, backends
from dilap.backends import host, sensors, windows
from dilap.core import codec
from dilap.core.documents import parse_object
from dilap.core.errors import InvalidInput, Mismatch, Unavailable, reason_of
from dilap.core.sqnr import kl_divergence
from dilap.core.workload import Workload

_GRACE_SECONDS = 3.0  # a run that is under way when the requests end may go on for so long
_IDLE_SECONDS = 900.0  # the host never pauses so long between two requests: the link to it was lost


class Agent:
    """Holds the open models and answers requests: the method `op_NAME` answers those whose `op` is NAME."""

    def __init__(self) -> None:
        self._backend: backends.Backend | None = None
        self._sessions: dict[int, backends.Session] = {}
        self._num_loaded = 0
        self._resident_before: dict[int, int] = {}
        self._last_sampled: int | None = None
        self.idle_seconds = _IDLE_SECONDS  # how long it waits for the next request

    def answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Return the response to one request; an error is reported in the response and never raised."""
        seq, self.idle_seconds = request.get("seq"), _IDLE_SECONDS
        operation: Callable[..., dict[str, Any]] | None = getattr(self, f"op_{request.get('op')}", None)
        fields = {key: value for key, value in request.items() if key not in ("seq", "op")}
        try:
            if operation is None:
                raise InvalidInput(f"the agent knows no operation {request.get('op')!r}")  # noqa: TRY301
            return {"seq": seq, **operation(**fields)}
        except Exception as error:  # whatever a runtime raises, the host must hear of it
            return {"seq": seq, **_refusal(error)}

    def op_hello(self, *, backend: str, device: str, affinity: str | None = None) -> dict[str, Any]:
        """Choose the runtime, and the cores to run on (`affinity`, a hexadecimal mask).

        The response has DiLAP's version and the fingerprint of this machine and the runtime.
        """
        if affinity is not None:
            host.pin(affinity)  # before the runtime has threads
        if sys.platform == "win32":
            windows.ask_full_speed()
        chosen = backends.get(backend)
        if reason := chosen.unavailable():
            raise Unavailable(reason)
        self._backend = chosen
        return {"dilap": __version__, "fingerprint": codec.encode(host.fingerprint(chosen, device=device))}

    def op_load(
        self, *, path: str, sha256: str, workload: Mapping[str, Any], companions: Mapping[str, str] | None = None
    ) -> dict[str, Any]:
        """Open a model and run it once. Raises Mismatch where a file's content is not the one that was sent.

        `companions` are the other files that the runtime reads, which lie beside the model (name -> SHA-256). In the
        response, `peak_memory_bytes` is what loading and running the model added to this process at the peak, and what
        it takes of a GPU's memory beside.
        """
        if self._backend is None:
            raise InvalidInput("load came before hello")
        _require_content(Path(path), sha256)
        for name, digest in (companions or {}).items():
            _require_content(Path(path).with_name(name), digest)
        wanted = codec.decode(Workload, workload, source="load request")
        backends.require_switches(self._backend, wanted)
        host.reset_peak_memory_()
        before = host.memory_use().resident_bytes
        start = time.perf_counter()
        session = self._backend.load(Path(path), wanted)
        session.sample()
        self._num_loaded += 1
        self._sessions[self._num_loaded] = session
        self._resident_before[self._num_loaded] = before
        return {
            "handle": self._num_loaded,
            "load_seconds": time.perf_counter() - start,
            "peak_memory_bytes": max(0, host.memory_use().peak_bytes - before) + _device_bytes(session),
        }

    def op_sample(self, *, handle: int, n: int, lead_in_seconds: float = 0.0) -> dict[str, Any]:
        """Time a model `n` times; after another model's turn it is first run untimed for `lead_in_seconds`.

        The response has the times (`samples_ns`), the CPU seconds that other processes used in the `seconds` meanwhile
        (`other_seconds`), and where the times are a GPU's, those that the host saw (`host_ns`).
        """
        session = self._session(handle)
        if handle != self._last_sampled:
            _lead_in(session, lead_in_seconds)
            self._last_sampled = handle
        clock = host.BusyClock()
        samples = [session.sample() for _ in range(n)]
        seconds, other_seconds = clock.lap()
        host_ns = getattr(session, "host_ns", [])[-n:]
        return {"samples_ns": samples, "host_ns": host_ns, "seconds": seconds, "other_seconds": other_seconds}

    def op_watch_memory(self, *, handle: int, n: int) -> dict[str, Any]:
        """Run a model `n` times, untimed, and respond with the memory that it adds to this process on average."""
        session = self._session(handle)
        with host.MemoryWatch() as watch:
            for _ in range(n):
                session.sample()
        added = max(0, round(watch.average_bytes) - self._resident_before[handle])
        return {"average_bytes": added + _device_bytes(session)}

    def op_divergence(self, *, handle: int, other: int, tokens: list[int]) -> dict[str, Any]:
        """Compare the next-token distributions of the models `other` and `handle` on the given tokens.

        The response has the mean KL divergence over the tokens, in nats.
        """
        model, changed = (self._session(one).logits(tokens, incremental=True) for one in (handle, other))
        return {"kl": kl_divergence(model, changed)}

    def op_state(self) -> dict[str, Any]:
        """Respond with the machine's clocks, temperatures and power: asked between timed runs, never during them."""
        return {"state": codec.encode(sensors.state())}

    def op_expect(self, *, seconds: float) -> dict[str, Any]:
        """Wait for the next request so long, if that is longer than usual: the host copies a model meanwhile."""
        self.idle_seconds = max(_IDLE_SECONDS, seconds)
        return {}

    def op_bye(self) -> dict[str, Any]:
        """Close all models."""
        while self._sessions:
            self._sessions.popitem()[1].close()
        return {}

    def _session(self, handle: int) -> backends.Session:
        if handle not in self._sessions:
            raise InvalidInput(f"no model is loaded under handle {handle}")
        return self._sessions[handle]


def _lead_in(session: backends.Session, seconds: float) -> None:
    """Run a model untimed, once at least: the first run after another model's takes up to twice as long."""
    end = time.perf_counter() + seconds
    while True:
        session.sample()
        if time.perf_counter() >= end:
            return


def _device_bytes(session: backends.Session) -> int:
    """Return the memory of a GPU that a model takes: it is no part of its process's."""
    return int(getattr(session, "device_bytes", 0))


def _refusal(error: Exception) -> dict[str, Any]:
    return {"error": {"type": type(error).__name__, "message": reason_of(error)}}


def _require_content(path: Path, sha256: str) -> None:
    if not path.is_file():
        raise InvalidInput(f"{path}: no such file")
    if codec.file_sha256(path) != sha256:
        raise Mismatch(f"{path}: its content is not the one that was sent (sha256 differs from {sha256[:12]})")


def serve(agent: Agent, requests: Iterable[str], responses: IO[str]) -> None:
    """Let `agent` answer requests until one of them is `bye` or they end."""
    for line in requests:
        try:
            request = parse_object(line, source="the request")
        except InvalidInput as error:
            request = {"op": f"unreadable ({error})"}
        responses.write(_line(agent.answer(request)) + "\n")
        responses.flush()
        if request.get("op") == "bye":
            return
    agent.op_bye()


def _line(answer: Mapping[str, Any]) -> str:
    try:
        return codec.to_json(answer, indent=None)
    except InvalidInput as error:  # the answer holds NaN
        return codec.to_json({"seq": answer["seq"], **_refusal(error)}, indent=None)


def received(requests: IO[str], *, idle_seconds: Callable[[], float | None]) -> Iterator[str]:
    """Yield the lines of `requests`, which a thread reads so that their end is noticed while one is being answered.

    When they end, nobody waits for results any more: this process is killed `_GRACE_SECONDS` later if it still runs.
    The lines also end when none came for `idle_seconds()`, because a link may be lost without an end of the input; None
    waits for ever.
    """
    lines: queue.Queue[str] = queue.Queue()

    def read() -> None:
        for line in requests:
            lines.put(line)
        lines.put("")
        time.sleep(_GRACE_SECONDS)
        _end_group()

    threading.Thread(target=read, daemon=True).start()
    try:
        while line := lines.get(timeout=idle_seconds()):
            yield line
    except queue.Empty:
        return


def _end_group() -> None:
    """Kill this process, whatever it is loading or timing, and where it leads its process group, the whole group.

    On a remote device with a POSIX shell it does not lead: the script that started it there
    (`dilap.profilers.links.shells`) kills the group as soon as this process has ended.
    """
    if hasattr(os, "killpg") and os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


def main() -> None:
    # Native libraries print to descriptor 1, so the responses go to a copy of it, and 1 itself becomes stderr.
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as responses:
        os.dup2(2, 1)
        agent = Agent()
        serve(agent, received(sys.stdin, idle_seconds=lambda: agent.idle_seconds), responses)


if __name__ == "__main__":
    main()

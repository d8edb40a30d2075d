"""The host's end of the agent: starts it on a device, sends it requests and checks its responses."""

import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, TypeVar

from dilap import backends
from dilap.backends.child import obituary, python_environment
from dilap.core import codec, errors
from dilap.core.documents import parse_object
from dilap.core.errors import DilapError, InvalidInput, LinkLost
from dilap.core.measurement import DeviceState, Fingerprint
from dilap.core.printable import printable_values
from dilap.core.workload import Workload
from dilap.profilers.instruments.archive import agent_archive
from dilap.profilers.links.ssh import BYTES_PER_SECOND
from dilap.profilers.links.store import Files
from dilap.profilers.links.transports import PipedProcess, Process, Transport, copy_seconds

T = TypeVar("T")
_TIMEOUT_SECONDS = 300.0  # except for loads, whose limit is the runtime's: TensorRT may build an engine for an hour
_SESSION_SECONDS = 24 * 3600.0  # the longest life of an agent whose link was lost without a sign
_COPIES = 3  # of a model, until it is there whole: a link may break
_MAX_NOISE_LINES = 200  # lines that a login shell may print before the agent's first answer
_THROTTLING = 2  # Android's thermal status: moderate, where clocks are lowered
# /proc/stat counts in ticks of 10 ms per core: less than this is indistinguishable from nothing
_TICK_SLACK_SECONDS = 0.02


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A model that a device holds open."""

    handle: int
    load_seconds: float
    peak_memory_bytes: int

    def __post_init__(self) -> None:
        if self.load_seconds < 0 or self.peak_memory_bytes < 0:
            raise ValueError(f"negative seconds or bytes in {self}")


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """Timed runs. They lasted `seconds`, in which other processes used `other_seconds` of CPU time (None: unknown).

    `host_ns` are the host's times of the same runs, where `samples_ns` are a GPU's.
    """

    samples_ns: tuple[int, ...]
    seconds: float
    other_seconds: float | None
    host_ns: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if min((*self.samples_ns, *self.host_ns), default=1) <= 0 or self.seconds < 0:
            raise ValueError("times that are not positive")


class Instrument(Protocol):
    """A device that is ready to time models in one runtime."""

    fingerprint: Fingerprint

    def load(
        self, path: Path, *, sha256: str, workload: Workload, companions: Mapping[str, str] | None = None
    ) -> Loaded:
        """Bring a model to the device and open it; `companions` lie beside it (name -> SHA-256)."""

    def sample(self, handle: int, count: int, *, lead_in_seconds: float = 0.0) -> Sampled:
        """Time a model `count` times; after another model's turn it is first run untimed for `lead_in_seconds`."""

    def average_memory(self, handle: int, runs: int) -> int | None:
        """Return the average bytes that a model takes while it runs `runs` times; None where that cannot be seen."""

    def divergence(self, handle: int, other: int, tokens: Sequence[int]) -> float | None:
        """Return how far the next-token distributions of two models differ on `tokens`.

        It is the mean KL, in nats per token, of the model `other` from the model `handle`; None where the device does
        not show logits.
        """

    def state(self) -> DeviceState:
        """Return the clocks, temperatures and power as they are now."""

    def close(self) -> None:
        """End what runs on the device, and leave it."""


class Connection(Protocol):
    """A way to a machine with a Python: its files, and DiLAP's agent there."""

    files: Files

    def start_agent(self) -> Process:
        """Start the agent."""

    def close(self) -> None:
        """End the connection."""


class InPlace:
    """The `Files` of this machine, where nothing has to be copied."""

    def place(self, path: Path, *, sha256: str, companions: Mapping[str, str]) -> str:  # noqa: ARG002
        return str(path.resolve())


class LocalConnection:
    """A connection to the machine that DiLAP runs on."""

    files: Files = InPlace()

    def start_agent(self) -> Process:
        argv = [sys.executable, "-m", "dilap.backends.agent"]
        return PipedProcess(argv, name="the program", environment=python_environment(), is_local=True)

    def close(self) -> None:
        pass


class RemoteConnection:
    """A connection to a machine over a transport; the agent is copied there as one file."""

    def __init__(self, transport: Transport, *, files: Files, python: str) -> None:
        self._transport, self._python = transport, python
        self.files = files

    def start_agent(self) -> Process:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "dilap-agent.pyz"
            path.write_bytes(agent_archive())
            place = self.files.place(path, sha256=codec.file_sha256(path), companions={})
        return self._transport.start([self._python, place], seconds=_SESSION_SECONDS)

    def close(self) -> None:
        self._transport.close()


class AgentClient:
    """A running agent, as an instrument. Errors of the agent are raised here with the type that they had there."""

    def __init__(self, connection: Connection, *, backend: str, device: str, affinity: str | None = None) -> None:
        self._connection = connection
        self._seq = itertools.count(1)
        self._backend = backend
        self._load_seconds = backends.get(backend).load_seconds
        self._heard = False
        try:
            self._process = connection.start_agent()
        except DilapError:
            connection.close()
            raise
        try:
            hello = self.call("hello", backend=backend, device=device, affinity=affinity)
            self.fingerprint = _document(Fingerprint, hello, "fingerprint")
        except DilapError:
            self.close()
            raise

    def load(
        self, path: Path, *, sha256: str, workload: Workload, companions: Mapping[str, str] | None = None
    ) -> Loaded:
        beside = dict(companions or {})
        files = [path.with_name(name) for name in (path.name, *beside)]
        num_bytes = sum(one.stat().st_size for one in files if one.is_file())
        self.call("expect", seconds=_COPIES * copy_seconds(num_bytes, bytes_per_second=BYTES_PER_SECOND))
        place = self._connection.files.place(path, sha256=sha256, companions=beside)
        fields = {"path": place, "sha256": sha256, "companions": beside}
        answer = self.call("load", timeout=self._load_seconds, workload=codec.encode(workload), **fields)
        return _checked(Loaded, answer)

    def sample(self, handle: int, count: int, *, lead_in_seconds: float = 0.0) -> Sampled:
        return _checked(Sampled, self.call("sample", handle=handle, n=count, lead_in_seconds=lead_in_seconds))

    def average_memory(self, handle: int, runs: int) -> int | None:
        return _checked(int, self.call("watch_memory", handle=handle, n=runs).get("average_bytes"))

    def divergence(self, handle: int, other: int, tokens: Sequence[int]) -> float | None:
        return _checked(float, self.call("divergence", handle=handle, other=other, tokens=list(tokens)).get("kl"))

    def state(self) -> DeviceState:
        return _document(DeviceState, self.call("state"), "state")

    def call(self, operation: str, *, timeout: float = _TIMEOUT_SECONDS, **fields: Any) -> dict[str, Any]:
        """Send a request and return its response. Raises what the agent raised; Crashed or LinkLost if it is gone."""
        seq = next(self._seq)
        try:
            self._process.write(json.dumps({"seq": seq, "op": operation, **fields}) + "\n")
            response = self._response(seq, timeout=timeout)
        except LinkLost:
            if (status := self._process.status_of_death()) is None:
                raise
            doing = f"its agent answered {operation!r}"
            raise obituary(self._backend, status, doing) from None
        if "error" in response:
            raise _as_error(response["error"])
        return response

    def close(self) -> None:
        self._process.close()
        self._connection.close()

    def __enter__(self) -> "AgentClient":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _response(self, seq: int, *, timeout: float) -> dict[str, Any]:
        """Return the answer to request `seq`. A login shell may print lines before the first; later they are errors."""
        for _ in range(_MAX_NOISE_LINES):
            line = self._process.read_line(timeout=timeout)
            response = _object(line)
            if type(number := response.pop("seq", None)) is int and number == seq:
                self._heard = True
                return response
            if self._heard:
                break
        raise LinkLost(f"the device sent {line[:80]!r}, which is not an answer of the agent; try again")


def _object(line: str) -> dict[str, Any]:
    """Return the JSON object on a line, with its texts made printable; an empty one where the line holds none."""
    try:
        found: dict[str, Any] = printable_values(parse_object(line, source="the line"))
    except InvalidInput:
        return {}
    return found


def _checked(hint: type[T], answer: Any) -> T:
    """Return `answer` as the type `hint`. Raises LinkLost where the device answered something else."""
    try:
        return codec.checked(hint, answer, source="the device sent another answer than the agent gives")
    except InvalidInput as error:
        raise LinkLost(f"{error}; try again") from error


def _document(kind: type[T], answer: Mapping[str, Any], name: str) -> T:
    try:
        return codec.decode(kind, answer.get(name), source="the agent's answer")
    except InvalidInput as error:
        raise LinkLost(f"{error}; try again") from error


def _as_error(said: Any) -> DilapError:
    error = _checked(dict[str, str], said)
    kind = getattr(errors, error.get("type", ""), DilapError)
    is_ours = isinstance(kind, type) and issubclass(kind, DilapError)
    message = error.get("message", "the agent gave no reason")
    return kind(message) if is_ours else DilapError(message)


class InstrumentBench:
    """The `Bench` of the measuring loop, made of the models that an instrument holds open."""

    def __init__(self, instrument: Instrument, handles: Sequence[int], *, lead_in_seconds: float = 0.0) -> None:
        self._instrument, self._handles, self._lead_in_seconds = instrument, handles, lead_in_seconds
        self._seconds = self._other_seconds = 0.0
        self._host_ns: list[list[int]] = [[] for _ in handles]
        state = instrument.state()
        self._throttle_events, self._pinned_khz = state.throttle_events or 0, state.pinned_khz

    def sample(self, case: int, count: int) -> Sequence[int]:
        sampled = self._instrument.sample(self._handles[case], count, lead_in_seconds=self._lead_in_seconds)
        if len(sampled.samples_ns) != count:
            raise LinkLost(f"the device took {len(sampled.samples_ns)} samples where {count} were asked; try again")
        self._seconds += sampled.seconds
        self._other_seconds += sampled.other_seconds or 0.0
        self._host_ns[case].extend(sampled.host_ns)
        return sampled.samples_ns

    def host_seconds(self, case: int) -> float | None:
        """Return the median of the host's times, warm-up included; None where the samples are the host's times."""
        return statistics.median(self._host_ns[case]) / 1e9 if self._host_ns[case] else None

    def other_load(self) -> float:
        load = max(0.0, self._other_seconds - _TICK_SLACK_SECONDS) / self._seconds if self._seconds else 0.0
        self._seconds = self._other_seconds = 0.0
        return load

    def throttles(self) -> bool:
        state = self._instrument.state()
        events, before = state.throttle_events or 0, self._throttle_events
        self._throttle_events = events
        is_slowed = (state.thermal_status or 0) >= _THROTTLING or bool(state.slow_clocks(self._pinned_khz))
        return events > before or is_slowed

    def now(self) -> float:
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

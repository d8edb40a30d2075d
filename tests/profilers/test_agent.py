"""The on-device agent: its operations with a fake runtime, and the real process over its pipes."""

import io
import itertools
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from standins.fabricated import FINGERPRINT, TINY_LAYER, tiny_llama
from standins.standin_backend import StandIn

from dilap import backends, export
from dilap.backends import agent, host
from dilap.core import codec
from dilap.core.errors import InvalidInput, LinkLost, Mismatch, Unavailable
from dilap.core.measurement import DeviceState, Fingerprint
from dilap.core.workload import Workload
from dilap.profilers.devices import device as devices
from dilap.profilers.instruments.agent import AgentClient, InstrumentBench, LocalConnection, Sampled
from dilap.profilers.links.transports import PipedProcess, Process

WORKLOAD = Workload(precision="f32", context=16)


class FakeSession:
    def __init__(self, nanoseconds: int) -> None:
        self.nanoseconds = nanoseconds

    def sample(self) -> int:
        return self.nanoseconds

    def logits(self, token_ids: Sequence[int], *, incremental: bool) -> NDArray[np.float32]:
        raise NotImplementedError

    def close(self) -> None:
        self.nanoseconds = 0


class FakeBackend(StandIn):
    """A file's size in bytes is its latency in microseconds."""

    name = "fake"
    load_seconds = 1.0

    def version(self) -> str:
        return "1"

    def load(self, path: Path, workload: Workload) -> FakeSession:
        if not path.stat().st_size:
            raise InvalidInput(f"{path}: empty")
        return FakeSession(1000 * path.stat().st_size)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> agent.Agent:
    monkeypatch.setattr(backends, "get", lambda name: FakeBackend())
    one = agent.Agent()
    one.answer({"seq": 0, "op": "hello", "backend": "fake", "device": "host_cpu"})
    return one


def loaded(one: agent.Agent, path: Path) -> dict[str, Any]:
    request = {"seq": 1, "op": "load", "path": str(path), "sha256": codec.file_sha256(path)}
    return one.answer({**request, "workload": codec.encode(WORKLOAD)})


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    path.write_bytes(b"seven..")
    return path


def test_a_response_carries_the_seq_of_its_request(served: agent.Agent) -> None:
    assert served.answer({"seq": 41, "op": "state"})["seq"] == 41


def test_samples_come_from_the_loaded_model(served: agent.Agent, model: Path) -> None:
    handle = loaded(served, model)["handle"]
    assert served.answer({"seq": 2, "op": "sample", "handle": handle, "n": 3})["samples_ns"] == [7000, 7000, 7000]


def test_a_model_runs_untimed_after_another_ones_turn(
    served: agent.Agent, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle, runs, clock = loaded(served, model)["handle"], [], itertools.count(step=0.1)
    monkeypatch.setattr(FakeSession, "sample", lambda self: runs.append(1) or self.nanoseconds)  # type: ignore[func-returns-value]
    monkeypatch.setattr("dilap.backends.agent.time.perf_counter", lambda: next(clock))
    for _ in range(2):
        served.answer({"seq": 2, "op": "sample", "handle": handle, "n": 3, "lead_in_seconds": 0.35})
    assert len(runs) == 4 + 3 + 3


def test_a_gpus_samples_come_with_the_hosts_times(served: agent.Agent, model: Path) -> None:
    handle = loaded(served, model)["handle"]
    served._sessions[handle].host_ns = [1, 2, 3, 4]  # type: ignore[attr-defined]
    assert served.answer({"seq": 2, "op": "sample", "handle": handle, "n": 3})["host_ns"] == [2, 3, 4]


def test_memory_that_a_model_takes_of_a_gpu_is_counted_beside_its_process(served: agent.Agent, model: Path) -> None:
    handle = loaded(served, model)["handle"]
    served._sessions[handle].device_bytes = 1 << 40  # type: ignore[attr-defined]
    watched = served.answer({"seq": 2, "op": "watch_memory", "handle": handle, "n": 1})
    assert 1 << 40 <= watched["average_bytes"] < (1 << 40) + (1 << 30)


def test_other_content_than_was_sent_is_a_mismatch(served: agent.Agent, model: Path) -> None:
    request = {"seq": 1, "op": "load", "path": str(model), "sha256": "0" * 64, "workload": codec.encode(WORKLOAD)}
    assert served.answer(request)["error"]["type"] == "Mismatch"


def test_a_model_that_is_not_loaded_is_unknown(served: agent.Agent) -> None:
    error = served.answer({"seq": 4, "op": "sample", "handle": 9, "n": 1})["error"]
    assert (error["type"], "handle 9" in error["message"]) == ("InvalidInput", True)


def test_an_unknown_operation_is_an_error_not_the_end(served: agent.Agent) -> None:
    assert "no operation 'dance'" in served.answer({"seq": 1, "op": "dance"})["error"]["message"]


def test_loading_before_hello_is_refused(model: Path) -> None:
    assert loaded(agent.Agent(), model)["error"]["type"] == "InvalidInput"


def test_a_line_that_is_no_json_is_answered_with_an_error() -> None:
    responses = io.StringIO()
    agent.serve(agent.Agent(), io.StringIO("nonsense\n"), responses)
    assert "unreadable" in json.loads(responses.getvalue())["error"]["message"]


def test_the_agent_waits_for_a_copy_that_it_was_told_of_and_no_longer(served: agent.Agent) -> None:
    usual = served.idle_seconds
    served.answer({"seq": 1, "op": "expect", "seconds": 3 * usual})
    assert served.idle_seconds == 3 * usual
    served.answer({"seq": 2, "op": "state"})
    assert served.idle_seconds == usual


def test_nothing_is_served_after_bye() -> None:
    responses = io.StringIO()
    agent.serve(agent.Agent(), io.StringIO('{"seq": 1, "op": "bye"}\n{"seq": 2, "op": "state"}\n'), responses)
    assert len(responses.getvalue().splitlines()) == 1


def test_the_fingerprint_names_the_machine_and_its_runtime() -> None:
    fingerprint = host.fingerprint(FakeBackend(), device="host_cpu")
    assert (fingerprint.runtime, fingerprint.runtime_version, fingerprint.num_cores >= 1) == ("fake", "1", True)


def test_two_fingerprints_of_one_machine_agree() -> None:
    first, second = (host.fingerprint(FakeBackend(), device="host_cpu") for _ in range(2))
    assert first.differences(second) == []


def test_the_busy_clock_says_none_where_there_is_no_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "text", lambda path: "")
    assert host.BusyClock().lap()[1] is None


def test_the_busy_clock_counts_what_others_used(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([10.0, 12.0])
    own = iter([1.0, 1.5])
    monkeypatch.setattr(host, "_busy_seconds", lambda: next(seconds))
    monkeypatch.setattr("time.process_time", lambda: next(own))
    assert host.BusyClock().lap()[1] == pytest.approx(1.5)


class ScriptedInstrument:
    """Every sample request takes 0.1 s, in which others use what the script says."""

    def __init__(
        self,
        others: Sequence[float | None] = (),
        states: Sequence[DeviceState] = (),
        host_ns: Sequence[tuple[int, ...]] = (),
    ) -> None:
        self.others, self.states, self.host_ns = iter(others), list(states), iter(host_ns)

    def sample(self, handle: int, count: int, *, lead_in_seconds: float = 0.0) -> Sampled:
        return Sampled(
            samples_ns=(1,) * count, seconds=0.1, other_seconds=next(self.others, None), host_ns=next(self.host_ns, ())
        )

    def state(self) -> DeviceState:
        return self.states.pop(0) if self.states else DeviceState()


@pytest.mark.parametrize(
    ("others", "load"),
    [
        ([0.05, 0.05], 0.4),  # (0.1 - 0.02 for the ticks) / 0.2
        ([0.02, -0.02], 0.0),
        ([None, None], 0.0),
    ],
)
def test_other_load_is_summed_over_the_round_and_forgives_a_tick(others: list[float | None], load: float) -> None:
    bench = InstrumentBench(ScriptedInstrument(others), [1])  # type: ignore[arg-type]
    bench.sample(0, 3)
    bench.sample(0, 3)
    assert bench.other_load() == pytest.approx(load)


def test_the_hosts_time_is_the_median_of_a_models_own_runs() -> None:
    instrument = ScriptedInstrument(host_ns=[(3_000, 4_000), (9_000,), (5_000,)])
    bench = InstrumentBench(instrument, [1, 2])  # type: ignore[arg-type]
    for case, count in ((0, 2), (1, 1), (0, 1)):
        bench.sample(case, count)
    assert [bench.host_seconds(case) for case in (0, 1)] == [4e-6, 9e-6]


def test_a_processor_has_no_times_of_a_host_beside_its_own() -> None:
    bench = InstrumentBench(ScriptedInstrument(), [1])  # type: ignore[arg-type]
    bench.sample(0, 3)
    assert bench.host_seconds(0) is None


def test_other_load_starts_anew_with_every_reading() -> None:
    bench = InstrumentBench(ScriptedInstrument([0.1]), [1])  # type: ignore[arg-type]
    bench.sample(0, 3)
    bench.other_load()
    assert bench.other_load() == 0


@pytest.mark.parametrize(
    ("states", "throttled"),
    [
        ([DeviceState(throttle_events=7), DeviceState(throttle_events=7)], False),
        ([DeviceState(throttle_events=7), DeviceState(throttle_events=8)], True),
        ([DeviceState(), DeviceState(thermal_status=1)], False),
        ([DeviceState(), DeviceState(thermal_status=2)], True),
        ([DeviceState(), DeviceState()], False),
    ],
)
def test_throttling_is_what_the_device_says_since_the_last_look(states: list[DeviceState], throttled: bool) -> None:
    bench = InstrumentBench(ScriptedInstrument(states=states), [1])  # type: ignore[arg-type]
    assert bench.throttles() is throttled


def test_a_program_that_ends_is_reported_with_its_last_words() -> None:
    child = PipedProcess([sys.executable, "-c", "import sys; sys.exit('no such board')"], name="it")
    with pytest.raises(LinkLost, match="no such board"):
        child.read_line(timeout=30)
    child.close()


def test_a_silent_program_times_out() -> None:
    child = PipedProcess([sys.executable, "-c", "import sys; sys.stdin.read()"], name="it")
    with pytest.raises(LinkLost, match=r"no answer for 0\.1 s"):
        child.read_line(timeout=0.1)
    child.close()


class PatientConnection(LocalConnection):
    """An agent that answers everything and keeps how long each answer was waited for."""

    def __init__(self) -> None:
        self.timeouts: list[float] = []
        self._seq = 0

    def start_agent(self) -> Process:
        return self

    def write(self, text: str) -> None:
        self._seq = json.loads(text)["seq"]

    def status_of_death(self) -> int | None:
        return None

    def read_line(self, *, timeout: float) -> str:
        self.timeouts.append(timeout)
        answers: list[dict[str, Any]] = [{"fingerprint": codec.encode(FINGERPRINT)}, {}, LOADED]
        return json.dumps({"seq": self._seq, **answers[self._seq - 1]})


LOADED: dict[str, Any] = {"handle": 1, "load_seconds": 1.0, "peak_memory_bytes": 1}


@pytest.mark.parametrize("backend", ["llamacpp", "tensorrt"])
def test_a_load_is_waited_for_as_long_as_its_runtime_may_take(backend: str) -> None:
    connection = PatientConnection()
    with AgentClient(connection, backend=backend, device="host_cpu") as client:
        client.load(Path("model"), sha256="", workload=Workload())
    assert connection.timeouts[2] == backends.get(backend).load_seconds  # after hello, and the word about the copy


def test_tensorrt_may_build_for_an_hour() -> None:
    assert backends.get("tensorrt").load_seconds > 3600


def test_an_agent_runs_on_the_cores_of_its_mask() -> None:
    if not hasattr(os, "sched_getaffinity"):
        pytest.skip("this system does not say which cores a process runs on")
    if reason := backends.get("llamacpp").unavailable():
        pytest.skip(reason)
    last = host.usable_cpus()[-1]
    with AgentClient(LocalConnection(), backend="llamacpp", device="host_cpu", affinity=f"{1 << last:x}") as client:
        assert client.state().affinity == str(last)


def test_cores_that_are_not_there_are_refused() -> None:
    with pytest.raises(InvalidInput, match="cannot be chosen here"):
        host.pin(f"{1 << 1000:x}")


def test_an_absent_program_is_unavailable() -> None:
    with pytest.raises(Unavailable, match="no-such-program"):
        PipedProcess(["no-such-program"], name="it")


def test_the_presets_other_than_host_cpu_ask_where_they_are() -> None:
    reasons = {name: device.unavailable() for name, device in devices.DEVICES.items()}
    assert [name for name, reason in reasons.items() if reason is None] == ["host_cpu"]
    assert all("devices.toml" in reason for reason in reasons.values() if reason)


@pytest.mark.parametrize("device", devices.DEVICES.values(), ids=lambda device: device.name)
def test_what_a_device_ships_by_default_its_runtimes_run(device: devices.Device) -> None:
    assert all(precision in backends.get(name).precisions() for name, precision in device.backends.items())


def test_an_unknown_device_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(InvalidInput, match="did you mean 'jetson_cpu'"):
        devices.get("jetson-cpu")


def test_connecting_to_a_device_out_of_reach_is_refused() -> None:
    with pytest.raises(Unavailable, match="adb"):
        devices.get("s23").connect()


@pytest.fixture(scope="module")
def running() -> Iterator[AgentClient]:
    if reason := backends.get("llamacpp").unavailable():
        pytest.skip(reason)
    with AgentClient(LocalConnection(), backend="llamacpp", device="host_cpu") as client:
        yield client


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tiny") / "model"
    architecture = tiny_llama(TINY_LAYER, TINY_LAYER)
    artifact = export.get("llamacpp").export_probe(architecture, precision="f32", seed=1, out=out)
    return out / artifact.path


def test_the_real_agent_introduces_itself(running: AgentClient) -> None:
    expected: Fingerprint = host.fingerprint(backends.get("llamacpp"), device="host_cpu")
    assert running.fingerprint == expected


def test_the_real_agent_times_a_real_model(running: AgentClient, tiny: Path) -> None:
    one = running.load(tiny, sha256=codec.file_sha256(tiny), workload=WORKLOAD)
    samples = InstrumentBench(running, [one.handle]).sample(0, 5)
    assert len(samples) == 5
    assert min(samples) > 0


def test_an_error_on_the_device_is_raised_here_as_the_same_type(running: AgentClient, tiny: Path) -> None:
    with pytest.raises(Mismatch, match="sha256 differs"):
        running.load(tiny, sha256="0" * 64, workload=WORKLOAD)


def test_a_damaged_model_is_invalid_input_and_the_agent_lives_on(running: AgentClient, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(b"GGUF and nothing more")
    with pytest.raises(InvalidInput, match=r"damaged\.gguf"):
        running.load(damaged, sha256=codec.file_sha256(damaged), workload=WORKLOAD)
    assert running.call("state")["state"]


def test_an_unknown_backend_is_refused_by_the_real_agent() -> None:
    with pytest.raises(InvalidInput, match="unknown backend"):
        AgentClient(LocalConnection(), backend="nothing", device="host_cpu")

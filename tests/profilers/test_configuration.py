"""The fastest configuration of a runtime, found by measuring."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from standins.fabricated import FINGERPRINT
from standins.fake_job import FAST, call

from dilap import backends
from dilap.backends.llamacpp.bench_flags import llama_bench_flags
from dilap.cli import prune
from dilap.core.codec import read_json
from dilap.core.errors import InvalidInput, Unsupported
from dilap.core.measurement import Interval, Measurement
from dilap.core.workload import Workload
from dilap.profilers.configuration import MAX_DIVERGENCE, Configuration, MeasuredWorld, find_fastest, thread_counts
from dilap.profilers.devices import device as devices
from dilap.profilers.profiler import Profiler
from dilap.profilers.tables.table import LatencyTable

LLAMACPP = backends.get("llamacpp")
PLAIN = Workload(threads=4)


class MadeUpWorld:
    """A device whose seconds are a function of the configuration; every interval is half a percent wide."""

    def __init__(
        self, seconds: Callable[[Workload], float], divergence: float | None = 0.0, refuses: tuple[str, ...] = ()
    ) -> None:
        self._seconds, self._divergence, self._refuses = seconds, divergence, refuses
        self.compared: list[Workload] = []

    def compare(self, base: Workload, others: Sequence[Workload]) -> list[tuple[float, Interval]]:
        self.compared += others
        ratios = [self._seconds(base) / self._seconds(other) for other in others]
        return [
            (self._seconds(other), Interval(value=ratio, low=0.995 * ratio, high=1.005 * ratio))
            for other, ratio in zip(others, ratios, strict=True)
        ]

    def divergence(self, base: Workload, other: Workload) -> float | None:
        if other.switches["kv_cache"] in self._refuses:
            raise Unsupported("no such cache")
        return self._divergence


def found(world: MadeUpWorld, threads: Sequence[int] = (4,)) -> Configuration:
    return find_fastest(PLAIN, backend=LLAMACPP, threads=threads, world=world)


def costs(**factors: float) -> Callable[[Workload], float]:
    """10 ms, times a factor for every switch that is named with its value."""

    def seconds(workload: Workload) -> float:
        total = 0.010
        for name, value in [*workload.switches.items(), ("threads", str(workload.threads))]:
            total *= factors.get(f"{name}_{value}", 1.0)
        return total

    return seconds


def test_plain_defaults_stay_where_nothing_is_faster() -> None:
    assert found(MadeUpWorld(costs(flash_attention_off=1.1, repack_off=1.2))).is_plain


def test_a_faster_switch_is_taken() -> None:
    assert found(MadeUpWorld(costs(flash_attention_off=0.85))).workload.switches == {"flash_attention": "off"}


def test_gains_add_up_over_rounds() -> None:
    world = MadeUpWorld(costs(flash_attention_off=0.85, repack_off=0.9, threads_3=0.95))
    chosen = found(world, threads=(4, 3, 2)).workload
    assert chosen == Workload(threads=3, switches={"flash_attention": "off", "repack": "off"})


def test_a_gain_below_one_percent_is_not_worth_leaving_a_default() -> None:
    assert found(MadeUpWorld(costs(flash_attention_off=0.993))).is_plain


def test_a_gain_within_the_noise_is_none() -> None:
    class Noisy(MadeUpWorld):
        def compare(self, base: Workload, others: Sequence[Workload]) -> list[tuple[float, Interval]]:
            return [(0.01, Interval(value=1.05, low=0.99, high=1.11)) for _ in others]

    assert found(Noisy(costs())).is_plain


def test_what_was_clearly_slower_is_not_tried_again() -> None:
    world = MadeUpWorld(costs(flash_attention_off=0.85, repack_off=1.2))
    found(world)
    assert Workload(threads=4, switches={"flash_attention": "off", "repack": "off"}) not in world.compared


def test_no_configuration_is_measured_twice() -> None:
    world = MadeUpWorld(costs(flash_attention_off=0.85, repack_off=0.9))
    found(world, threads=(4, 3, 2))
    assert len(world.compared) == len({str(one) for one in world.compared})


def test_a_lossy_switch_is_refused_where_it_changes_the_model() -> None:
    result = found(MadeUpWorld(costs(kv_cache_q8_0=0.5), divergence=2 * MAX_DIVERGENCE))
    assert result.is_plain
    assert "changes the model by 0.0020 nats" in result.trials[0].refused


def test_a_lossy_switch_is_refused_where_its_effect_cannot_be_seen() -> None:
    result = found(MadeUpWorld(costs(kv_cache_q8_0=0.5), divergence=None))
    assert result.is_plain
    assert "cannot be seen" in result.trials[0].refused


def test_a_lossy_switch_is_taken_where_it_changes_next_to_nothing() -> None:
    assert found(MadeUpWorld(costs(kv_cache_q8_0=0.5), divergence=1e-5)).workload.switches == {"kv_cache": "q8_0"}


def test_what_the_runtime_refuses_is_left_out_and_said() -> None:
    result = found(MadeUpWorld(costs(kv_cache_q8_0=0.5), refuses=("q8_0",)))
    assert result.is_plain
    assert [trial.refused for trial in result.trials if trial.refused] == ["no such cache"]


@pytest.mark.parametrize(("most", "counts"), [(1, (1,)), (2, (2, 1)), (4, (4, 3, 2)), (12, (12, 11, 6))])
def test_thread_counts_are_all_cores_and_fewer(most: int, counts: tuple[int, ...]) -> None:
    assert thread_counts(most) == counts


def measurement(workload: Workload, nanoseconds: int) -> Measurement:
    return Measurement(
        artifact_sha256="",
        workload=workload,
        fingerprint=FINGERPRINT,
        samples_ns=(nanoseconds,) * 15,
        rounds=tuple(range(15)),
        peak_memory_bytes=0,
        load_seconds=0.1,
        started="",
        status="ok",
    )


def measured_world(backend: str, calls: list[int]) -> MeasuredWorld:
    def measure(workloads: Sequence[Workload]) -> list[Measurement]:
        calls.append(len(workloads))
        return [measurement(one, 8_000_000 // one.threads) for one in workloads]

    return MeasuredWorld(
        backend=backends.get(backend), vocab_size=32, measure=measure, diverge=lambda base, other, tokens: len(tokens)
    )


def test_configurations_are_measured_side_by_side() -> None:
    calls: list[int] = []
    gains = measured_world("llamacpp", calls).compare(PLAIN, [Workload(threads=2), Workload(threads=1)])
    assert [gain.value for _, gain in gains] == [0.5, 0.25]
    assert calls == [3]


def test_numbers_of_threads_that_one_process_cannot_hold_are_measured_apart_and_both_ways_round() -> None:
    calls: list[int] = []
    ((seconds, gain),) = measured_world("executorch", calls).compare(PLAIN, [Workload(threads=2)])
    assert (seconds, gain.value) == (0.004, 0.5)
    assert gain.high - gain.low > 0.02  # they were not interleaved
    assert calls == [1, 1, 1, 1]


@pytest.mark.parametrize("name", list(backends.BACKENDS))
def test_every_runtime_says_how_to_run_a_file_in_every_configuration(name: str) -> None:
    backend = backends.get(name)
    configurations = [{}, *({switch: value} for switch, values in backend.switches().items() for value in values)]
    for switches in configurations:
        commands = backend.how_to_run("model.file", Workload(threads=3, switches=switches))
        assert all("model.file" in text for program, text in commands.items() if program in ("python", "llama-bench"))
        assert commands


def test_llama_cpp_says_how_to_leave_flash_attention_off() -> None:
    commands = LLAMACPP.how_to_run("m.gguf", Workload(threads=3, switches={"flash_attention": "off"}))
    assert commands == {
        "llama-bench": "llama-bench -m m.gguf -t 3 -fa 0",
        "llama-cli": "llama-cli -m m.gguf -t 3 -fa off",
        "python": 'llama_cpp.Llama("m.gguf", n_threads=3, n_threads_batch=3, flash_attn=False)',
    }


def test_llama_bench_cannot_be_asked_for_a_cache_in_f32() -> None:
    workload = Workload(switches={"kv_cache": "f32"})
    assert "llama-bench" not in LLAMACPP.how_to_run("m.gguf", workload)
    with pytest.raises(Unsupported, match="no KV cache in f32"):
        llama_bench_flags(workload)


def test_onnx_runtime_says_the_environment_variable() -> None:
    workload = Workload(switches={"flash_attention": "off"})
    assert backends.get("onnxruntime").how_to_run("m.onnx", workload)["environment"].endswith("=1")


@pytest.mark.parametrize("switches", [{"flash_attention": "maybe"}, {"turbo": "on"}])
def test_unknown_switch_is_one_line_with_the_known_ones(switches: dict[str, str]) -> None:
    with pytest.raises(InvalidInput, match=r"has no switch .* it has: flash_attention auto, off; repack on, off"):
        backends.require_switches(LLAMACPP, Workload(switches=switches))


@pytest.fixture
def run(fake_device: None, checkpoint: Path, corpus: Path, tmp_path: Path) -> Callable[..., Path]:
    """A whole job on a made-up device whose runtime is fastest without flash attention; the run's folder."""

    def prune_tiny(name: str, *extra: object) -> Path:
        text = ["--calib", corpus, "--eval-text", corpus]
        asked = ["--target", "host_cpu", "--model", checkpoint, "--budget", "70%", "--out", tmp_path / name]
        assert call(prune.main, *asked, *text, *FAST, *extra) == 0
        return tmp_path / name

    return prune_tiny


def test_a_job_measures_in_the_fastest_configuration_and_says_what_plain_defaults_give(
    run: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run("fastest", "--threads", "2")
    result: dict[str, Any] = read_json(folder / "result.json")
    assert result["workload"]["switches"] == {"flash_attention": "off"}
    assert result["pruned"]["measurement"]["workload"]["switches"] == {"flash_attention": "off"}
    assert result["plain"]["pruned"]["workload"]["switches"] == {}
    said = capsys.readouterr().out
    assert "2 threads, flash attention off" in said
    assert "in the runtime's plain defaults (2 threads): dense" in said


def test_both_artifacts_say_how_the_stock_runtime_runs_them_as_measured(run: Callable[..., Path]) -> None:
    folder = run("fastest", "--threads", "2")
    for name in ("dense", "artifact"):
        found = read_json(folder / name / "artifact.json")["run"]
        assert found["switches"] == {"flash_attention": "off"}
        assert found["commands"]["llama-bench"] == "llama-bench -m model.gguf -t 2 -fa 0"


def test_plain_configuration_is_measured_where_it_is_asked_for(run: Callable[..., Path]) -> None:
    result = read_json(run("plain", "--configuration", "plain") / "result.json")
    assert (result["workload"]["switches"], result["plain"]) == ({}, None)


def test_a_given_table_brings_its_configuration(run: Callable[..., Path], tmp_path: Path) -> None:
    table = LatencyTable.read(run("plain", "--configuration", "plain", "--threads", "2") / "table.jsonl")
    here = Profiler(devices.get("host_cpu"), backend="llamacpp").fingerprint()
    path = tmp_path / "given.jsonl"
    replace(table, header=replace(table.header, fingerprint=here)).write(path)
    again = read_json(run("again", "--table", path) / "result.json")
    assert (again["workload"]["switches"], again["workload"]["threads"]) == ({}, 2)

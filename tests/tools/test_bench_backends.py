"""What tools/bench_backends makes of samples; the samples themselves are the machine's."""

import importlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from standins.fabricated import TINY_LAYER, tiny_llama

from dilap.core.workload import Workload

tool: Any = importlib.import_module("tools.bench_backends")
WORKLOADS = {"decode": Workload(), "prefill": Workload(phase="prefill")}


class Counting:
    """A bench whose samples are its number."""

    def __init__(self, number: int) -> None:
        self.number = number

    def sample(self, case: int, count: int) -> Sequence[int]:
        return [10 * self.number + case] * count

    def other_load(self) -> float:
        return 0.1 * self.number

    def throttles(self) -> bool:
        return self.number == 2

    def now(self) -> float:
        return 0.0

    def sleep(self, seconds: float) -> None:
        pass


def result(phase: str, backend: str, model: str, milliseconds: float, **changes: Any) -> Any:
    fields = {
        "phase": phase,
        "backend": backend,
        "precision": "f32",
        "model": model,
        "configuration": "2 threads",
        "num_bytes": 1_000_000,
        "read_bytes": 44_000_000,
        "samples_ns": (round(milliseconds * 1e6),) * 9,
        "rounds": (0, 0, 0, 1, 1, 1, 2, 2, 2),
        "first_rounds": (0, 1, 2),
        "notes": (),
    }
    return tool.Result(**(fields | changes))


def test_every_case_is_sampled_on_its_own_bench(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tool, "_PAUSE_SECONDS", 0.0)
    benches = tool.Benches([Counting(1), Counting(2)], [(0, 0), (1, 0), (1, 1)])
    assert [benches.sample(case, 1) for case in range(3)] == [[10], [20], [21]]
    assert benches.other_load() == pytest.approx(0.2)
    assert benches.throttles()


def test_the_pruned_shape_has_at_most_70_percent_of_the_weights() -> None:
    dense = tiny_llama(*(replace(TINY_LAYER, num_channels=512),) * 8)
    shapes = tool._shapes(dense, None)
    share = shapes["equal widths"].num_parameters / dense.num_parameters
    assert 0.6 < share <= 0.7
    assert len(set(shapes["equal widths"].layers)) == 1


def test_the_table_has_latency_ratio_and_share_of_the_memory_speed() -> None:
    memory = result("decode", "", "", 1e3 * tool._READ_BYTES / 10e9, precision="")  # 10 GB/s
    results = [memory]
    for phase, dense, pruned in (("decode", 5.0, 4.0), ("prefill", 20.0, 15.0)):
        results += [result(phase, "onnxruntime", "dense", dense), result(phase, "onnxruntime", "equal widths", pruned)]
    lines = tool._table(results, WORKLOADS).splitlines()
    assert "| 5.00 [5.00, 5.00] | 200.0 |  | 8.8 | 88% [88%, 88%] | 20.00 [20.00, 20.00] | 6400 |  |" in lines[2]
    assert "80.0% [80.0%, 80.0%]" in lines[3]
    assert "75.0% [75.0%, 75.0%]" in lines[3]
    assert lines[5] == "memory read beside the decoding: 10.0 GB/s [10.0, 10.0]"

"""What the runner programs print, from their documented formats, and a phone's own words."""

from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest

from dilap.core.artifact import Artifact
from dilap.core.codec import encode, write_json
from dilap.core.errors import InvalidInput, LinkLost, Unsupported
from dilap.core.images import ImageInput
from dilap.core.measurement import DeviceState
from dilap.core.workload import Workload
from dilap.profilers.instruments.phone import parse_state
from dilap.profilers.instruments.runners import (
    ExecutorRunner,
    Job,
    LlamaBench,
    LlamaMain,
    find_runner,
    parse_llama_bench,
    parse_llama_main,
)
from dilap.profilers.links.transports import Transport

DECODE = Workload(context=16, precision="q4_0", threads=5)
PREFILL = Workload(phase="prefill", prompt_tokens=24, precision="q4_0", threads=5)
OBSERVED = (
    'PyTorchObserver {"prefill_token_per_sec":320,"prompt_tokens":16,"generated_tokens":32,"model_load_start_ms":1000,'
    '"model_load_end_ms":1500,"inference_start_ms":1600,"inference_end_ms":2050,"prompt_eval_end_ms":1650,'
    '"first_token_ms":1650,"aggregate_sampling_time_ms":3,"SCALING_FACTOR_UNITS_PER_SECOND":1000}\n'
)
BENCHED = (
    '{"build_commit": "8cf427ff", "build_number": 5163, "n_prompt": 0, "n_gen": 8, "n_depth": 16, "avg_ns": 81, '
    '"samples_ns": [ 80000000, 82000000 ], "samples_ts": [ 100.0, 97.6 ]}\n'
)
STATE = """\
load 1.25 0.90 0.80 2/1234 5678
cores 8
low_power 0
governor walt
clock policy0 1344000 1344000 1344000
clock policy3 2208000 499200 2803200
clock policy7 3187200
Current Battery Service state:
  AC powered: false
  USB powered: true
  level: 57
  temperature: 312
IsStatusOverride: false
Thermal Status: 1
\tTemperature{mValue=36.4, mType=3, mName=SKIN, mStatus=1}
"""


def job(folder: Path, workload: Workload) -> Job:
    return Job(
        model="/data/local/tmp/m/model.pte",
        local=folder / "model.pte",
        workload=workload,
        prefix=("taskset", "f8"),
        put=lambda name, _: name,
    )


def test_llama_bench_gives_nanoseconds_a_token() -> None:
    assert parse_llama_bench(f"ggml: hello\n{BENCHED}") == [10_000_000, 10_250_000]


def test_a_prompt_is_one_sample() -> None:
    assert parse_llama_bench('{"n_prompt": 24, "n_gen": 0, "samples_ns": [ 7000 ]}') == [7000]


@pytest.mark.parametrize(
    "output", ["", "Segmentation fault", "{broken", '{"n_gen": 8}', '{"n_gen": 8, "samples_ns": 3}']
)
def test_other_output_of_llama_bench_is_an_error(output: str) -> None:
    with pytest.raises(LinkLost, match="llama-bench printed"):
        parse_llama_bench(output)


def test_llama_bench_is_told_the_context_and_the_cores(tmp_path: Path) -> None:
    argv = LlamaBench().argv("/p/llama-bench", job(tmp_path, DECODE), 3)
    assert argv == [
        *["taskset", "f8", "/p/llama-bench", "-m", "/data/local/tmp/m/model.pte"],
        *["-p", "0", "-n", "8", "-d", "16", "-t", "5", "-r", "3", "-o", "jsonl"],
    ]


def test_llama_main_gives_nanoseconds_a_token() -> None:
    assert parse_llama_main("noise\n" + OBSERVED, DECODE) == 400 * 1_000_000 // 32


def test_llama_main_gives_the_prompts_nanoseconds() -> None:
    observed = OBSERVED.replace('"prompt_tokens":16', '"prompt_tokens":24')
    assert parse_llama_main(observed, PREFILL) == 50_000_000


def test_a_prompt_of_another_length_is_refused() -> None:
    with pytest.raises(Unsupported, match="16 tokens of a prompt of 24"):
        parse_llama_main(OBSERVED, PREFILL)


@pytest.mark.parametrize("output", ["", "killed", "PyTorchObserver {", 'PyTorchObserver {"prompt_tokens": 16}'])
def test_other_output_of_llama_main_is_an_error(output: str) -> None:
    with pytest.raises(LinkLost, match="llama_main printed"):
        parse_llama_main(output, DECODE)


class NoProgram:
    """A transport on which no program starts; it keeps the command."""

    def start(self, argv: list[str], *, seconds: float) -> None:
        self.argv = argv
        raise LinkLost("no program here")


def write_sidecar(folder: Path, input_: ImageInput) -> None:
    artifact = Artifact(
        path="model.pte", format="pte", backend="executorch", precision="f32", plan_digest="", architecture=None,
        input=input_, sha256="0", num_bytes=1, sqnr_db=None,
    )  # fmt: skip
    write_json(folder / "artifact.json", encode(artifact))


def test_executor_runner_is_fed_a_batch_of_images(tmp_path: Path) -> None:
    write_sidecar(tmp_path, ImageInput(channels=3, height=8, width=16, batch=2))
    transport = NoProgram()
    put: dict[str, bytes] = {}
    forward = Workload(phase="forward", batch=2, precision="f32", threads=5)
    asked = replace(job(tmp_path, forward), put=lambda name, content: name if put.setdefault(name, content) else "")
    with pytest.raises(LinkLost):
        ExecutorRunner().open(cast(Transport, transport), "/p/executor_runner", asked)
    assert {"--inputs=images.bin", "--input_shapes=2x3x8x16"} <= set(transport.argv)
    assert {name: len(content) for name, content in put.items()} == {"images.bin": 2 * 3 * 8 * 16 * 4}


def test_executor_runner_refuses_another_batch(tmp_path: Path) -> None:
    write_sidecar(tmp_path, ImageInput(channels=3, height=8, width=16))
    with pytest.raises(Unsupported, match="takes 1 images at once, and the workload has batch 2"):
        ExecutorRunner().open(
            cast(Transport, NoProgram()), "/p/executor_runner", job(tmp_path, Workload(phase="forward", batch=2))
        )


def test_llama_main_without_a_tokenizer_says_what_times_probes(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="executor_runner"):
        LlamaMain().argv("/p/llama_main", job(tmp_path, DECODE))


def test_llama_main_makes_a_prompt_of_the_contexts_length(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").touch()
    assert "--num_bos=15" in LlamaMain().argv("/p/llama_main", job(tmp_path, DECODE))


@pytest.mark.parametrize("name", ["llama-bench", "executor_runner", "llama_main-arm64"])
def test_a_runner_is_known_by_its_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    assert name.startswith(find_runner(tmp_path / name).name)


def test_an_unknown_runner_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="begins with executor_runner, llama_main, llama-bench"):
        find_runner(tmp_path / "benchmark_model")


def test_an_absent_runner_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="no such runner"):
        find_runner(tmp_path / "llama-bench")


def test_a_phones_state_is_read_from_its_services() -> None:
    assert parse_state(STATE, affinity="f8") == DeviceState(
        power_mode="normal",
        governor="walt",
        num_cores=8,
        affinity="f8",
        clocks_khz={"policy0": 1344000, "policy3": 2208000, "policy7": 3187200},
        pinned_khz={"policy0": 1344000},
        temperatures_celsius={"battery": 31.2, "skin": 36.4},
        thermal_status=1,
        ac_power=True,
        battery_percent=57.0,
        load=1.25,
    )


def test_what_a_phone_does_not_say_is_unknown() -> None:
    assert parse_state("", affinity="f8") == DeviceState(affinity="f8")

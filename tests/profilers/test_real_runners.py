"""Real runtimes behind the runners of a phone: what they are told is understood, and what they print is read.

Times mean nothing here. llama-bench is llama.cpp's own for aarch64, in the lab's phone; ExecuTorch runs on this machine
by its Python runtime, in the protocol of its executor_runner.
"""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from standins import ROOT, STANDINS
from standins.device_lab import LLAMA_BENCH, needs_lab, orphans, private_lab, write_devices
from standins.models import byte_level_tokenizer, tiny_model

from dilap import backends, export
from dilap.backends.executorch.program import Program
from dilap.core.codec import file_sha256
from dilap.core.sqnr import sqnr_db
from dilap.core.workload import Workload
from dilap.profilers.devices.device import Device
from dilap.profilers.devices.locations import read_registry
from dilap.profilers.instruments.agent import Instrument, Loaded

pytestmark = needs_lab
DECODE = Workload(context=16, precision="f32", threads=1)
PREFILL = Workload(phase="prefill", prompt_tokens=12, precision="f32", threads=1)
HERE_PORT = 5659


@pytest.fixture(scope="module", autouse=True)
def _adb(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with private_lab(tmp_path_factory.mktemp("home")):
        yield


def loaded(phone: Instrument, path: Path, workload: Workload) -> Loaded:
    return phone.load(path, sha256=file_sha256(path), workload=workload)


@pytest.fixture
def phone(tmp_path: Path) -> Device:
    """The lab's phone, with llama.cpp's own llama-bench."""
    write_devices(tmp_path / "devices.toml", runner=LLAMA_BENCH)
    return read_registry(tmp_path / "devices.toml").get("s23")


@pytest.mark.skipif(backends.get("llamacpp").unavailable() is not None, reason="llama.cpp is needed to export")
def test_llama_bench_times_a_pruned_model_on_a_phone(phone: Device, tmp_path: Path) -> None:
    words = byte_level_tokenizer(tmp_path / "words")
    export.get("llamacpp").export(
        tiny_model("llama"), tokenizer=words, precision="q8_0", plan_digest="", out=tmp_path / "out"
    )
    switches = {"flash_attention": "off", "repack": "off"}
    with closing(phone.open("llamacpp")) as one:
        assert one.fingerprint.machine == "aarch64"
        for workload in (DECODE, PREFILL, replace(DECODE, switches=switches)):
            found = loaded(one, tmp_path / "out" / "model.gguf", workload)
            assert len(one.sample(found.handle, 3).samples_ns) == 3
        average = one.average_memory(found.handle, 2)
    assert average is not None
    assert 1 << 20 < average <= 2 * found.peak_memory_bytes
    assert orphans() == []


@pytest.fixture
def phone_here(tmp_path: Path) -> Iterator[Device]:
    """This machine behind the real adb, with ExecuTorch's Python runtime as its executor_runner."""
    runner = tmp_path / "executor_runner"
    runner.write_text(f"#!{sys.executable}\n{(STANDINS / 'executor_runner.py').read_text()}")
    command = [sys.executable, str(ROOT / "tools" / "adb_device.py"), "--port", str(HERE_PORT), "--root", "/"]
    served = subprocess.Popen(command)
    try:
        (tmp_path / "devices.toml").write_text(
            f'[s23]\nadb = "127.0.0.1:{HERE_PORT}"\naffinity = "1"\nfolder = "{tmp_path}/phone"\nrunner = "{runner}"\n'
        )
        yield read_registry(tmp_path / "devices.toml").get("s23")
    finally:
        served.kill()
        served.wait()


@pytest.mark.parametrize("workload", [DECODE, PREFILL], ids=["decode", "prefill"])
def test_executorch_runs_a_model_as_its_runner_is_told(
    workload: Workload, phone_here: Device, in_executorch: Path, tmp_path: Path
) -> None:
    path = in_executorch / "artifact" / "model.pte"
    with closing(phone_here.open("executorch")) as one:
        found = loaded(one, path, workload)
        assert len(one.sample(found.handle, 4).samples_ns) == 4
        average = one.average_memory(found.handle, 3)
    assert average is not None
    assert 1 << 20 < average <= 2 * found.peak_memory_bytes
    assert found.load_seconds > 0
    (output,) = (tmp_path / "phone").rglob("*.out-0.bin")
    tokens, position = ([0], 16) if workload.phase == "decode" else ([0] * 12, 0)
    with Program(path, method="forward") as program:
        expected = program.logits_at(tokens, position=position)
    # the same runtime on the same inputs, but for what it leaves in padding
    assert sqnr_db(expected.ravel(), np.frombuffer(output.read_bytes(), np.float32)) > 100

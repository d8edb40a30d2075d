"""The commands against devices of the lab: timings there mean nothing, everything else is as on a real one."""

import functools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from standins import STANDINS
from standins.device_lab import agent_archive, needs_lab, orphans, private_lab, write_devices
from standins.models import tiny_model, tiny_tokenizer

from dilap import backends
from dilap.cli import profile, prune
from dilap.core.artifact import Artifact
from dilap.core.codec import decode, read_json
from dilap.core.measurement import Measurement
from dilap.models.load import save_checkpoint
from dilap.profilers.devices import device as devices
from dilap.profilers.instruments import agent as client
from dilap.profilers.protocol import Protocol
from dilap.profilers.tables.probes import build_table
from dilap.profilers.tables.table import LatencyTable

pytestmark = needs_lab
# One round, whatever else this machine does meanwhile: the seconds are made up.
ONCE = Protocol(
    lead_in_seconds=0.0, warm_up_samples=1, warm_up_cap_seconds=0.0, max_seconds=0.0, contention_share=1000.0
)
F32 = ["--precision", "f32", "--threads", "1", "--context", "16"]
# emulation takes what it takes: the runtime runs the model there, and its size in bytes stands for its nanoseconds
_SIZE = "        self._num_bytes = sum(one.stat().st_size for one in path.parent.iterdir())\n"
_OPENING = {
    "onnxruntime": "        self._model = _Model(\n            path,\n",
    "llamacpp": "        self._workload = workload\n        self._model",
}
_CLOCK = {
    "onnxruntime": {"return time.perf_counter_ns() - start": "return self._num_bytes"},
    "llamacpp": {"elapsed = time.perf_counter_ns() - start": "elapsed = self._num_bytes"},
}


@pytest.fixture(scope="module", autouse=True)
def _adb(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with private_lab(tmp_path_factory.mktemp("home")):
        yield


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_checkpoint(tiny_model("llama"), tiny_tokenizer(folder / "words"), folder / "it's $(a) tiny model")
    return folder / "it's $(a) tiny model"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder with the lab's devices.toml, a protocol that takes one round, and tables of few probes."""
    monkeypatch.chdir(tmp_path)
    write_devices(tmp_path / "devices.toml")
    monkeypatch.setenv("DILAP_DEVICES", str(tmp_path / "devices.toml"))
    monkeypatch.setattr("dilap.job.bench.TABLE", ONCE)
    monkeypatch.setattr("dilap.job.measuring.TABLE", ONCE)
    monkeypatch.setattr("dilap.job.measuring.FINAL", ONCE)
    few = functools.partial(build_table, num_measured=3, num_random=3, num_holdout=2)
    monkeypatch.setattr("dilap.job.bench.build_table", few)
    (tmp_path / "corpus.txt").write_text(" ".join(f"the {word} of line {word * 7}" for word in range(4000)))
    return tmp_path


def call(main: Callable[[], None], *arguments: object) -> int:
    sys.argv = ["dilap", *map(str, arguments)]
    with pytest.raises(SystemExit) as stopped:
        main()
    return int(stopped.value.code or 0)


def prune_on(device: str, checkpoint: Path, *extra: object) -> int:
    text = ["--calib", "corpus.txt", "--eval-text", "corpus.txt", "--calib-length", "32"]
    search = ["--evaluations", "2", "--step", "0.3", "--out", "run", "--force"]
    return call(prune.main, "--target", device, "--model", checkpoint, *text, *search, *extra)


def measurement(side: str) -> Measurement:
    document = read_json(Path("run/result.json"))[side]["measurement"]
    return decode(Measurement, {**document, "type": "Measurement", "version": 1}, source=side)


@pytest.mark.parametrize(("device", "count"), [("jetson_cpu", 2), ("snapdragon_x", 1)])
def test_the_main_job_runs_on_a_device_over_ssh(
    device: str, count: int, here: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the device's default runtime: llama.cpp on a Jetson's CPU, ONNX Runtime on a laptop with Linux."""
    backend = next(iter(devices.get(device).backends))
    if reason := backends.get(backend).unavailable():
        pytest.skip(f"it is needed to export: {reason}")
    changes = {_OPENING[backend]: _SIZE + _OPENING[backend], **_CLOCK[backend]}
    content = agent_archive(name=f"dilap/backends/{backend}/runtime.py", replaced=changes)
    monkeypatch.setattr(client, "agent_archive", lambda: content)
    assert prune_on(device, checkpoint, "--configuration", "plain", "--budget", "75%", *F32) == 0
    table = LatencyTable.read(Path("run/table.jsonl"))
    assert len({one.header.fingerprint.serial_sha256 for one in (table, *table.partners)}) == count
    found = table.header.fingerprint
    assert (found.device, found.machine, found.runtime) == (device, "aarch64", backend)
    artifact = decode(Artifact, read_json(Path("run/artifact/artifact.json")), source="artifact.json")
    for side, sha256 in (("dense", None), ("pruned", artifact.sha256)):
        measured = measurement(side)
        assert measured.fingerprint.differences(table.header.fingerprint) == []
        assert sha256 in (None, measured.artifact_sha256)
        assert len(measured.states) == 2
    assert orphans() == []


def test_the_main_job_runs_on_a_phone_over_adb(here: Path, checkpoint: Path) -> None:
    work = ["--backend", "llamacpp", "--precision", "f32", "--threads", "512", "--context", "16"]
    assert prune_on("s23", checkpoint, *work, "--budget", "80%") == 0
    measured = measurement("pruned")
    assert measured.fingerprint.runtime_version.startswith("llama-bench.standin, ")
    # the stand-in's clock: a nanosecond a byte of the file
    assert set(measured.samples_ns) == {Path("run/artifact/model.gguf").stat().st_size}
    assert "512 threads on" in measured.forced[0]  # and so it was not fit, which --force overrides and writes down
    assert orphans() == []


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(("device", "backend"), [("jetson_cpu:2", "onnxruntime"), ("s23", "llamacpp")])
def test_a_device_is_looked_at_step_by_step(device: str, backend: str, capsys: pytest.CaptureFixture[str]) -> None:
    call(profile.main, "--check", device, "--json")
    checks = {one["name"]: one for one in json.loads(capsys.readouterr().out)}
    assert "aarch64" in checks["connection"]["reason"]
    assert all(checks[step]["usable"] for step in ("connection", "free space", backend, "power mode"))
    assert orphans() == []


def test_an_unfit_device_is_refused_with_what_mends_it(
    here: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    threads = ["--backend", "llamacpp", "--precision", "f32", "--threads", "512", "--context", "16"]
    assert call(profile.main, "--device", "s23", "--model", checkpoint, *threads) == 2
    assert "512 threads on" in capsys.readouterr().err.strip().splitlines()[-1]


def test_a_phone_without_a_runner_says_how_to_give_one(
    here: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    toml = here / "devices.toml"
    toml.write_text("".join(line for line in toml.read_text().splitlines(True) if not line.startswith("runner")))
    assert call(profile.main, "--device", "s23", "--backend", "llamacpp", "--context", "16", "--model", checkpoint) == 2
    assert "--runner" in capsys.readouterr().err.strip().splitlines()[-1]


def test_a_runner_of_another_runtime_is_refused(
    here: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runner = STANDINS / "executor_runner.standin"
    device = ["--device", "s23", "--backend", "llamacpp", "--context", "16", "--runner", runner]
    assert call(profile.main, *device, "--model", checkpoint) == 2
    assert "choose --backend executorch" in capsys.readouterr().err.strip().splitlines()[-1]

"""What every test shares."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from standins.fabricated import evaluation
from standins.fake_job import FAST, FakeBench, FinishedJob, call
from standins.models import byte_level_tokenizer, needs_llamacpp, tiny_model, tiny_tokenizer

from dilap import backends
from dilap.cli import prune
from dilap.core.codec import encode, write_json
from dilap.core.progress import Progress
from dilap.core.workload import Workload
from dilap.job.bench import Bench
from dilap.models import compute
from dilap.models.load import save_checkpoint
from dilap.profilers.devices.device import Device


@pytest.fixture(autouse=True)
def _single_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """f32 products on every machine, so that tolerances are those of f32."""
    use_single_precision(monkeypatch)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a byte-level tokenizer for tiny models."""
    needs_llamacpp()
    return byte_level_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A tiny llama with a tokenizer, as a user would have it."""
    return write_checkpoint(tmp_path)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_corpus(tmp_path)


@pytest.fixture
def fake_device(monkeypatch: pytest.MonkeyPatch) -> None:
    use_fake_device(monkeypatch)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> FinishedJob:
    """Made once, and only to be read."""
    folder = tmp_path_factory.mktemp("finished")
    job = FinishedJob(checkpoint=write_checkpoint(folder), corpus=write_corpus(folder), run=folder / "seventy")
    arguments = ["--target", "host_cpu", "--budget", "70%", "--model", job.checkpoint, "--calib", job.corpus]
    arguments += ["--eval-text", job.corpus, "--method", "magnitude", "--recover", "full", "--recover-steps", "3"]
    with pytest.MonkeyPatch.context() as monkeypatch:
        use_single_precision(monkeypatch)
        use_fake_device(monkeypatch)
        assert call(prune.main, *arguments, "--out", job.run, *FAST) == 0
    return job


@pytest.fixture
def run(finished: FinishedJob, tmp_path: Path) -> Path:
    """A copy of the finished job's folder."""
    return shutil.copytree(finished.run, tmp_path / "runs" / finished.run.name)


@pytest.fixture
def evaluated(run: Path) -> Path:
    """A run with an evaluation of its artifact."""
    write_json(run / "evaluation.json", encode(evaluation("seventy", 0.5)))
    return run


def use_single_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compute, "has_fast_bf16", lambda _: False)


def use_fake_device(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Bench.of

    def made(
        devices: Sequence[Device], backend: str, workload: Workload, progress: Progress, *, estimate: bool, **rest: Any
    ) -> Bench:
        if estimate:
            return real(devices, backend, workload, progress, estimate=True, **rest)
        return FakeBench(device=devices[0], backend=backends.get(backend), workload=workload, progress=progress)

    monkeypatch.setattr(Bench, "of", made)


def write_checkpoint(folder: Path) -> Path:
    path = folder / "tiny"
    save_checkpoint(tiny_model("llama"), tiny_tokenizer(folder / "words"), path)
    return path


def write_corpus(folder: Path) -> Path:
    path = folder / "corpus.txt"
    path.write_text(" ".join(f"the {word} of line {word * 7}" for word in range(4000)))
    return path

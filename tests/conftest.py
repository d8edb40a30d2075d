"""What every test shares."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from fabricated import evaluation
from fake_job import FAST, FakeBench, call
from models import tiny_model, tiny_tokenizer

from dilap import backends
from dilap.cli import prune
from dilap.cli.console import Console
from dilap.codec import encode, write_json
from dilap.profilers.devices import Device
from dilap.source import save_checkpoint
from dilap.types import Workload


@pytest.fixture(autouse=True)
def _single_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """f32 products on every machine, so that tolerances are those of f32."""
    monkeypatch.setattr("dilap.compute.has_fast_bf16", lambda: False)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A tiny llama with a tokenizer, as a user would have it."""
    folder = tmp_path / "tiny"
    model = tiny_model("llama")
    save_checkpoint(model, tiny_tokenizer(tmp_path / "words"), folder)
    return folder


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.txt"
    path.write_text(" ".join(f"the {word} of line {word * 7}" for word in range(4000)))
    return path


@pytest.fixture
def fake_device(monkeypatch: pytest.MonkeyPatch) -> None:
    def made(
        devices: Sequence[Device], backend: str, workload: Workload, console: Console, *, force: bool
    ) -> FakeBench:
        return FakeBench(device=devices[0], backend=backends.get(backend), workload=workload, console=console)

    monkeypatch.setattr("dilap.cli.job.Bench.of", made)


@pytest.fixture
def run(fake_device: None, checkpoint: Path, corpus: Path, tmp_path: Path) -> Path:
    """A prune job on the made-up device."""
    out = tmp_path / "runs" / "seventy"
    arguments = ["--target", "host_cpu", "--budget", "70%", "--model", checkpoint, "--calib", corpus]
    arguments += ["--eval-text", corpus, "--method", "magnitude", "--recover", "full", "--recover-steps", "3"]
    assert call(prune.main, *arguments, "--out", out, *FAST) == 0
    return out


@pytest.fixture
def evaluated(run: Path) -> Path:
    """A run with an evaluation of its artifact."""
    write_json(run / "evaluation.json", encode(evaluation("seventy", 0.5)))
    return run

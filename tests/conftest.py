"""What every test shares, and how tests are given to workers."""

import os
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from standins.fabricated import evaluation
from standins.fake_job import FAST, FakeBench, FinishedJob, call
from standins.models import byte_level_tokenizer, needs_llamacpp, talking_model, tiny_model, tiny_tokenizer
from transformers import AutoTokenizer
from xdist.scheduler import LoadFileScheduling

from dilap import backends, export
from dilap.cli import prune
from dilap.core.codec import encode, write_json
from dilap.core.progress import Progress
from dilap.core.workload import Workload
from dilap.job.bench import Bench
from dilap.models import compute
from dilap.models.load import save_checkpoint
from dilap.profilers.devices.device import DEVICES, Device

LAB = tuple(f"tests/profilers/test_{name}.py" for name in ("faults", "remote", "transports"))


class Scheduling(LoadFileScheduling):  # type: ignore[misc] # xdist has no types
    """Gives whole files to workers, and the whole device lab to one of them, because the others would wait for it."""

    def _split_scope(self, nodeid: str) -> str:
        file = str(super()._split_scope(nodeid))
        return "the device lab" if file in LAB else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Scheduling:
    return Scheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the device lab, which takes longest and mostly waits for emulated devices."""
    items.sort(key=lambda item: item.nodeid.split("::")[0] not in LAB)


@pytest.fixture(autouse=True)
def _single_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """f32 products on every machine, so that tolerances are those of f32."""
    use_single_precision(monkeypatch)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a byte-level tokenizer for tiny models."""
    needs_llamacpp()
    return byte_level_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def in_executorch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the `checkpoint` of a tiny llama and its ExecuTorch `artifact`, made once for all workers.

    The model only ever prefers printable text, because ExecuTorch's runner decodes every token by itself, as UTF-8.
    """
    if reason := backends.get("executorch").unavailable():
        pytest.skip(reason)
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "in-executorch"
    with FileLock(f"{folder}.lock"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what ExecuTorch, torchao and torch deprecate among themselves
        if not (folder / "checkpoint").exists():
            words = byte_level_tokenizer(folder / "words")
            model, exporter = talking_model(words), export.get("executorch")
            exporter.export(model, tokenizer=words, precision="f32", plan_digest="plan", out=folder / "artifact")
            save_checkpoint(model, AutoTokenizer.from_pretrained(words), folder / "checkpoint")
    return folder


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


@pytest.fixture
def no_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """In estimates operators take no time to start, which is nearly all that those of tiny models take."""
    for name, device in DEVICES.items():
        reach = tuple(replace(one, operator_seconds=0.0) for one in device.reach)
        monkeypatch.setitem(DEVICES, name, replace(device, reach=reach))  # type: ignore[arg-type]


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

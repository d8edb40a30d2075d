"""Whole jobs on an accelerator, and what is said where there is none."""

from pathlib import Path
from typing import Any

import pytest
from standins.fake_gpu import fake_gpu
from standins.fake_job import FAST, call, last_line, prune_tiny

from dilap.cli import prune
from dilap.core.errors import InvalidInput

pytestmark = [
    pytest.mark.usefixtures("fake_device"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


def test_job_on_an_accelerator_finds_what_it_finds_on_the_cpu(
    checkpoint: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # the made-up device is known in this thread alone
    asked: dict[str, Any] = {"evaluations": 1, "recover": "full", "recover_steps": 2, "recover_rate": 1e-3}
    here = prune_tiny(checkpoint, corpus, tmp_path / "here", compute="cpu", **asked)
    with fake_gpu():
        there = prune_tiny(checkpoint, corpus, tmp_path / "there", compute="fakegpu", **asked)
    assert there.plan_digest == here.plan_digest
    assert there.recovery_kls == pytest.approx(here.recovery_kls, rel=1e-3)
    assert there.pruned.quality.kl == pytest.approx(here.pruned.quality.kl, rel=1e-2)


def test_device_that_is_not_there_is_refused_in_one_line(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--target", "host_cpu", "--budget", "70%", "--model", checkpoint, "--compute", "cuda:9"]
    assert call(prune.main, *asked, "--out", tmp_path / "out", *FAST) == 2
    assert "torch has no device 'cuda:9' to compute on here; it has cpu" in last_line(capsys)


def test_unknown_device_is_refused_in_python_too(checkpoint: Path, corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="no device 'tpu' to compute on"):
        prune_tiny(checkpoint, corpus, tmp_path / "out", compute="tpu")

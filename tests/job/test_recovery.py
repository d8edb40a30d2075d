"""Recovery in a job: what it does to the model that is shipped."""

from pathlib import Path

import pytest
import torch
from standins.fake_job import prune_tiny
from transformers import PreTrainedModel

from dilap.models.anatomy import decoder_layers

pytestmark = pytest.mark.usefixtures("fake_device")


def spoil(model: PreTrainedModel, *_: object, **__: object) -> list[float]:
    """Stand in for a training that diverges."""
    with torch.no_grad():
        for parameter in decoder_layers(model).parameters():
            parameter.fill_(float("nan"))
    return [1.0, float("nan")]


def test_recovery_that_does_not_help_is_undone(
    checkpoint: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dilap.job.proof.distil", spoil)
    lines: list[str] = []
    result = prune_tiny(checkpoint, corpus, tmp_path / "out", recover="full", recover_steps=2, progress=lines.append)
    assert result.pruned.in_torch.kl == result.kl_without_recovery
    assert "recovery is undone, because it did not help" in lines
    assert "recovery is undone, because it did not help" in result.all_notes

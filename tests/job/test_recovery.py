"""Recovery in a job: what it does to the model that is shipped."""

from pathlib import Path
from typing import Any

import pytest
from standins.fake_job import prune_tiny

from dilap.core.errors import InvalidInput

pytestmark = pytest.mark.usefixtures("fake_device")


def test_recovery_that_does_not_help_is_undone(checkpoint: Path, corpus: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    result = prune_tiny(
        checkpoint,
        corpus,
        tmp_path / "out",
        recover="full",
        recover_steps=2,
        recover_rate=1.0,  # a step as long as the weights are large
        progress=lines.append,
    )
    assert result.pruned.in_torch.kl == result.kl_without_recovery
    assert "recovery is undone, because it did not help" in lines
    assert "recovery is undone, because it did not help" in result.all_notes


def test_result_has_the_curve_of_the_validation_split(checkpoint: Path, corpus: Path, tmp_path: Path) -> None:
    asked: dict[str, Any] = {"recover_steps": 4, "recover_evaluate": 2}
    result = prune_tiny(checkpoint, corpus, tmp_path / "out", method="magnitude", recover="full", **asked)
    assert [step for step, _ in result.recovery_validation_kls] == [0, 2, 4]
    assert result.recovery_validation_kls[0][1] == pytest.approx(result.validation_kl)
    assert len(result.recovery_kls) == 4


def test_recovery_reads_streamed_text(checkpoint: Path, corpus: Path, tmp_path: Path) -> None:
    asked: dict[str, Any] = {"recover_tokens": 3 * 128, "recover_batch": 128, "recover_length": 32}
    result = prune_tiny(
        checkpoint, corpus, tmp_path / "out", method="magnitude", recover="lora", recover_data=[corpus], **asked
    )
    assert len(result.recovery_kls) == 3
    assert result.options["recovery"]["data"] == (str(corpus),)


def test_recovery_text_without_text_is_refused_before_anything_is_measured(
    checkpoint: Path, corpus: Path, tmp_path: Path
) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    with pytest.raises(InvalidInput, match=r"empty\.txt: it holds no text"):
        prune_tiny(checkpoint, corpus, tmp_path / "out", recover="full", recover_data=[str(empty)], recover_length=32)
    with pytest.raises(InvalidInput, match="take --recover-length 128 or less"):
        prune_tiny(checkpoint, corpus, tmp_path / "out", recover="full", recover_data=[str(corpus)])
    assert not (tmp_path / "out").exists()

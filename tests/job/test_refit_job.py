"""Any method's plan is scored cut alone and refitted, and the refit may stand for the method's own values."""

from pathlib import Path

import pytest
from standins.fake_job import compare_tiny, prune_tiny

pytestmark = [
    pytest.mark.usefixtures("fake_device"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


def test_a_comparison_has_the_same_columns_for_every_method(checkpoint: Path, corpus: Path, tmp_path: Path) -> None:
    cut, flap = compare_tiny(checkpoint, corpus, tmp_path / "out", "magnitude", "flap", budgets=["80%"], recover="none")
    for row in (cut, flap):
        assert row.torch_kl_cut is not None
        assert row.torch_kl_refit is not None
    assert cut.torch_kl_before == pytest.approx(cut.torch_kl_cut, rel=1e-3)  # it has no values of its own
    assert flap.torch_kl_before != pytest.approx(flap.torch_kl_cut, rel=1e-3)  # biases


def test_a_refit_is_taken_where_it_is_asked_for(checkpoint: Path, corpus: Path, tmp_path: Path) -> None:
    found = prune_tiny(checkpoint, corpus, tmp_path / "out", refit="use")
    assert found.kl_refit is not None
    assert found.kl_without_recovery == pytest.approx(found.kl_refit, rel=1e-3)
    plain = prune_tiny(checkpoint, corpus, tmp_path / "plain")
    assert (plain.kl_cut, plain.kl_refit) == (None, None)
    assert plain.kl_without_recovery == pytest.approx(found.kl_cut, rel=1e-3)


def test_methods_that_train_take_the_text_and_the_steps_of_the_job(
    checkpoint: Path, corpus: Path, tmp_path: Path
) -> None:
    questions = tmp_path / "questions.jsonl"
    row = '{"instruction": "Name the colour of line %d.", "output": "It is the colour of all lines before it."}\n'
    questions.write_text("".join(row % number for number in range(60)))
    asked = {"method": "llm_streamline", "budget": "80%", "train_text": str(questions), "train_steps": 2}
    found = prune_tiny(checkpoint, corpus, tmp_path / "out", **asked)  # type: ignore[arg-type]
    assert (found.options["training_text"], found.options["train_steps"]) == (str(questions), 2)

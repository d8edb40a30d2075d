"""tools/check_eval: what counts as the same."""

import importlib
from dataclasses import replace
from typing import Any

import pytest
from standins.fabricated import evaluation

from dilap.core.errors import InvalidInput
from dilap.evaluation.document import Evaluation

check_eval: Any = importlib.import_module("tools.check_eval")


def answered(*answers: int, perplexity: float = 10.0) -> Evaluation:
    made = evaluation("m", 0.5)
    facts = replace(made.facts["piqa"], choices={"piqa": answers})
    return replace(made, facts={"piqa": facts}, tasks={"piqa": {"word_perplexity": perplexity}})


def test_equal_evaluations_are_close() -> None:
    (found,) = check_eval.agreements("a", answered(0, 1), answered(0, 1))
    assert (found.same, found.off, found.is_close) == (1.0, 0.0, True)


@pytest.mark.parametrize("other", [answered(*[0] * 97, 1, 1), answered(*[0] * 99, perplexity=10.02)])
def test_other_answers_or_perplexities_are_not(other: Evaluation) -> None:
    (found,) = check_eval.agreements("a", answered(*[0] * 99), other)
    assert not found.is_close
    assert "FAILS" in check_eval.table([found], ["a"])


def test_a_quantised_artifact_is_reported_alone() -> None:
    (found,) = check_eval.agreements("b", answered(0, 1), answered(1, 0))
    assert "reported" in check_eval.table([found], ["a"])


def test_other_rows_are_refused() -> None:
    made = answered(0)
    other = replace(made, facts={"piqa": replace(made.facts["piqa"], data_sha256="other")})
    with pytest.raises(InvalidInput, match="other rows"):
        list(check_eval.agreements("a", made, other))

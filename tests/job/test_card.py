"""What a job says in words, and the cards with which its folders can be published."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from standins.fake_job import FinishedJob

from dilap import __version__
from dilap.core.measurement import Interval
from dilap.core.printable import milliseconds
from dilap.job import ending, meaning
from dilap.job.card import write_cards
from dilap.job.result import PruneResult, read_result
from dilap.models.origin import Origin
from dilap.report.html import _claim
from dilap.report.inputs import Run


@pytest.fixture(scope="module")
def result(finished: FinishedJob) -> PruneResult:
    return read_result(finished.run)


def card(finished: FinishedJob, folder: str) -> str:
    return (finished.run / folder / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(("folder", "library"), [("checkpoint", "transformers"), ("artifact", "llama.cpp")])
def test_the_hub_reads_the_head_of_a_card(folder: str, library: str, finished: FinishedJob) -> None:
    """Licence and base model are left out where the files of the source name none."""
    found: Any = ModelCard(card(finished, folder)).data
    assert (found.library_name, found.pipeline_tag, found.tags) == (library, "text-generation", ["dilap", "pruned"])
    assert (found.license, found.base_model) == (None, None)


@pytest.mark.parametrize("folder", ["checkpoint", "artifact"])
def test_a_card_says_how_it_was_made(folder: str, finished: FinishedJob, result: PruneResult) -> None:
    text = card(finished, folder)
    assert "command: `dilap-prune --target host_cpu --budget 70% --model tiny " in text
    assert str(finished.checkpoint.parent) not in text
    assert f"dilap_version: {__version__}" in text
    assert f"plan: {result.plan_digest}" in text
    assert "| latency p50 | " in text
    assert "name no licence" in text


def test_a_card_says_how_to_load_it(finished: FinishedJob) -> None:
    needs_code = (finished.run / "checkpoint" / "modeling_dilap.py").is_file()
    assert ("trust_remote_code=True" in card(finished, "checkpoint")) == needs_code
    assert "llama-cli -m model.gguf" in card(finished, "artifact")


def test_a_card_carries_licence_and_base_model_over(run: Path, result: PruneResult) -> None:
    origin = Origin(name="Tiny", license="mit", base_models=("people/tiny",), languages=("en",))
    write_cards(run, result, origin)
    found: Any = ModelCard.load(run / "checkpoint" / "README.md").data
    assert (found.license, found.base_model, found.language) == ("mit", ["people/tiny"], ["en"])


def test_a_sentence_says_what_came_of_it(result: PruneResult) -> None:
    said = ending.verdict_sentence(result)
    assert said.startswith("tiny, pruned, keeps the budget of 70% on host_cpu: ")
    assert (
        f"KL to the dense model is {result.pruned.quality.kl:.3f} a token: {meaning.of_kl(result.pruned.quality.kl)}"
        in said
    )


@pytest.mark.parametrize(
    ("status", "words"),
    [("missed", "MISSES"), ("uncertain", "may or may not keep"), ("estimated", "at best")],
)
def test_a_sentence_claims_no_more_than_was_measured(status: str, words: str, result: PruneResult) -> None:
    changed = replace(result, status=status, budget_used=1.1, budget_interval=Interval(value=1.1, low=1.1, high=1.1))  # type: ignore[arg-type]
    assert words in ending.verdict_sentence(changed)


def test_both_models_answer_three_times(result: PruneResult) -> None:
    assert len(result.answers) == 3
    assert all(one.prompt for one in result.answers)
    assert any(one.dense != one.pruned for one in result.answers)
    assert len(ending.answer_lines(result)) == 2 + 3 * 3
    assert ending.answer_lines(replace(result, answers=())) == []  # of earlier versions


def test_rates_stand_beside_latencies(result: PruneResult) -> None:
    words = " ".join(ending.text(result).split())
    assert f"tokens a second {1 / result.dense.seconds:,.0f} {1 / result.pruned.seconds:,.0f} " in words


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0.0123456, "12.35"), (0.00035, "0.35"), (0.0000012, "0.0012"), (0.00000004, "4e-05")]
)
def test_no_latency_is_nought(seconds: float, shown: str) -> None:
    assert milliseconds(seconds) == shown


@pytest.mark.parametrize(
    ("kl", "words"), [(0.005, "hardly"), (0.13, "close"), (0.59, "somewhat"), (1.2, "much worse"), (9.0, "broken")]
)
def test_a_kl_has_words(kl: float, words: str) -> None:
    assert meaning.of_kl(kl).startswith(words)


@pytest.mark.parametrize(
    ("decibels", "words"),
    [(110.0, "the same"), (53.0, "as near as 16"), (26.0, "as near as 8"), (7.0, "as near as 4"), (-1.0, "far")],
)
def test_an_sqnr_has_words(decibels: float, words: str) -> None:
    assert meaning.of_sqnr(decibels).startswith(words)


def test_a_broken_model_is_not_praised_for_its_speed(finished: FinishedJob, result: PruneResult) -> None:
    quality = replace(result.pruned.quality, kl=9.0)
    broken = replace(result, pruned=replace(result.pruned, quality=quality))
    claims = [_claim(Run(name="one", result=one, widths=(), table=None, evaluation=None)) for one in (result, broken)]
    assert [claim["status"] for claim in claims] == ["broken" if result.pruned.quality.kl > 1.5 else "kept", "broken"]
    assert "broken for most uses" in claims[1]["detail"]


def test_no_passage_of_a_private_text_is_in_a_card(run: Path, finished: FinishedJob, result: PruneResult) -> None:
    assert "## Answers" not in card(finished, "checkpoint")
    public = replace(result.pruned, quality=replace(result.pruned.quality, text="python-docs"))
    write_cards(run, replace(result, pruned=public), Origin(name="Tiny"))
    assert "## Answers" in (run / "checkpoint" / "README.md").read_text(encoding="utf-8")

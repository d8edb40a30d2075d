"""Calibration and evaluation text: reproducible, disjoint, and clear about bad files."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from standins.models import FAMILIES, tiny_model, tiny_tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase

from dilap.core.errors import InvalidInput
from dilap.models.options import CalibrationOptions
from dilap.models.text import (
    OPENINGS,
    Calibration,
    calibration,
    evaluation_text,
    self_generated,
    sequences,
)

SMALL = CalibrationOptions(sequence_length=12, train_sequences=6, validation_sequences=4)
WORDS = " ".join(f"word{number} the fox" for number in range(400))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def calibrated(tokenizer: PreTrainedTokenizerBase, options: CalibrationOptions) -> Calibration:
    return calibration(tiny_model("llama"), tokenizer, options)


@pytest.fixture
def words(tmp_path: Path) -> Path:
    path = tmp_path / "words.txt"
    path.write_text(WORDS, encoding="utf-8")
    return path


@pytest.mark.parametrize("source", ["self", "file"])
def test_calibration_is_deterministic_for_a_seed(source: str, tokenizer: PreTrainedTokenizerBase, words: Path) -> None:
    options = SMALL if source == "self" else replace(SMALL, source=str(words))
    first, second = calibrated(tokenizer, options), calibrated(tokenizer, options)
    assert torch.equal(first.train, second.train)
    assert torch.equal(first.validation, second.validation)
    assert first.sha256 == second.sha256 != calibrated(tokenizer, replace(options, seed=1)).sha256


@pytest.mark.parametrize("source", ["self", "file"])
def test_splits_have_the_sizes_asked_for_and_share_no_sequence(
    source: str, tokenizer: PreTrainedTokenizerBase, words: Path
) -> None:
    found = calibrated(tokenizer, SMALL if source == "self" else replace(SMALL, source=str(words)))
    assert (found.train.shape, found.validation.shape) == ((6, 12), (4, 12))
    train, validation = ({tuple(row) for row in part.tolist()} for part in (found.train, found.validation))
    assert not train & validation


def test_sequences_longer_than_the_positions_of_the_model_are_invalid_input(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(InvalidInput, match=r"sequences of 129 tokens are longer than the model's 128 positions; take"):
        calibrated(tokenizer, replace(SMALL, sequence_length=129))


def test_generated_text_starts_with_the_start_token_and_has_no_other_special_one(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    tokens = self_generated(tiny_model("llama"), tokenizer, num_sequences=16, length=24, seed=0)
    assert tokens.shape == (16, 24)
    assert set(tokens[:, 0].tolist()) == {tokenizer.bos_token_id}
    assert tokenizer.bos_token_id not in tokens[:, 1:]


def test_generated_tokens_are_known_to_the_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """A model may have more rows than its tokenizer tokens: padding, which no text holds."""
    tokens = self_generated(tiny_model("llama", vocab_size=900), tokenizer, num_sequences=16, length=24, seed=0)
    assert int(tokens.max()) < len(tokenizer)


def test_generated_text_follows_the_model(tokenizer: PreTrainedTokenizerBase) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[7] = 100 * model.model.norm.weight.sign()
        model.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight.abs() + 5)
    tokens = self_generated(model, tokenizer, num_sequences=2, length=10, seed=0)
    assert int((tokens[:, 2:] == 7).sum()) > 8


@pytest.mark.parametrize("family", FAMILIES)
def test_every_generated_token_is_what_the_model_says_about_those_before_it(
    family: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    uncapped = {"final_logit_softcapping": None} if family == "gemma2" else {}  # with a cap nothing is certain
    model = tiny_model(family, **uncapped)
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(1e4 * head.weight)  # as good as certain of one token, and not tied any more
    tokens = self_generated(model, tokenizer, num_sequences=40, length=24, seed=0)
    with torch.no_grad():
        logits = model(tokens[:, :-1]).logits[:, 1:]
    logits[:, :, tokenizer.all_special_ids + list(range(len(tokenizer), logits.shape[-1]))] = -torch.inf
    same = (logits.argmax(-1) == tokens[:, 2:])[::2]  # every second one begins with an opening, which is given
    assert float(same.float().mean()) > 0.9  # reduced precision decides near ties


def test_every_second_generated_sequence_begins_like_some_document(tokenizer: PreTrainedTokenizerBase) -> None:
    openings = [tokenizer.encode(text, add_special_tokens=False) for text in OPENINGS]
    tokens = self_generated(tiny_model("llama"), tokenizer, num_sequences=40, length=48, seed=0)
    begun = [{i for i, ids in enumerate(openings) if row[1 : 1 + len(ids)] == ids} for row in tokens[1::2].tolist()]
    assert all(begun)
    assert len(set.union(*begun)) > 10


def test_generated_text_of_a_tokenizer_without_a_start_token(tmp_path: Path) -> None:
    bare = tiny_tokenizer(tmp_path)
    bare.bos_token = None
    tokens = self_generated(tiny_model("llama"), bare, num_sequences=3, length=8, seed=0)
    assert tokens.shape == (3, 8)


def test_text_shorter_than_one_sequence_is_invalid_input(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(InvalidInput, match="x: 1 tokens are fewer than one sequence of 12"):
        sequences("the fox"[:3], tokenizer, length=12, name="x")


def test_text_of_too_few_sequences_is_invalid_input(tokenizer: PreTrainedTokenizerBase, words: Path) -> None:
    options = replace(SMALL, source=str(words), train_sequences=10_000)
    with pytest.raises(InvalidInput, match=r"sequences of 12 tokens, but 10004 are needed; give more text"):
        calibrated(tokenizer, options)


def test_sequences_are_consecutive(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = tokenizer(WORDS, add_special_tokens=False).input_ids
    found = sequences(WORDS, tokenizer, length=10, name="x")
    assert found.reshape(-1).tolist() == ids[: found.numel()]
    assert len(ids) - found.numel() < 10


def test_sequences_begin_as_the_tokenizer_begins_a_text(tmp_path: Path) -> None:
    begins = tiny_tokenizer(tmp_path)
    ids = begins(WORDS, add_special_tokens=False).input_ids
    first = begins.bos_token_id
    begins.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{begins.bos_token} $A", special_tokens=[(begins.bos_token, first)]
    )
    found = sequences(WORDS, begins, length=10, name="x")
    assert set(found[:, 0].tolist()) == {first}
    assert found[:, 1:].reshape(-1).tolist() == ids[: 9 * len(found)]


def test_evaluation_text_has_the_number_of_sequences_asked_for(tokenizer: PreTrainedTokenizerBase) -> None:
    found = evaluation_text("python-docs", tokenizer, num_sequences=3, length=16)
    assert found.tokens.shape == (3, 16)
    assert found.sha256 == evaluation_text("python-docs", tokenizer, num_sequences=3, length=16).sha256

"""Calibration and evaluation text, as token ids."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.func import functional_call
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StaticCache

from dilap.core.errors import InvalidInput
from dilap.models.compute import product_type
from dilap.models.compute_device import HOST
from dilap.models.context import require_sequences
from dilap.models.options import CalibrationOptions
from dilap.models.reference import draw
from dilap.models.text_files import read_documents, read_text
from dilap.models.windows import CORPORA, published_windows

_ANY = -1  # a token that is to be sampled
_MOST_TO_TRAIN_ON = 60_000  # documents of a hub set: Alpaca's 52,000 and a little more
_SEQUENCES_AT_ONCE = 32  # in a 7B model without grouped heads their keys and values take 4 GiB
# First words of documents of many kinds: prose, letters, news, papers, notes, lists, tables, questions, mathematics,
# code. KL of SmolLM2-135M at 70 %, 128 sequences, on Python's documentation and WikiText-2: with random first tokens
# alone 1.157 and 1.061, with half of the sequences from these openings 0.982 and 1.021.
OPENINGS = (
    "The", "In", "Once upon a time", "Chapter 1\n\n", '"', "Dear", "Breaking news:", "According to", "Review:",
    "Abstract\n\n", "#", "## Introduction\n\n", "Table of Contents\n\n", "Note:", "1.", "-", "|", "Ingredients:\n",
    "Q:", "How to", "What is", "Step 1:", "Theorem 1.", "Let x be",
    "def", "class", "import", "#include <", "function", "SELECT", "<html>", "{\n",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Calibration text as token ids (sequences x length), in two splits that share no sequence."""

    name: str
    train: torch.Tensor
    validation: torch.Tensor

    @property
    def sha256(self) -> str:
        return _ids_sha256(torch.cat([self.train, self.validation]))


@dataclass(frozen=True, kw_only=True)
class EvaluationText:
    """Text that no search saw, as token ids (sequences x length), with its name and its digest."""

    name: str
    tokens: torch.Tensor

    @property
    def sha256(self) -> str:
        return _ids_sha256(self.tokens)


def _ids_sha256(tokens: torch.Tensor) -> str:
    return hashlib.sha256(tokens.to(torch.int32).numpy().tobytes()).hexdigest()


def calibration(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    options: CalibrationOptions,
    *,
    progress: Callable[[int], None] = lambda _: None,
) -> Calibration:
    """Return calibration text from the source that `options` names. Raises InvalidInput where it is too short."""
    length = options.sequence_length
    require_sequences(model.config, length)
    count = options.train_sequences + options.validation_sequences
    if options.source == "self":
        tokens = self_generated(
            model, tokenizer, num_sequences=count, length=length, seed=options.seed, progress=progress
        )
    elif options.source in CORPORA:
        return Calibration(name=options.source, **_corpus_windows(options, tokenizer))
    else:
        tokens = _file_sequences(options, tokenizer)
        order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(options.seed))
        tokens = tokens[order[:count]]
    return Calibration(
        name=options.source, train=tokens[: options.train_sequences], validation=tokens[options.train_sequences :]
    )


def require_texts(options: CalibrationOptions, evaluation: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise InvalidInput, before hours of work begin, where a text cannot be read or is too short."""
    if options.source in CORPORA:
        _corpus_windows(options, tokenizer)
    elif options.source != "self":
        _file_sequences(options, tokenizer)
    evaluation_text(evaluation, tokenizer, num_sequences=1, length=options.sequence_length)


def _corpus_windows(options: CalibrationOptions, tokenizer: PreTrainedTokenizerBase) -> dict[str, torch.Tensor]:
    train, validation = published_windows(
        options.source,
        tokenizer,
        train=options.train_sequences,
        validation=options.validation_sequences,
        length=options.sequence_length,
        seed=options.seed,
        data_dir=None if options.data_dir is None else Path(options.data_dir).expanduser(),
    )
    return {"train": train, "validation": validation}


def _file_sequences(options: CalibrationOptions, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    length, count = options.sequence_length, options.train_sequences + options.validation_sequences
    tokens = sequences(read_text(options.source), tokenizer, length=length, name=options.source)
    if len(tokens) < count:
        raise InvalidInput(
            f"{options.source}: {len(tokens)} sequences of {length} tokens, but {count} are needed; "
            "give more text, or take a smaller --calib-length or fewer --calib-sequences"
        )
    return tokens


@torch.no_grad()
def self_generated(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    num_sequences: int,
    length: int,
    seed: int,
    progress: Callable[[int], None] = lambda _: None,
) -> torch.Tensor:
    """Sample text from the model itself (sequences x length), which needs no data and is of what the model knows.

    Half of the sequences begin with a random token (LLM-QAT, arXiv 2305.17888), half with one of `OPENINGS`. Tokens are
    drawn from the model's distribution as it is, at temperature 1. `progress` gets the number of tokens sampled.
    """
    generator = torch.Generator().manual_seed(seed)
    special = set(tokenizer.all_special_ids)
    ordinary = torch.tensor([t for t in range(min(len(tokenizer), model.config.vocab_size)) if t not in special])
    banned = torch.ones(model.config.vocab_size, dtype=torch.bool)  # special tokens, and rows that no token has
    banned[ordinary] = False
    starts = _starts(tokenizer, ordinary, shape=(num_sequences, length), generator=generator).to(model.device)
    banned = banned.to(model.device)
    # Converted once, and not for every token; all to one type, which the static cache needs.
    weights = {name: weight.to(product_type(weight.dtype, weight.device)) for name, weight in model.named_parameters()}

    def sample(tokens: torch.Tensor, cache: StaticCache) -> torch.Tensor:
        inputs = {"input_ids": tokens, "past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
        logits = functional_call(model, weights, kwargs=inputs).logits[:, -1].float()
        logits[:, banned] = -torch.inf  # an end-of-text token would only be followed by another document
        progress(len(tokens))
        # At temperature 1: KL of SmolLM2-135M at 85 %, 64 sequences, on Python's documentation and WikiText-2 is
        # 0.669 and 0.749 for a temperature of 0.8, 0.596 and 0.627 for 1.0, 0.612 and 0.630 for 1.2, and 0.688 and
        # 0.671 for 1.5.
        return draw(logits.softmax(-1), generator=generator)

    finished = []
    for few in starts.split(_SEQUENCES_AT_ONCE):
        cache, steps = StaticCache(config=model.config, max_cache_len=length), [few[:, :1]]
        for given in few[:, 1:].split(1, dim=1):
            steps.append(torch.where(given == _ANY, sample(steps[-1], cache), given))
        finished.append(torch.cat(steps, 1))
    return torch.cat(finished).to(HOST)


def _starts(
    tokenizer: PreTrainedTokenizerBase, ordinary: torch.Tensor, *, shape: tuple[int, int], generator: torch.Generator
) -> torch.Tensor:
    """Return the first tokens of each sequence, start token included, with `_ANY` behind them (sequences x length)."""
    known = set(ordinary.tolist())
    openings = [
        [token for token in tokenizer.encode(text, add_special_tokens=False) if token in known] for text in OPENINGS
    ]
    before = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    starts = torch.full(shape, _ANY)
    for number, row in enumerate(starts):
        kind = int(torch.randint(len(openings), (1,), generator=generator))
        token = int(ordinary[torch.randint(len(ordinary), (1,), generator=generator)])
        opening = openings[kind] if number % 2 else []
        start = torch.tensor([*before, *(opening or [token])])[: len(row)]
        row[: len(start)] = start
    return starts


def sequences(text: str, tokenizer: PreTrainedTokenizerBase, *, length: int, name: str) -> torch.Tensor:
    """Return `text` as consecutive sequences of `length` tokens (sequences x length); the rest is dropped.

    Each begins with what the tokenizer puts before a text: without its first token Gemma predicts next to nothing.
    Raises InvalidInput, with `name`, where there is not even one.
    """
    ids, *short = (
        tokenizer(one, add_special_tokens=special, verbose=False)["input_ids"]
        for one, special in ((text, False), ("x", True), ("x", False))
    )
    rows = consecutive(ids, beginning(*short), length=length)
    if not rows:
        raise InvalidInput(f"{name}: {len(ids)} tokens are fewer than one sequence of {length}")
    return torch.tensor(rows)


def beginning(ids: Sequence[int], bare: Sequence[int]) -> list[int]:
    """Return the tokens that a tokenizer puts before a text, given a text with special tokens and without."""
    starts = range(len(ids) - len(bare) + 1)
    return list(ids[: next((at for at in starts if list(ids[at : at + len(bare)]) == list(bare)), 0)])


def consecutive(ids: Sequence[int], before: Sequence[int], *, length: int) -> list[list[int]]:
    """Return tokens as rows of `length` that all begin with `before`; a rest is dropped."""
    own = length - len(before)
    return [[*before, *ids[at : at + own]] for at in range(0, len(ids) - own + 1, own)]


def training_text(name: str, tokenizer: PreTrainedTokenizerBase, *, length: int) -> torch.Tensor:
    """Return text that methods train on (sequences x length), of a file or a hub set: an instruction set, for one."""
    text = "\n\n".join(read_documents(name, most=_MOST_TO_TRAIN_ON))
    return sequences(text, tokenizer, length=length, name=name)


def evaluation_text(
    name: str, tokenizer: PreTrainedTokenizerBase, *, num_sequences: int, length: int
) -> EvaluationText:
    """Return the first `num_sequences` sequences of a text that `dilap.models.text_files.read_text` takes by `name`."""
    tokens = sequences(read_text(name)[: num_sequences * length * 16], tokenizer, length=length, name=name)
    return EvaluationText(name=name, tokens=tokens[:num_sequences])

"""Tiny encoders of texts with random weights, and a tokenizer for them that knows the letters."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

from dilap.core.graph import Network
from dilap.core.network_input import TokenInput
from dilap.models.convolutional.network import traced
from dilap.models.convolutional.proof import stand_in
from dilap.models.network import outputs_of, random_examples
from tools.tiny_networks import TEXT_SIZES, bert, roberta

INPUT = TokenInput(length=12)
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
VOCABULARY = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *_LETTERS, *(f"##{one}" for one in _LETTERS))
SENTENCES = (
    "the cat sat on the mat",
    "a dog ran",
    "rain falls on the long road to the old town by the sea",
    "who is there",
    "we sing",
    "stones do not swim",
)


def classifier() -> Any:
    return BertForSequenceClassification(BertConfig(**TEXT_SIZES, num_labels=3))


ENCODERS: dict[str, Callable[[], Any]] = {"bert": bert, "roberta": roberta, "classifier": classifier}


def encoder(name: str = "bert") -> Any:
    """Return an encoder in which every tensor matters."""
    torch.manual_seed(0)
    return stand_in(ENCODERS[name]()).float()


def shape_of(model: nn.Module) -> Network:
    return traced(model, input_size=INPUT.size, name="tiny").network


@functools.cache
def shape(name: str = "bert") -> Network:
    return shape_of(encoder(name))


def texts(count: int = 4, *, model: nn.Module | None = None) -> torch.Tensor:
    """Random tokens; every text has another length."""
    return random_examples(encoder() if model is None else model, INPUT.size, count, seed=1)


@torch.no_grad()
def output(model: nn.Module) -> torch.Tensor:
    return outputs_of(model, texts(model=model))[0]


def write_tokenizer(folder: Path) -> BertTokenizer:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY))
    tokenizer = BertTokenizer(vocab=str(folder / "vocab.txt"))
    tokenizer.save_pretrained(folder)
    return tokenizer

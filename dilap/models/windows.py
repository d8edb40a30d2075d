"""Calibration text as papers on pruning have it: random windows of C4, WikiText-2 or Penn Treebank.

The windows are those of the loaders that GPTQ, SparseGPT, Wanda and their successors share: drawn with Python's own
generator, so that one seed gives the same windows everywhere. They are cut out of texts, so they do not begin with a
start token.
"""

import contextlib
import importlib
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from dilap.core.errors import InvalidInput, Unavailable, reason_of
from dilap.models.text_files import PLAIN, READERS, hub_documents, read_documents

_ATTEMPTS = 1000  # draws of one window until it shares no token with the earlier ones


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """A text that papers calibrate on: `folder` is a pattern for its name in the user's folder of data.

    Windows are drawn from single documents, or, where it `is_joined`, from all rows joined by spaces. `strips` removes
    the white space around rows first. `hub` and `revision` name the data set on the hub.
    """

    folder: str
    hub: str
    revision: str | None = None
    is_joined: bool = True
    strips: bool = False

    def joined(self, documents: Sequence[str]) -> str:
        """Return all rows joined by spaces; a blank row is empty, as in the data sets on the hub."""
        rows = (row for document in documents for row in _rows(document))
        return " ".join(row.strip() if self.strips else row for row in rows)


CORPORA: Mapping[str, Corpus] = {
    "c4": Corpus(folder="c4*", hub="allenai/c4", is_joined=False),
    "wikitext2": Corpus(folder="wikitext*", hub="Salesforce/wikitext:wikitext-2-raw-v1"),
    "ptb": Corpus(
        folder="ptb*", hub="ptb-text-only/ptb_text_only:penn_treebank", revision="refs/convert/parquet", strips=True
    ),
}


def published_windows(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    train: int,
    validation: int,
    length: int,
    seed: int,
    data_dir: Path | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return two splits (windows x length) of a corpus in `CORPORA`, from files in `data_dir` or else from the hub.

    The windows of the first are drawn as in the papers and may overlap; those of the second share no token with any.
    Raises InvalidInput where the files are absent or hold too little, Unavailable where the hub is out of reach.
    """
    corpus = CORPORA[name]
    if data_dir is None and name == "c4":
        return _through_optimum(name, tokenizer, train=train, validation=validation, length=length, seed=seed)
    source = corpus.hub if data_dir is None else str(corpus_file(name, data_dir))
    documents = hub_documents(corpus.hub, revision=corpus.revision) if data_dir is None else read_documents(source)
    drawn = _Windows(
        texts=[corpus.joined(documents)] if corpus.is_joined else documents,
        tokenizer=tokenizer,
        length=length,
        generator=random.Random(seed),
        source=source,
    )
    return drawn.split(train), drawn.split(validation, apart=True)


def corpus_file(name: str, data_dir: Path) -> Path:
    """Return the file of a corpus in a folder of data: `c4/train.jsonl.gz`, for one. Raises InvalidInput without one.

    The folder's name begins like the corpus (`c4`, `wikitext`, `ptb`), the file's with `train`.
    """
    readable = (*PLAIN, *READERS)
    for path in sorted(data_dir.glob(f"{CORPORA[name].folder}/train*")):
        if path.name.removesuffix(".gz").endswith(readable):
            return path
    raise InvalidInput(
        f"{data_dir} has no {CORPORA[name].folder}/train* for {name}; files read are {' '.join(readable)}, each with "
        ".gz too"
    )


def _rows(document: str) -> list[str]:
    """Return the lines of a document with their line feeds, blank ones empty; an empty document is one such line."""
    *lines, last = document.split("\n")
    rows = [f"{line}\n" for line in lines] + [last] * bool(last)
    return [row if row.strip() else "" for row in rows] or [""]


@dataclass(frozen=True, kw_only=True)
class _Windows:
    """Draws windows of `length` tokens from texts, one after another; `drawn` are the text and the start of each."""

    texts: Sequence[str]
    tokenizer: PreTrainedTokenizerBase
    length: int
    generator: random.Random
    source: str
    drawn: list[tuple[int, int]] = field(default_factory=list)
    ids: dict[int, torch.Tensor] = field(default_factory=dict)
    short: set[int] = field(default_factory=set)

    def split(self, count: int, *, apart: bool = False) -> torch.Tensor:
        """Return `count` more windows (windows x length); set `apart`, they share no token with any other."""
        first = len(self.drawn)
        for _ in range(count):
            self.drawn.append(self._apart() if apart else self._draw())
        rows = [self.ids[text][start : start + self.length] for text, start in self.drawn[first:]]
        return torch.stack(rows) if rows else torch.zeros(0, self.length, dtype=torch.int64)

    def _apart(self) -> tuple[int, int]:
        for _ in range(_ATTEMPTS):
            found = self._draw()
            if all(text != found[0] or abs(start - found[1]) >= self.length for text, start in self.drawn):
                return found
        raise InvalidInput(
            f"{self.source}: too little text for {len(self.drawn) + 1} windows of {self.length} tokens; give more, or "
            "take fewer --calib-sequences or a smaller --calib-length"
        )

    def _draw(self) -> tuple[int, int]:
        # The loaders draw no document where there is one text alone, which a generator notices.
        text = self._long_text() if len(self.texts) > 1 else self._require_long(0)
        return text, self.generator.randint(0, len(self.ids[text]) - self.length - 1)

    def _long_text(self) -> int:
        while True:
            text = self.generator.randint(0, len(self.texts) - 1)
            if self._is_long(text):
                return text
            if len(self.short) == len(self.texts):
                self._require_long(text)

    def _require_long(self, text: int) -> int:
        if self._is_long(text):
            return text
        raise InvalidInput(
            f"{self.source}: no document has more than {self.length} tokens; give longer ones, or take a smaller "
            "--calib-length"
        )

    def _is_long(self, text: int) -> bool:
        if text not in self.ids and text not in self.short:
            ids = self.tokenizer(self.texts[text], verbose=False)["input_ids"]
            if len(ids) > self.length:
                self.ids[text] = torch.tensor(ids)
            else:
                self.short.add(text)
        return text in self.ids


def _through_optimum(
    name: str, tokenizer: PreTrainedTokenizerBase, *, train: int, validation: int, length: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return windows of the hub's training and validation split, drawn by optimum's loaders of the GPTQ paper."""
    try:
        get_dataset: Any = importlib.import_module("optimum.gptq.data").get_dataset
    except ImportError:
        raise Unavailable(
            f"{name} from the hub needs optimum; run: pip install 'dilap[hub]'; or see --data-dir"
        ) from None

    def windows(split: str, count: int) -> torch.Tensor:
        rows = get_dataset(name, tokenizer, nsamples=count, seqlen=length, seed=seed, split=split)
        return torch.cat([torch.zeros(0, length, dtype=torch.int64), *(row["input_ids"] for row in rows)])

    try:
        with _same_generators():
            return windows("train", train), windows("validation", validation)
    except Exception as error:  # the hub client raises many types
        raise Unavailable(f"{name} cannot be had from the hub: {reason_of(error)}; see --data-dir") from error


@contextlib.contextmanager
def _same_generators() -> Iterator[None]:
    """Leave the global generators as they were: optimum seeds them."""
    python, arrays = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(arrays)

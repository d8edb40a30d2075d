"""Cut a model's vocabulary to the tokens that a text needs: tokenizer, embedding and head together."""

import json
import shutil
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from dilap.core.errors import InvalidInput
from dilap.core.shape import Architecture
from dilap.core.vocabulary import Growth, VocabularyCut
from dilap.models import vocabulary_texts as texts
from dilap.models.anatomy import architecture_of, model_digest
from dilap.models.bpe import Bpe
from dilap.models.families.family import has_tied_head
from dilap.models.pretrained import from_pretrained
from dilap.models.text_files import read_text, text_sha256
from dilap.models.text_samples import SAMPLES

# llama.cpp repacks 4-bit matrices for its fast kernels where their rows are a multiple of 8, AMX takes tiles of 32, and
# tensor cores multiples of 64.
_MULTIPLE = 64
_HELD_OUT = 0.1  # the share of a text, its end, on which is counted what such text loses with the tokens of the rest
# Files beside tokenizer.json that would say the whole vocabulary again, and entries that would undo what it says.
_OTHER_FILES = ("vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json", "tokenizer.model")
_OTHER_ENTRIES = ("added_tokens_decoder", "add_bos_token", "add_eos_token", "auto_map")
_LISTS_OF_TOKENS = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "force_words_ids")


class TemporaryFolder:
    """A folder that is there as long as this object, and is removed with it or at the end of the process."""

    def __init__(self) -> None:
        self.path = Path(mkdtemp(prefix="dilap-"))
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """A vocabulary that was cut to what a text needs, and what the model was before.

    `name` is the text's, as it was given; `kept` are the ids that the tokens had, ascending. `folder` holds the files
    of the smaller tokenizer, for exporters. `whole` and `whole_digest` are of the model with all tokens.
    """

    name: str
    kept: torch.Tensor
    tokenizer: PreTrainedTokenizerBase
    whole_tokenizer: PreTrainedTokenizerBase
    folder: TemporaryFolder
    facts: VocabularyCut
    whole: Architecture
    whole_digest: str

    def facts_on(self, name: str) -> VocabularyCut:
        """Return the facts with the growth of the beginning of another text, which `read_text` takes by its name."""
        text = read_text(name)
        if text_sha256(text) == self.facts.text_sha256:
            return self.facts
        found = texts.growth(self.whole_tokenizer, self.tokenizer, text[: texts.PIECE], name=Path(name).name)
        return replace(self.facts, growths=(*self.facts.growths, found))


def require_cuttable(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Raise Unsupported or InvalidInput for what `cut_vocabulary_` refuses, before gigabytes are read."""
    Bpe.of(tokenizer)
    read_text(name)


def cut_vocabulary_(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> Vocabulary:
    """Leave out of a model, in place, the rows of all tokens that the text `name` does not need.

    `tokenizer` stays as it is; the smaller one, in the answer, splits the text into the same tokens. All bytes, added
    tokens, those that the model's configs name and the words of the chat template stay too, and so many more that their
    number is a multiple of 64. Raises Unsupported for a tokenizer whose tokens cannot be left out, and InvalidInput for
    a text that cannot be read.
    """
    bpe, whole, digest = Bpe.of(tokenizer), architecture_of(model), model_digest(model)
    if (last := max(bpe.ids.values())) >= whole.vocab_size:
        raise InvalidInput(f"the tokenizer has {last + 1} tokens, the model {whole.vocab_size} embedding rows")
    named = _named_ids(model) & set(bpe.ids.values())
    folder, text = TemporaryFolder(), read_text(name)
    smaller, kept, growth = _cut_tokenizer(bpe, tokenizer, named, text, folder.path, name=Path(name).name)
    weights = _num_weights(model)
    _keep_rows_(model, torch.tensor(kept))
    facts = VocabularyCut(
        text=Path(name).name,
        text_sha256=text_sha256(text),
        tokens=len(kept),
        whole_tokens=whole.vocab_size,
        weights=_num_weights(model),
        whole_weights=weights,
        growths=growth,
    )
    _describe_(model, {old: index for index, old in enumerate(kept)}, facts)
    return Vocabulary(
        name=name,
        kept=torch.tensor(kept),
        tokenizer=smaller,
        whole_tokenizer=tokenizer,
        folder=folder,
        facts=facts,
        whole=whole,
        whole_digest=digest,
    )


def _cut_tokenizer(
    bpe: Bpe, tokenizer: PreTrainedTokenizerBase, named: set[int], text: str, folder: Path, *, name: str
) -> tuple[PreTrainedTokenizerBase, list[int], tuple[Growth, ...]]:
    """Return the tokenizer for `text`, the ids that its tokens had, and how the end of the text would have grown.

    Its files are in `folder`. Raises VerificationFailed where it splits the text in another way.
    """
    write_files_(tokenizer, folder)
    end = texts.break_after(text, round((1 - _HELD_OUT) * len(text)))
    halves = [[(one, texts.ids_of(tokenizer, one)) for one in texts.pieces(half)] for half in (text[:end], text[end:])]
    first, second = (set().union(*(np.unique(ids).tolist() for _, ids in half)) for half in halves)
    named = named.union(*(texts.ids_of(tokenizer, chat).tolist() for chat in texts.chats(tokenizer)))
    growth: tuple[Growth, ...] = ()
    if second:
        earlier, _ = _smaller(bpe, named | first, folder)
        growth = (
            texts.growth(tokenizer, earlier, text[end:], name=f"the last tenth of {name}, by the tokens of the rest"),
        )
    smaller, kept = _smaller(bpe, named | first | second, folder)
    for piece, ids in (*halves[0], *halves[1]):
        texts.require_same_tokens(smaller, piece, np.searchsorted(kept, ids).astype(np.int32))
    for sample in SAMPLES:
        texts.both_ids(tokenizer, smaller, sample)  # checks that they say the same text
    return smaller, kept, growth


def _smaller(bpe: Bpe, tokens: set[int], folder: Path) -> tuple[PreTrainedTokenizerBase, list[int]]:
    """Write the tokenizer that `tokens` need into `folder`; return it, and the ids that its tokens had."""
    kept = sorted(bpe.filled(bpe.needed(tokens), multiple=_MULTIPLE))
    (folder / "tokenizer.json").write_text(json.dumps(bpe.cut(kept), ensure_ascii=False), encoding="utf-8")
    return from_pretrained(PreTrainedTokenizerFast, folder), kept


def write_files_(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a tokenizer's files into `folder`, so that tokenizer.json alone says what its tokens are."""
    tokenizer.save_pretrained(folder)
    for name in _OTHER_FILES:
        (folder / name).unlink(missing_ok=True)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    own = {name: value for name, value in config.items() if name not in _OTHER_ENTRIES}
    path.write_text(json.dumps(own | {"tokenizer_class": "PreTrainedTokenizerFast"}), encoding="utf-8")


def _num_weights(model: PreTrainedModel) -> int:
    """Return the number of weights of embedding and head, those of a tied head once."""
    modules = (model.get_input_embeddings(), model.get_output_embeddings())
    return sum(one.numel() for one in {weight for module in modules for weight in module.parameters()})


def _keep_rows_(model: PreTrainedModel, kept: torch.Tensor) -> None:
    """Leave only the rows `kept` of the embedding and of the head with its bias; a tied head stays tied."""
    embedding, head, is_tied = model.get_input_embeddings(), model.get_output_embeddings(), has_tied_head(model)
    for module in (embedding, head):
        for name, old in list(module.named_parameters()):
            rows = old.detach().index_select(0, kept)
            setattr(module, name, nn.Parameter(rows, requires_grad=old.requires_grad))
    if is_tied:
        head.weight = embedding.weight
    embedding.num_embeddings = head.out_features = len(kept)


def _named_ids(model: PreTrainedModel) -> set[int]:
    """Return the ids that a model's configs name: of special tokens, and of those that it shall not generate."""
    return {index for _, _, value in _entries(model) for index in _flat(value)}


def _describe_(model: PreTrainedModel, new: Mapping[int, int], facts: VocabularyCut) -> None:
    """Let the configs say what the vocabulary is, and name the new ids; an id that no token had is named no more."""
    for config, name, value in list(_entries(model)):
        setattr(config, name, _renumbered(value, new))
    model.config.vocab_size = facts.tokens
    growth = next((one.factor for one in facts.growths), None)
    model.config.dilap_vocabulary = {
        "text": facts.text, "tokens": facts.tokens, "whole_tokens": facts.whole_tokens, "growth": growth
    }  # fmt: skip
    embedding: Any = model.get_input_embeddings()
    if embedding.padding_idx is not None:
        embedding.padding_idx = model.config.pad_token_id


def vocabulary_notes(config: PreTrainedConfig) -> list[str]:
    """Return the remarks that an artifact makes about a model whose vocabulary was cut."""
    said = getattr(config, "dilap_vocabulary", None)
    if said is None:
        return []
    grown = "" if said["growth"] is None else f" ({said['growth'] - 1:+.1%} on more of such text)"
    return [
        f"its vocabulary was cut to what {said['text']} needs, {said['tokens']:,} of {said['whole_tokens']:,} tokens: "
        f"other words take more tokens than in the whole model{grown}"
    ]


def _entries(model: PreTrainedModel) -> Iterator[tuple[Any, str, Any]]:
    """Yield each config of a model with the names and values of its entries that are ids of tokens."""
    for config in (model.config, model.generation_config):
        for name, value in ({} if config is None else config.to_dict()).items():
            if value is not None and (name.endswith(("_token_id", "_token_ids")) or name in _LISTS_OF_TOKENS):
                yield config, name, value


def _flat(value: Any) -> Iterator[int]:
    if isinstance(value, list):
        for one in value:
            yield from _flat(one)
    else:
        yield value


def _renumbered(value: Any, new: Mapping[int, int]) -> Any:
    if isinstance(value, list):
        return [one for one in (_renumbered(one, new) for one in value) if one is not None]
    return new.get(value)

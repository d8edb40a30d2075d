"""A BPE tokenizer with fewer tokens splits what it was cut for as before, and says every other text with bytes."""

import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from standins.tokenizers import LLAMA3_SPLIT, byte_level, sentencepiece_folder, sentencepiece_pieces, split_by
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from dilap.core.errors import Unsupported
from dilap.models.bpe import Bpe
from dilap.models.load import load_tokenizer
from dilap.models.text_samples import SAMPLES

Make = Callable[[str], PreTrainedTokenizerBase]
KINDS = ("gpt-2", "llama-3", "llama", "mistral", "gemma")
TEXT = "The quick brown fox jumps over the lazy dog.\n\nThey've paid $1,999.99 in 2024: it isn't the dog's fault, said."
SCRIPTS = (*SAMPLES, "Ångström ﬁ ①", "👩‍👩‍👧\u200d🏽 🇩🇪", "ᚠᛇᚻ ⅷ \U00020000", "a\u0000b\x7f\u2028")


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Makes the tokenizer of a kind, with all its tokens."""
    folder = tmp_path_factory.mktemp("words")
    pieces = sentencepiece_pieces(folder)
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte_level(folder / "gpt-2", gpt2, eos_token="<|end|>")
    byte_level(folder / "llama-3", split_by(LLAMA3_SPLIT), ignores_merges=True, eos_token="<|end|>")
    for kind, style in (("llama", "llama"), ("mistral", "mistral"), ("gemma", "bare")):
        sentencepiece_folder(folder / kind, pieces, style=style)
    return lambda kind: load_tokenizer(folder / kind)


def ids(tokenizer: PreTrainedTokenizerBase | Tokenizer, text: str) -> list[int]:
    found: list[int]
    if isinstance(tokenizer, Tokenizer):
        found = tokenizer.encode(text, add_special_tokens=False).ids
    else:
        found = tokenizer(text, add_special_tokens=False)["input_ids"]
    return found


def cut_for(whole: PreTrainedTokenizerBase, text: str) -> tuple[Tokenizer, list[int]]:
    """The tokenizer that `text` needs, and the ids that its tokens had."""
    bpe = Bpe.of(whole)
    kept = sorted(bpe.needed(ids(whole, text)))
    return Tokenizer.from_str(json.dumps(bpe.cut(kept))), kept


@pytest.mark.parametrize("kind", KINDS)
def test_the_text_is_split_as_before(kind: str, make: Make) -> None:
    whole = make(kind)
    for text in (TEXT, *SAMPLES):
        smaller, kept = cut_for(whole, text)
        assert len(kept) < 0.75 * len(whole)
        assert [kept[index] for index in ids(smaller, text)] == ids(whole, text), text


@pytest.mark.parametrize("kind", KINDS)
def test_other_scripts_are_the_same_text_in_more_tokens(kind: str, make: Make) -> None:
    whole = make(kind)
    smaller, _ = cut_for(whole, TEXT)
    for text in SCRIPTS:
        assert smaller.decode(ids(smaller, text)) == whole.decode(ids(whole, text)), text
    assert len(ids(smaller, SCRIPTS[4])) > len(ids(whole, SCRIPTS[4]))


@pytest.mark.parametrize("kind", ["gpt-2", "llama"])
def test_without_the_tokens_on_the_way_the_text_is_split_finer(kind: str, make: Make) -> None:
    """The course to a token cannot be left out, as the tokens of the text alone would do."""
    whole = make(kind)
    bpe = Bpe.of(whole)
    kept = sorted(bpe.always.union(ids(whole, TEXT)))
    assert len(ids(Tokenizer.from_str(json.dumps(bpe.cut(kept))), TEXT)) > len(ids(whole, TEXT))


def test_a_word_that_is_taken_whole_keeps_its_course(make: Make) -> None:
    """Not every runtime ignores merges where a word is a token."""
    whole = make("llama-3")
    smaller, _ = cut_for(whole, TEXT)
    document = json.loads(smaller.to_str())
    assert document["model"]["ignore_merges"]
    document["model"]["ignore_merges"] = False
    merging = Tokenizer.from_str(json.dumps(document))
    assert ids(merging, TEXT) == ids(smaller, TEXT)


def test_a_word_that_no_merges_lead_to_is_still_taken_whole(make: Make) -> None:
    """Llama 3's vocabulary has such words."""
    document = json.loads(make("llama-3").backend_tokenizer.to_str())
    document["model"]["merges"] = [one for one in document["model"]["merges"] if "".join(one) != "Ġquick"]
    whole = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(document)), eos_token="<|end|>")
    smaller, kept = cut_for(whole, TEXT)
    assert [kept[index] for index in ids(smaller, TEXT)] == ids(whole, TEXT)
    assert "Ġquick" in smaller.encode(TEXT).tokens


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_consecutive_and_in_their_order(kind: str, make: Make) -> None:
    smaller, kept = cut_for(make(kind), TEXT)
    words = make(kind).convert_ids_to_tokens(kept)
    assert [smaller.id_to_token(index) for index in range(len(kept))] == words


@pytest.mark.parametrize("kind", ["llama", "gemma"])
def test_what_is_put_before_a_text_has_its_new_id(kind: str, make: Make) -> None:
    whole = make(kind)
    document = json.loads(whole.backend_tokenizer.to_str())
    document["added_tokens"].append({**document["added_tokens"][1], "id": len(whole), "content": "<first>"})
    document["post_processor"] = json.loads(
        processors.Sequence(
            [processors.TemplateProcessing(single="<first> $A", special_tokens=[("<first>", len(whole))])]
        ).__getstate__()
    )
    whole = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(document)))
    smaller, kept = cut_for(whole, TEXT)
    encoded = smaller.encode(TEXT)
    assert kept[encoded.ids[0]] == len(document["model"]["vocab"])
    assert encoded.tokens[0] == "<first>" == smaller.id_to_token(encoded.ids[0])


def test_roberta_processing_has_the_new_ids(make: Make) -> None:
    whole = make("gpt-2")
    end = ("<|end|>", whole.convert_tokens_to_ids("<|end|>"))
    document = json.loads(whole.backend_tokenizer.to_str())
    document["post_processor"] = json.loads(processors.RobertaProcessing(end, ("z", 90)).__getstate__())
    bpe = Bpe(document=document, ids=document["model"]["vocab"], merges=[])
    processor = bpe.cut([0, *range(2, 256)])["post_processor"]
    assert (processor["sep"], processor["cls"]) == (["<|end|>", 0], ["z", 89])


def test_the_number_of_tokens_is_filled_up_by_the_first_merges(make: Make) -> None:
    bpe = Bpe.of(make("gpt-2"))
    needed = bpe.needed([])
    filled = bpe.filled(needed, multiple=64)
    assert len(filled) % 64 == 0
    assert len(needed) > 256
    added = [bpe.ids[left + right] for left, right in bpe.merges][: len(filled) - len(needed)]
    assert filled - needed == set(added)


def test_a_vocabulary_that_cannot_be_filled_up_stays_whole(make: Make) -> None:
    bpe = Bpe.of(make("gpt-2"))
    every = set(bpe.ids.values())
    assert len(every) % 64
    assert bpe.filled(every, multiple=64) == every


def of(words: Tokenizer) -> PreTrainedTokenizerBase:
    return PreTrainedTokenizerFast(tokenizer_object=words)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (
            models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0),
            "a Unigram tokenizer cannot be cut, only that of BPE",
        ),
        (models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"), "a WordPiece tokenizer cannot be cut"),
        (models.BPE({"a": 0}, []), "a tokenizer without bytes cannot be cut"),
        (models.BPE({"a": 0}, [], byte_fallback=True), "a tokenizer without bytes cannot be cut"),
        (models.BPE({"a</w>": 0}, [], end_of_word_suffix="</w>"), r"marks parts of words \('</w>'\) cannot be cut"),
    ],
    ids=["unigram", "wordpiece", "without bytes", "bytes that are not there", "ends of words"],
)
def test_a_tokenizer_that_could_lose_text_is_refused(model: Any, reason: str) -> None:
    with pytest.raises(Unsupported, match=reason):
        Bpe.of(of(Tokenizer(model)))


def test_merges_of_older_files_are_read(make: Make) -> None:
    """Before tokenizers 0.20 a merge was one text."""
    document = json.loads(make("gpt-2").backend_tokenizer.to_str())
    pairs: Sequence[Sequence[str]] = document["model"]["merges"]
    document["model"]["merges"] = [" ".join(pair) for pair in pairs]
    words = Tokenizer.from_str(json.dumps(document))
    assert [list(pair) for pair in Bpe.of(of(words)).merges] == list(pairs)


def test_a_byte_level_normaliser_has_bytes_too() -> None:
    words = Tokenizer(models.BPE({letter: i for i, letter in enumerate(pre_tokenizers.ByteLevel.alphabet())}, []))
    words.normalizer, words.decoder = normalizers.ByteLevel(), decoders.ByteLevel()
    assert len(Bpe.of(of(words)).always) == 256

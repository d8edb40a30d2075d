"""A model with a cut vocabulary computes what the whole one does for the tokens that it kept."""

import gc
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from standins.models import FAMILIES, logits, needs_llamacpp, random_tokens, tiny_model
from standins.tokenizers import SENTENCEPIECE_SIZE, byte_level, sentencepiece_folder, sentencepiece_pieces
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from dilap import export
from dilap.core.errors import InvalidInput, Unsupported
from dilap.models import vocabulary_texts
from dilap.models.anatomy import architecture_of
from dilap.models.load import Source, load, save_checkpoint

TEXT = "The quick brown fox jumps over the lazy dog.\n\nIt isn't the dog's fault, they've said; we see a fox.\n\n" * 20
TEMPLATE = "{% for m in messages %}<|turn|>{{ m['role'] }}\nZürich: {{ m['content'] }}{% endfor %}"
ROWS = 768  # of the embedding: more than the 744 tokens


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a byte-level tokenizer with a chat template."""
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
    folder = byte_level(tmp_path_factory.mktemp("words"), gpt2, eos_token="<|end|>", pad_token="<|pad|>")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def given(folder: Path, words: Path, model: PreTrainedModel, text: str = TEXT) -> tuple[str, Path]:
    """A model in `folder` as a user would have it, and the text that is needed."""
    save_checkpoint(model, AutoTokenizer.from_pretrained(words), folder / "model")
    (folder / "needs.txt").write_text(text, encoding="utf-8")
    return str(folder / "model"), folder / "needs.txt"


def both(folder: Path, words: Path, model: PreTrainedModel, text: str = TEXT) -> tuple[Source, Source]:
    """The model as it was given, and with its vocabulary cut."""
    name, needs = given(folder, words, model, text)
    return load(name), load(name, vocabulary=needs)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_the_whole_models_for_the_kept_tokens(family: str, tied: bool, words: Path, tmp_path: Path) -> None:
    whole, cut = both(tmp_path, words, tiny_model(family, vocab_size=ROWS, tie_word_embeddings=tied))
    kept = cut.vocabulary.kept if cut.vocabulary else torch.empty(0)
    tokens = random_tokens(2, 12, vocab_size=len(kept))
    assert_close(logits(cut.model, tokens), logits(whole.model, kept[tokens])[..., kept], rtol=0, atol=1e-6)


@pytest.mark.parametrize("tied", [True, False])
def test_the_architecture_has_the_rows_that_are_left(tied: bool, words: Path, tmp_path: Path) -> None:
    whole, cut = both(tmp_path, words, tiny_model("llama", vocab_size=ROWS, tie_word_embeddings=tied))
    before, after = architecture_of(whole.model), architecture_of(cut.model)
    assert cut.vocabulary is not None
    assert before == cut.vocabulary.whole
    assert after.vocab_size == len(cut.tokenizer) == cut.model.config.vocab_size == 384
    assert after.tied_embeddings is tied
    facts = cut.vocabulary.facts
    assert facts.whole_weights - facts.weights == before.num_parameters - after.num_parameters
    assert sum(p.numel() for p in cut.model.parameters()) == after.num_parameters


def test_no_row_without_a_token_stays(words: Path, tmp_path: Path) -> None:
    """A text that needs all tokens still needs no padding."""
    every = AutoTokenizer.from_pretrained(words).batch_decode([[index] for index in range(256, 744)])
    _, cut = both(tmp_path, words, tiny_model("llama", vocab_size=ROWS), text=" . ".join(every))
    assert cut.model.config.vocab_size <= 744


def test_special_tokens_of_the_configs_have_their_new_ids(words: Path, tmp_path: Path) -> None:
    model = tiny_model("llama", vocab_size=ROWS, pad_token_id=1, eos_token_id=[0, 700], bos_token_id=760)
    model.generation_config.suppress_tokens = [0, 600]
    model.generation_config.bad_words_ids = [[650, 1]]
    whole, cut = both(tmp_path, words, model)

    def texts(source: Source, ids: list[int]) -> Any:
        return source.tokenizer.convert_ids_to_tokens(ids)

    for name in ("eos_token_id", "suppress_tokens"):
        mine, theirs = (getattr(one.model.generation_config, name) for one in (cut, whole))
        assert texts(cut, mine) == texts(whole, theirs)
        assert mine != theirs
    assert texts(cut, cut.model.generation_config.bad_words_ids[0]) == texts(whole, [650, 1])
    assert texts(cut, cut.model.config.eos_token_id) == texts(whole, [0, 700])
    assert cut.model.get_input_embeddings().padding_idx == cut.model.config.pad_token_id == 1
    assert cut.model.config.bos_token_id is None  # a row that no token has


def test_the_checkpoint_is_a_stock_one(words: Path, tmp_path: Path) -> None:
    whole, cut = both(tmp_path, words, tiny_model("llama", vocab_size=ROWS))
    save_checkpoint(cut.model, cut.tokenizer, tmp_path / "cut")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "cut").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "cut")
    assert cut.vocabulary is not None
    expected = whole.tokenizer(TEXT)["input_ids"]
    assert cut.vocabulary.kept[tokenizer(TEXT)["input_ids"]].tolist() == expected
    tokens = torch.tensor([tokenizer(TEXT)["input_ids"][:20]])
    assert_close(logits(model, tokens), logits(cut.model, tokens), rtol=0, atol=0)
    assert tokenizer.chat_template == TEMPLATE
    assert load(str(tmp_path / "cut")).digest == cut.digest


def test_a_chat_is_written_as_the_template_does(words: Path) -> None:
    chats = vocabulary_texts.chats(AutoTokenizer.from_pretrained(words))
    assert "<|turn|>user\nZürich: a<|turn|>assistant\nZürich: a" in chats[-1]


def test_the_words_of_the_chat_template_stay(words: Path, tmp_path: Path) -> None:
    whole, cut = both(tmp_path, words, tiny_model("llama", vocab_size=ROWS))
    chat = [{"role": "user", "content": "the fox"}]
    mine, theirs = (len(one.tokenizer.apply_chat_template(chat)["input_ids"]) for one in (cut, whole))
    assert mine == theirs
    assert len(cut.tokenizer("Привет")["input_ids"]) > len(whole.tokenizer("Привет")["input_ids"])


def test_a_template_that_names_the_day_gives_the_same_vocabulary_every_day(words: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(words)
    tokenizer.chat_template = {"default": "{{ strftime_now('%d %b %Y') }}", "tools": "{{ raise_exception('none') }}"}
    assert set(vocabulary_texts.chats(tokenizer)) == {"26 Jul 2024"}


def test_the_callers_tokenizer_stays_as_it_was(words: Path, tmp_path: Path) -> None:
    whole, cut = both(tmp_path, words, tiny_model("llama", vocab_size=ROWS))
    assert cut.vocabulary is not None
    assert cut.vocabulary.whole_tokenizer.get_vocab() == whole.tokenizer.get_vocab()


def test_what_the_end_of_the_text_loses_is_counted_by_the_tokens_of_the_rest(words: Path, tmp_path: Path) -> None:
    known, new = "the fox and the dog " * 90, "WE'LL see naïf coûte Zürich said they've jumps over lazy " * 4
    whole, cut = both(tmp_path, words, tiny_model("llama", vocab_size=ROWS), text=known + new)
    assert cut.vocabulary is not None
    (growth,) = cut.vocabulary.facts.growths
    begin, end = (known + new)[: -growth.characters], (known + new)[-growth.characters :]
    name, needs = given(tmp_path / "begin", words, whole.model, text=begin)
    earlier = load(name, vocabulary=needs)
    before, after = (one.tokenizer(end)["input_ids"] for one in (whole, earlier))
    assert (growth.whole_tokens, growth.tokens) == (len(before), len(after))
    assert growth.factor > 1.1
    finer = [
        len(earlier.tokenizer(f" {w}")["input_ids"]) > len(whole.tokenizer(f" {w}")["input_ids"]) for w in end.split()
    ]
    assert (growth.words, growth.finer) == (len(finer), sum(finer))


def test_another_text_is_counted_beside_it(words: Path, tmp_path: Path) -> None:
    whole, cut = both(tmp_path, words, tiny_model("llama", vocab_size=ROWS))
    other = tmp_path / "other.txt"
    other.write_text("Élève naïf: ça coûte 5 € à Zürich")
    assert cut.vocabulary is not None
    growth = cut.vocabulary.facts_on(str(other)).growths[-1]
    assert growth.whole_tokens == len(whole.tokenizer(other.read_text())["input_ids"])
    assert growth.tokens == len(cut.tokenizer(other.read_text())["input_ids"]) > growth.whole_tokens
    assert cut.vocabulary.facts_on(str(tmp_path / "needs.txt")) == cut.vocabulary.facts  # no token of it can be lost


def test_a_long_text_is_read_in_pieces(words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = load(given(tmp_path, words, tiny_model("llama", vocab_size=ROWS))[0])
    once = load(whole.name, vocabulary=tmp_path / "needs.txt")
    monkeypatch.setattr(vocabulary_texts, "PIECE", 100)
    pieces = list(vocabulary_texts.pieces(TEXT))
    assert "".join(pieces) == TEXT
    assert len(pieces) > 10
    in_pieces = load(whole.name, vocabulary=tmp_path / "needs.txt")
    assert once.vocabulary is not None
    assert in_pieces.vocabulary is not None
    assert Counter(in_pieces.vocabulary.kept.tolist()) == Counter(once.vocabulary.kept.tolist())


def test_the_tokenizers_folder_goes_with_the_model(words: Path, tmp_path: Path) -> None:
    _, cut = both(tmp_path, words, tiny_model("llama", vocab_size=ROWS))
    folder = cut.tokenizer_path
    assert (folder / "tokenizer.json").is_file()
    del cut
    gc.collect()
    assert not folder.exists()


def test_a_vocabulary_is_cut_again_to_the_same(words: Path, tmp_path: Path) -> None:
    _, cut = both(tmp_path, words, tiny_model("llama", vocab_size=ROWS))
    save_checkpoint(cut.model, cut.tokenizer, tmp_path / "cut")
    again = load(str(tmp_path / "cut"), vocabulary=tmp_path / "needs.txt")
    assert again.vocabulary is not None
    assert again.vocabulary.kept.tolist() == list(range(len(cut.tokenizer)))


def test_a_tokenizer_with_sentencepieces_merges_is_cut(tmp_path: Path) -> None:
    folder = sentencepiece_folder(tmp_path / "words", sentencepiece_pieces(tmp_path), style="llama")
    whole, cut = both(tmp_path, folder, tiny_model("llama", vocab_size=SENTENCEPIECE_SIZE))
    assert cut.vocabulary is not None
    before, after = (one.tokenizer(TEXT)["input_ids"] for one in (whole, cut))
    assert cut.vocabulary.kept[after].tolist() == before
    assert after[0] == cut.tokenizer.bos_token_id
    assert len(cut.tokenizer) < 0.7 * len(whole.tokenizer)
    text = "Привет 😀 \x00"
    assert cut.tokenizer.decode(cut.tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_a_gguf_file_is_cut_too(words: Path, tmp_path: Path) -> None:
    needs_llamacpp()
    name, needs = given(tmp_path, words, tiny_model("llama", vocab_size=ROWS, bos_token_id=0, eos_token_id=0))
    source = load(name)
    export.get("llamacpp").export(
        source.model, tokenizer=source.tokenizer_path, precision="f32", plan_digest="", out=tmp_path / "file"
    )
    whole, cut = (load(str(tmp_path / "file" / "model.gguf"), vocabulary=one) for one in (None, needs))
    assert cut.vocabulary is not None
    assert cut.vocabulary.kept[cut.tokenizer(TEXT)["input_ids"]].tolist() == whole.tokenizer(TEXT)["input_ids"]
    assert cut.model.config.vocab_size == 384
    assert cut.tokenizer.decode([cut.model.config.eos_token_id]) == "<|end|>"
    assert cut.tokenizer.chat_template == TEMPLATE


def test_a_tokenizer_with_more_tokens_than_rows_is_refused(words: Path, tmp_path: Path) -> None:
    name, needs = given(tmp_path, words, tiny_model("llama", vocab_size=400))
    with pytest.raises(InvalidInput, match="the tokenizer has 744 tokens, the model 400 embedding rows"):
        load(name, vocabulary=needs)


def test_a_text_that_is_not_there_is_refused(words: Path, tmp_path: Path) -> None:
    name, _ = given(tmp_path, words, tiny_model("llama", vocab_size=ROWS))
    with pytest.raises(InvalidInput, match=r"text 'nowhere\.txt' does not exist"):
        load(name, vocabulary="nowhere.txt")


def test_a_tokenizer_that_is_no_bpe_is_refused(tmp_path: Path) -> None:
    unigram = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0))
    PreTrainedTokenizerFast(tokenizer_object=unigram, unk_token="<unk>").save_pretrained(tmp_path / "words")
    name, needs = given(tmp_path, tmp_path / "words", tiny_model("llama", vocab_size=ROWS))
    with pytest.raises(Unsupported, match="the vocabulary of a Unigram tokenizer cannot be cut, only that of BPE"):
        load(name, vocabulary=needs)


def test_the_config_names_no_path(words: Path, tmp_path: Path) -> None:
    """A checkpoint may be published, and the text's folder is nobody's business."""
    _, cut = both(tmp_path, words, tiny_model("llama", vocab_size=ROWS))
    said = cut.model.config.dilap_vocabulary
    assert (said["text"], said["tokens"], said["whole_tokens"]) == ("needs.txt", 384, ROWS)
    assert str(tmp_path) not in json.dumps(cut.model.config.to_dict()["dilap_vocabulary"])

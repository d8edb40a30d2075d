"""Small tokenizers of the kinds that models have, trained on the samples of text."""

from pathlib import Path

import sentencepiece
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from dilap.models.text_samples import SAMPLES

SENTENCEPIECE_SIZE = 700
LLAMA3_SPLIT = (  # the expressions by which these families split text, as their tokenizer.json gives them
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
GPT4O_SPLIT = (  # of Phi-4-mini
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")


def byte_level(
    folder: Path, splitter: pre_tokenizers.PreTokenizer, *, ignores_merges: bool = False, **special: str
) -> Path:
    """Trained on the samples, so that a wrong split is seen in the ids."""
    words = Tokenizer(models.BPE(ignore_merges=ignores_merges))
    words.pre_tokenizer = splitter
    words.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=list(dict.fromkeys(special.values())),
        show_progress=False,
    )
    numbers = ["123 456 789 2024 1999 1000"] * 40  # so that tokens of several digits exist where a split allows them
    words.train_from_iterator([*SAMPLES * 4, *numbers], trainer)
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
    return folder


def split_by(expression: str) -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(Regex(expression), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def sentencepiece_pieces(folder: Path) -> list[str]:
    """The vocabulary of a SentencePiece BPE model with byte fallback, by id."""
    (folder / "text").write_text("\n".join(" ".join(text.split()) for text in SAMPLES * 20))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"),
        model_prefix=str(folder / "model"),
        vocab_size=SENTENCEPIECE_SIZE,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "model.model"))
    return [model.id_to_piece(index) for index in range(model.get_piece_size())]


def sentencepiece_folder(folder: Path, pieces: list[str], *, style: str) -> Path:
    """As transformers converts such a model: every split of a piece into pieces is a merge, ranked by the piece."""
    ids = {piece: index for index, piece in enumerate(pieces)}
    merges = [(p[:i], p[i:]) for p in pieces[259:] for i in range(1, len(p)) if p[:i] in ids and p[i:] in ids]
    words = Tokenizer(models.BPE(vocab=ids, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if style == "llama":
        words.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    elif style == "mistral":
        words.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    else:  # no space before the text
        words.normalizer = normalizers.Replace(" ", "▁")
    strip = [] if style == "bare" else [decoders.Strip(" ", 1, 0)]
    words.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    words.add_special_tokens(["<unk>", "<s>", "</s>"])
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
    return folder

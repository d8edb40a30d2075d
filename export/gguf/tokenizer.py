"""A tokenizer as GGUF metadata, from a Hugging Face folder or another GGUF file."""

import json
import tempfile
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
from gguf import GGUFValueType, TokenType

from dilap.backends.child import opened
from dilap.backends.llamacpp.file import Gguf
from dilap.core.errors import InvalidInput, Unsupported
from dilap.export.splits import Split, require_alike, splits_of
from dilap.models.gguf_tokenizer import NAME, Field, drops_spaces, tokenizer_fields
from dilap.models.load import load_tokenizer
from dilap.models.text_samples import SAMPLES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PER_TOKEN = {  # arrays with one value per token, and the value of a token that only fills up the vocabulary
    "tokenizer.ggml.scores": 0.0,
    "tokenizer.ggml.token_type": int(TokenType.UNUSED),
}
# llama.cpp's names for pre-tokenizers, one for each behaviour, the usual ones first. qwen2 comes before llama-bpe: both
# split Qwen's vocabulary alike (no token has two digits), but llama-bpe takes whole words without applying the merges.
PRE_TOKENIZERS = (
    *("qwen2", "llama-bpe", "smollm", "gpt-2", "gpt-4o", "tekken", "deepseek-llm", "deepseek-coder", "deepseek-v3"),
    *("falcon", "starcoder", "command-r", "olmo", "stablelm2", "dbrx", "refact", "glm4", "mpt", "bloom", "viking"),
    *("exaone", "superbpe", "seed-coder", "hunyuan", "bailingmoe", "qwen35", "default"),
)
# Of these, that whose expression in llama.cpp takes no combining mark for a part of a word, although the tokenizers
# that it stands for (GPT-4o's, Phi-4-mini's) do.
_WITHOUT_MARKS = "gpt-4o"
_PHI3 = "Phi-3"
_NUM_WORDS = 16384  # tokens of a vocabulary, its most frequent ones, that are compared when a pre-tokenizer is chosen


@dataclass(frozen=True)
class Tokenizer:
    """The `tokenizer.*` entries of a GGUF file, and the file's name where llama.cpp splits texts by that."""

    fields: tuple[Field, ...]

    def write(self, writer: gguf.GGUFWriter) -> None:
        for field in self.fields:
            writer.add_key_value(field.key, field.value, field.kind, sub_type=field.item_kind)

    @property
    def end(self) -> int | None:
        """The token that ends a text; None where the tokenizer names none."""
        return next((field.value for field in self.fields if field.key == "tokenizer.ggml.eos_token_id"), None)

    def padded(self, vocab_size: int) -> "Tokenizer":
        """Return the tokenizer filled up with unused tokens to `vocab_size`, the rows of the embedding.

        Raises InvalidInput where there are fewer rows than tokens, or one token twice.
        """
        tokens = next(field.value for field in self.fields if field.key == "tokenizer.ggml.tokens")
        if len(tokens) > vocab_size:
            raise InvalidInput(f"the tokenizer has {len(tokens)} tokens, the model {vocab_size} embedding rows")
        known = set(tokens)
        if len(known) < len(tokens):  # llama.cpp aborts the process at a duplicate
            twice = next(token for i, token in enumerate(tokens) if token in tokens[:i])
            raise InvalidInput(f"the tokenizer has the token {twice!r} twice; llama.cpp cannot hold it")
        names = (f"[PAD{i}]" for i in range(2 * vocab_size))
        unused = [next(name for name in names if name not in known) for _ in range(vocab_size - len(tokens))]
        fill: dict[str, Sequence[Any]] = {key: [value] * len(unused) for key, value in PER_TOKEN.items()}
        fill["tokenizer.ggml.tokens"] = unused
        return Tokenizer(tuple(replace(f, value=[*f.value, *fill[f.key]]) if f.key in fill else f for f in self.fields))


NO_TOKENIZER = Tokenizer((Field(key="tokenizer.ggml.model", value="no_vocab", kind=GGUFValueType.STRING),))


def read_tokenizer(source: Path, *, vocab_size: int) -> Tokenizer:
    """Read the tokenizer of a Hugging Face folder or of a GGUF file, and fill it up to `vocab_size` tokens.

    Raises InvalidInput where it cannot be read or has more tokens, Unsupported where GGUF cannot hold it (BPE only).
    """
    if source.is_file():
        return Tokenizer(tokenizer_fields(source)).padded(vocab_size)
    reference = _transformers_tokenizer(source)
    document = json.loads(reference.backend_tokenizer.to_str())
    model = document["model"]
    if model["type"] != "BPE":
        raise Unsupported(f"{source}: a {model['type']} tokenizer cannot be written to GGUF; BPE only")
    last = max([*model["vocab"].values(), *(token["id"] for token in document["added_tokens"])], default=0)
    if last >= vocab_size:
        raise InvalidInput(f"the tokenizer has {last + 1} tokens, the model {vocab_size} embedding rows")
    if model.get("byte_fallback"):
        return _sentencepiece(document, reference).padded(vocab_size)
    return _with_pre_tokenizer(_byte_level(document, reference).padded(vocab_size), reference)


def with_end_tokens(tokenizer: Tokenizer, ends: Sequence[int]) -> Tokenizer:
    """Return the tokenizer with all tokens that end a text: GGUF has room for three, of a text, a turn and a message.

    The tokenizer's own entries stay.
    """
    given = {field.key: field.value for field in tokenizer.fields}
    keys = [f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom")]
    new = [token for token in ends if token not in {given.get(key) for key in keys}]
    added = zip((key for key in keys if key not in given), new, strict=False)
    fields = (Field(key=key, value=token, kind=GGUFValueType.UINT32) for key, token in added)
    return Tokenizer((*tokenizer.fields, *fields))


def verify_tokenizer(path: Path, source: Path) -> list[str]:
    """Return what a reader must know of the tokenizer that was written: what llama.cpp does not do to texts.

    It normalises none, and may split words at combining marks. Raises VerificationFailed at the first text that
    llama.cpp and the source split differently for another reason.
    """
    notes: list[str] = []
    with opened(Gguf, path, runtime="llamacpp", vocab_only=True) as file:
        if source.is_file():
            with opened(Gguf, source, runtime="llamacpp", vocab_only=True) as original:
                splits = [Split(text=text, normal=text, ids=original.tokens(text)) for text in SAMPLES]
        else:
            reference = _transformers_tokenizer(source)
            splits = list(splits_of(reference, _texts(reference)))
            if _pre_tokenizer_of(path) == _WITHOUT_MARKS:
                differing = [one.text for one in splits if file.tokens(one.normal) != one.ids]
                notes = [f"llama.cpp splits words at combining marks: {text!r}" for text in differing[:1]]
                splits = list(splits_of(reference, map(_without_marks, _texts(reference))))
        return notes + require_alike(splits, file.tokens, runtime="llama.cpp", word=file.token_text)


def _pre_tokenizer_of(path: Path) -> str | None:
    return next((field.value for field in tokenizer_fields(path) if field.key == "tokenizer.ggml.pre"), None)


def _without_marks(text: str) -> str:
    return "".join(one for one in text if not unicodedata.category(one).startswith("M"))


def _transformers_tokenizer(folder: Path) -> "PreTrainedTokenizerFast":
    try:
        reference = load_tokenizer(folder, local_files_only=True)
    except InvalidInput as error:
        line = str(error)
        if not (folder / "tokenizer.json").exists():
            line += " (there is no tokenizer.json; a tokenizer.model alone needs protobuf)"
        raise InvalidInput(f"{folder}: transformers cannot load a tokenizer from it: {line}") from error
    if not hasattr(reference, "backend_tokenizer"):
        raise Unsupported(f"{folder}: {type(reference).__name__} has no tokenizer.json form")
    found: PreTrainedTokenizerFast = reference
    return found


def _texts(reference: "PreTrainedTokenizerFast") -> Iterator[str]:
    """Yield the texts to compare: the samples, and texts with special tokens where GGUF can say how they are split.

    A SentencePiece tokenizer puts a space before a text. One with Metaspace "first" puts none after special tokens and
    before a leading space; llama.cpp does, and GGUF has no field for it. So such texts are left out for SentencePiece,
    and special tokens stand only at the end, but for those of Phi-3, behind which spaces are dropped.
    """
    yield from SAMPLES
    anywhere = not reference.backend_tokenizer.model.byte_fallback
    if anywhere:
        yield " leading space"
    for token in dict.fromkeys((reference.bos_token, reference.eos_token)):
        if token:
            yield f"user\nHello{token}"
        if token and anywhere:
            yield f"{token}user\nHello, world{token}\nassistant"
    document = json.loads(reference.backend_tokenizer.to_str())
    if list(_name(document)):
        yield from (f"{one['content']} \nHello" for one in document["added_tokens"] if one["rstrip"])


def _words(reference: "PreTrainedTokenizerFast") -> Iterator[str]:
    """Yield the first tokens of a vocabulary as texts, many in each."""
    ids = [i for i in range(min(len(reference), _NUM_WORDS)) if i not in reference.all_special_ids]
    words = [word for word in reference.batch_decode([[i] for i in ids]) if "\ufffd" not in word]
    for at in range(0, len(words), 256):
        yield "".join(words[at : at + 256])


def _byte_level(document: dict[str, Any], reference: "PreTrainedTokenizerFast") -> Tokenizer:
    """Return a byte-level BPE tokenizer; its tokens and merges are in the alphabet of bytes that llama.cpp uses too."""
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in document["model"]["merges"]]
    tokens, types = _tokens(document)
    return Tokenizer(
        (
            _text("model", "gpt2"),
            _list("tokens", tokens, GGUFValueType.STRING),
            _list("token_type", types, GGUFValueType.INT32),
            _list("merges", merges, GGUFValueType.STRING),
            *_special(reference),
        )
    )


def _sentencepiece(document: dict[str, Any], reference: "PreTrainedTokenizerFast") -> Tokenizer:
    """Return a SentencePiece tokenizer, with scores in the place of merges.

    llama.cpp joins the pair whose union has the highest score, so a token's score is minus the rank of the first merge
    that makes it.
    """
    tokens, types = _tokens(document)
    rank: dict[str, int] = {}
    for index, merge in enumerate(document["model"]["merges"]):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        rank.setdefault(left + right, index)
    starts_with_space = reference.tokenize("x", add_special_tokens=False)[0].startswith("▁")
    return Tokenizer(
        (
            _text("model", "llama"),
            _list("tokens", tokens, GGUFValueType.STRING),
            _list("token_type", types, GGUFValueType.INT32),
            _list("scores", [-float(rank.get(token, 0)) for token in tokens], GGUFValueType.FLOAT32),
            Field(key="tokenizer.ggml.add_space_prefix", value=starts_with_space, kind=GGUFValueType.BOOL),
            *_special(reference),
            *_name(document),
        )
    )


def _name(document: dict[str, Any]) -> Iterator[Field]:
    """Yield the name by which llama.cpp knows that spaces behind special tokens are dropped, where they are."""
    added = {token["content"]: token["rstrip"] for token in document["added_tokens"]}
    if any(added.values()) and drops_spaces(_PHI3, added) == {token for token, drops in added.items() if drops}:
        yield Field(key=NAME, value=_PHI3, kind=GGUFValueType.STRING)


def _tokens(document: dict[str, Any]) -> tuple[list[str], list[int]]:
    """Return the token texts by id, and their types; a gap in the ids becomes an unused token."""
    added = {token["id"]: token for token in document["added_tokens"]}
    texts = {index: text for text, index in document["model"]["vocab"].items()}
    texts |= {index: token["content"] for index, token in added.items()}
    unknown = document["model"].get("unk_token")
    byte_tokens = {f"<0x{byte:02X}>" for byte in range(256)} if document["model"].get("byte_fallback") else set()

    def type_of(index: int) -> TokenType:
        if index not in texts:
            return TokenType.UNUSED
        if texts[index] == unknown:
            return TokenType.UNKNOWN
        if index in added:
            return TokenType.CONTROL if added[index]["special"] else TokenType.USER_DEFINED
        return TokenType.BYTE if texts[index] in byte_tokens else TokenType.NORMAL

    ids = range(max(texts) + 1)
    return [texts.get(i, f"[UNUSED{i}]") for i in ids], [int(type_of(i)) for i in ids]


def _special(reference: "PreTrainedTokenizerFast") -> Iterator[Field]:
    """Yield the special ids, whether they are added around a text (found out with one), and the chat template."""
    bos = reference.eos_token_id if reference.bos_token_id is None else reference.bos_token_id
    special = {
        "bos": bos,  # without one llama.cpp assumes token 11
        "eos": reference.eos_token_id,
        "unknown": reference.unk_token_id,
        "padding": reference.pad_token_id,
    }
    for name, index in special.items():
        if index is not None:
            yield Field(key=f"tokenizer.ggml.{name}_token_id", value=index, kind=GGUFValueType.UINT32)
    bare, full = reference("x", add_special_tokens=False)["input_ids"], reference("x")["input_ids"]
    adds_bos = len(full) > len(bare) and full[0] == bos
    adds_eos = len(full) > len(bare) + adds_bos and full[-1] == reference.eos_token_id
    yield Field(key="tokenizer.ggml.add_bos_token", value=adds_bos, kind=GGUFValueType.BOOL)
    yield Field(key="tokenizer.ggml.add_eos_token", value=adds_eos, kind=GGUFValueType.BOOL)
    yield from _templates(reference.chat_template)


def _templates(found: str | Mapping[str, str] | None) -> Iterator[Field]:
    """Yield the chat template, or the default one of several and the named others, as llama.cpp looks for them."""
    templates = {"default": found} if isinstance(found, str) else dict(found or {})
    for name, text in templates.items():
        key = "tokenizer.chat_template" + ("" if name == "default" else f".{name}")
        yield Field(key=key, value=text, kind=GGUFValueType.STRING)
    if others := [name for name in templates if name != "default"]:
        yield _names("tokenizer.chat_templates", others)


def _names(key: str, values: Sequence[str]) -> Field:
    return Field(key=key, value=list(values), kind=GGUFValueType.ARRAY, item_kind=GGUFValueType.STRING)


def _text(name: str, value: str) -> Field:
    return Field(key=f"tokenizer.ggml.{name}", value=value, kind=GGUFValueType.STRING)


def _list(name: str, values: Sequence[Any], kind: GGUFValueType) -> Field:
    return Field(key=f"tokenizer.ggml.{name}", value=values, kind=GGUFValueType.ARRAY, item_kind=kind)


def _with_pre_tokenizer(tokenizer: Tokenizer, reference: "PreTrainedTokenizerFast") -> Tokenizer:
    """Add the first of llama.cpp's pre-tokenizers that splits all texts like `reference`, else the best of them.

    The words of a small vocabulary are few in the samples, so they are texts too.
    """
    expected = list(splits_of(reference, [*_texts(reference), *_words(reference)]))
    best, most = tokenizer, -1
    with tempfile.TemporaryDirectory() as folder:
        for name in PRE_TOKENIZERS:
            candidate = Tokenizer((*tokenizer.fields, _text("pre", name)))
            agreeing = _num_agreeing(candidate, expected, Path(folder) / "vocabulary.gguf")
            if agreeing > most:
                best, most = candidate, agreeing
            if agreeing == len(expected):
                break
    return best


def _num_agreeing(tokenizer: Tokenizer, expected: Sequence[Split], path: Path) -> int:
    writer = gguf.GGUFWriter(path, "llama")
    tokenizer.write(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with opened(Gguf, path, runtime="llamacpp", vocab_only=True) as file:
        return sum(file.tokens(one.normal) == one.ids for one in expected)

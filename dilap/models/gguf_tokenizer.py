"""The tokenizer of a GGUF file as transformers has it, checked against llama.cpp on the file itself.

transformers' own reader splits texts in one way, whichever of llama.cpp's pre-tokenizers the file names, and adds
tokens that the file does not have.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from gguf import GGUFValueType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from dilap.backends.child import opened
from dilap.backends.llamacpp.file import Gguf
from dilap.backends.llamacpp.gguf_header import read_header
from dilap.core.errors import InvalidInput, Unavailable
from dilap.models.gguf_sentencepiece import sentencepiece_tokenizer
from dilap.models.pretrained import errors_of_damaged_files, from_pretrained, require_sound_gguf
from dilap.models.text_samples import SAMPLES, first_difference

_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4  # gguf's types of tokens
_SPACES = r"\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|" + _SPACES
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|" + _SPACES
)
_CASES = (
    r"[^\r\n\p{L}\p{N}]?((?=[\p{L}])([^a-z]))*((?=[\p{L}])([^A-Z]))+%(end)s"
    r"|[^\r\n\p{L}\p{N}]?((?=[\p{L}])([^a-z]))+((?=[\p{L}])([^A-Z]))*%(end)s"
    r"|%(numbers)s| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|" + _SPACES
)
_HAN = r"[一-龥ࠀ-一가-퟿]+"
_MARKS = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"
# The expressions by which llama.cpp's pre-tokenizers split a text, one after another.
_SPLITS: dict[str, tuple[str, ...]] = {
    "gpt-2": (_GPT2,),
    "llama-bpe": (_LLAMA3,),
    "qwen2": (_LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}"),),
    "smollm": (r"\p{N}", _GPT2),
    "gpt-4o": (
        _CASES % {"end": r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])?", "numbers": r"\p{N}{1,3}"},
    ),
    "tekken": (_CASES % {"end": "", "numbers": r"\p{N}"},),
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
    "falcon": (r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"[0-9][0-9][0-9]"),
    "deepseek-llm": (
        r"[\r\n]",
        r"\s?[\p{Lu}\p{Ll}\p{Lt}]+",
        r"\s?[!-/:-~！-／：-～‘-‟　-。]+",  # noqa: RUF001
        r"\s+$",
        _HAN,
        r"\p{N}+",
    ),
    "deepseek-coder": (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _HAN, r"\p{N}"),
    "deepseek-v3": (
        r"\p{N}{1,3}",
        r"[一-龥぀-ゟ゠-ヿ]+",  # noqa: RUF001
        _MARKS + r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|" + _SPACES,
    ),
}
# Other names of llama.cpp's for one of these.
_ALIKE = {
    **dict.fromkeys(("starcoder", "refact", "command-r", "codeshell", "exaone"), "smollm"),
    **dict.fromkeys(("llama3", "llama-v3", "dbrx", "smaug-bpe", "pixtral", "falcon3"), "llama-bpe"),
    **dict.fromkeys(("stablelm2", "hunyuan", "deepseek-r1-qwen", "qwen35", "megrez"), "qwen2"),
    **dict.fromkeys(("mpt", "olmo", "jais", "phi-2", "gigachat", "trillion"), "gpt-2"),
}
NAME = "general.name"
# Where that is Phi-3's, llama.cpp drops spaces behind all special tokens but these, which it takes to be there.
_PHI3_NAMES = ("phi-3", "phi3")
_STRIPS, _KEEPS = ("</s>",), ("<unk>", "<s>", "<|endoftext|>")


@dataclass(frozen=True, kw_only=True)
class Field:
    """One entry of a GGUF file's metadata; `item_kind` is the type of an array's items."""

    key: str
    value: Any
    kind: GGUFValueType
    item_kind: GGUFValueType | None = None


def tokenizer_fields(path: Path) -> tuple[Field, ...]:
    """Return the `tokenizer.*` entries of a GGUF file, and its name where llama.cpp splits texts by that.

    Raises InvalidInput where it is damaged or has no tokenizer.
    """
    require_sound_gguf(path)
    header = read_header(path, texts=True)
    is_phi3 = _is_phi3(str(header.metadata.get(NAME, "")))
    fields = tuple(
        Field(
            key=key,
            value=list(value) if isinstance(value, tuple) else value,
            kind=GGUFValueType(header.kinds[key][0]),
            item_kind=None if header.kinds[key][1] is None else GGUFValueType(header.kinds[key][1]),
        )
        for key, value in header.metadata.items()
        if key.startswith("tokenizer.") or (key == NAME and is_phi3)
    )
    if not any(one.key == "tokenizer.ggml.tokens" and one.value for one in fields):
        raise InvalidInput(f"{path}: it holds no tokenizer")
    return fields


def drops_spaces(name: str, tokens: Collection[str]) -> set[str]:
    """Return those of the special `tokens` behind which llama.cpp drops spaces in a file of that name."""
    is_known = _is_phi3(name) and {*_STRIPS, *_KEEPS} <= set(tokens)
    return set(tokens).difference(_KEEPS) if is_known else set()


def _is_phi3(name: str) -> bool:
    return any(one in name.lower() for one in _PHI3_NAMES)


def read_gguf_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a GGUF file.

    Raises InvalidInput, with the text that differs, where no tokenizer of transformers splits texts as llama.cpp does
    with this file.
    """
    fields = {one.key: one.value for one in tokenizer_fields(path)}
    tokens, differing = fields["tokenizer.ggml.tokens"], ""
    expected = _split_by_llamacpp(path)
    with errors_of_damaged_files():
        for candidate in _candidates(path, fields):
            if len(candidate) > len(tokens):
                differing = f"it would have {len(candidate)} tokens, and the file has {len(tokens)}"
                continue
            differing = _difference(candidate, expected)
            if not differing:
                return candidate
    raise InvalidInput(f"{path}: its tokenizer ({fields.get('tokenizer.ggml.pre')}) cannot be rebuilt: {differing}")


def _split_by_llamacpp(path: Path) -> list[tuple[str, list[int]]]:
    """Return the samples as llama.cpp splits them with this file; none where it is not installed."""
    try:
        with closing(opened(Gguf, path, runtime="llamacpp", vocab_only=True)) as file:
            return [(text, file.tokens(text)) for text in SAMPLES]
    except Unavailable:
        return []


def _difference(tokenizer: PreTrainedTokenizerBase, expected: Sequence[tuple[str, list[int]]]) -> str:
    for text, ids in expected:
        if (got := tokenizer(text)["input_ids"]) != ids:
            at = first_difference(ids, got)
            return f"{text!r} at token {at}: llama.cpp has {ids[at:][:1]}, it would give {got[at:][:1]}"
    return ""


def _candidates(path: Path, fields: dict[str, Any]) -> Iterator[PreTrainedTokenizerBase]:
    """Yield tokenizers that may be the file's: the one that its name says first."""
    kind = fields.get("tokenizer.ggml.model")
    if kind == "llama":
        yield from _sentencepiece_candidates(fields)
        return
    if kind != "gpt2":
        yield from_pretrained(AutoTokenizer, path.parent, gguf_file=path.name, local_files_only=True)
        return
    named = str(fields.get("tokenizer.ggml.pre") or "default")
    first = _ALIKE.get(named, named)
    adds_bos = bool(fields.get("tokenizer.ggml.add_bos_token", first == "llama-bpe"))
    for name in sorted(_SPLITS, key=lambda one: one != first):
        for ignores_merges, with_bos in product((name == "llama-bpe", name != "llama-bpe"), (adds_bos, not adds_bos)):
            yield _byte_level(fields, _SPLITS[name], ignores_merges=ignores_merges, adds_bos=with_bos)


def _sentencepiece_candidates(fields: dict[str, Any]) -> Iterator[PreTrainedTokenizerBase]:
    """Yield tokenizers with and without a space and the first token before a text, as the file says first."""
    adds_space, adds_bos = (
        bool(fields.get(f"tokenizer.ggml.add_{name}", True)) for name in ("space_prefix", "bos_token")
    )
    for with_space, with_bos in product((adds_space, not adds_space), (adds_bos, not adds_bos)):
        yield _finished(sentencepiece_tokenizer(fields, adds_space=with_space), fields, adds_bos=with_bos)


def _byte_level(
    fields: dict[str, Any], splits: Sequence[str], *, ignores_merges: bool, adds_bos: bool
) -> PreTrainedTokenizerFast:
    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in fields.get("tokenizer.ggml.merges") or []]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=ignores_merges))
    parts = [pre_tokenizers.Split(Regex(split), behavior="isolated") for split in splits]
    made.pre_tokenizer = pre_tokenizers.Sequence([*parts, pre_tokenizers.ByteLevel(False, use_regex=False)])
    made.decoder = decoders.ByteLevel()
    return _finished(made, fields, adds_bos=adds_bos)


def _finished(made: Tokenizer, fields: dict[str, Any], *, adds_bos: bool) -> PreTrainedTokenizerFast:
    """Return a tokenizer with the file's special tokens, those that users defined, and its chat templates."""
    tokens = fields["tokenizer.ggml.tokens"]
    types = fields.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    kinds = {
        kind: [token for token, one in zip(tokens, types, strict=True) if one == kind]
        for kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)
    }
    dropping = drops_spaces(fields.get(NAME, ""), [token for some in kinds.values() for token in some])
    for kind, add in ((_CONTROL, made.add_special_tokens), (_USER_DEFINED, made.add_tokens)):
        add([AddedToken(token, normalized=False, rstrip=token in dropping) for token in kinds[kind]])
    named = {name: fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "unknown", "padding")}
    for name, index in named.items():
        if index is not None and not 0 <= index < len(tokens):
            raise InvalidInput(f"its {name} token {index} is none of its {len(tokens)} tokens")
    bos = named["bos"]
    if adds_bos and bos is not None:
        made.post_processor = processors.TemplateProcessing(
            single=f"{tokens[bos]} $A", pair=f"{tokens[bos]} $A {tokens[bos]} $B", special_tokens=[(tokens[bos], bos)]
        )
    words = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
    special = {words[name]: tokens[index] for name, index in named.items() if index is not None}
    found = PreTrainedTokenizerFast(tokenizer_object=made, clean_up_tokenization_spaces=False, **special)
    found.chat_template = _templates(fields)
    return found


def _templates(fields: Mapping[str, Any]) -> str | dict[str, str] | None:
    """Return the file's chat template; all of them by name where it has several."""
    default, key = fields.get("tokenizer.chat_template"), "tokenizer.chat_template."
    others = {name.removeprefix(key): value for name, value in fields.items() if name.startswith(key)}
    return {"default": default, **others} if default and others else others or default

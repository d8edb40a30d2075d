"""Safe calls of transformers' loaders: no code of a checkpoint runs, no question is asked, no absurd size is loaded."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import psutil
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from transformers import AutoTokenizer

from dilap.backends.llamacpp.gguf_header import GgufHeader, read_header
from dilap.core.bounds import MAX_LAYERS, MAX_TOKENS, MAX_WIDTH
from dilap.core.codec import read_json
from dilap.core.errors import DilapError, InvalidInput, reason_of
from dilap.models.gguf_reader import quick_reading

# Entries of a config that decide how much memory a model takes, by their names in Hugging Face's configs and in GGUF
# files (there after the architecture's name and a dot).
_LAYERS = ("num_hidden_layers", "block_count")
_WIDTHS = (
    *("hidden_size", "intermediate_size", "ffn_dim", "vocab_size", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "word_embed_proj_dim", "embedding_length", "feed_forward_length", "attention.head_count"),
    *("attention.head_count_kv", "attention.key_length", "attention.value_length", "rope.dimension_count"),
    *("num_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size", "expert_count"),
    *("expert_used_count", "expert_feed_forward_length"),
)
_POSITIONS = ("max_position_embeddings", "context_length")
_LIMITS = {
    **dict.fromkeys(_LAYERS, MAX_LAYERS),
    **dict.fromkeys(_WIDTHS, MAX_WIDTH),
    **dict.fromkeys(_POSITIONS, MAX_TOKENS),
}
_AT_LEAST_ONE = (
    *("num_hidden_layers", "hidden_size", "vocab_size", "num_attention_heads", "num_key_value_heads"),
    *("block_count", "embedding_length", "attention.head_count"),
)
_POINTER = b"version https://git-lfs"  # how a file begins that Git has not fetched
_LONGEST_POINTER = 1024  # bytes
_MEMORY_FACTOR = 4  # times this machine's memory: a model that takes more is refused


def from_pretrained(loader: Any, folder: str | Path, *, gguf_file: str | None = None, **arguments: Any) -> Any:
    """Load a folder, a GGUF file in it or a hub id by `loader` (AutoConfig, AutoTokenizer, a class of models).

    Raises InvalidInput, with a text of one line, for any error of the loader.
    """
    if gguf_file is not None:
        arguments["gguf_file"] = gguf_file
        require_sound_gguf(Path(folder) / gguf_file)
    else:
        _require_fetched(Path(folder))
        if (config := Path(folder) / "config.json").is_file():
            require_plausible(read_json(config), source=str(config))
    with errors_of_damaged_files(), nullcontext() if loader is AutoTokenizer else quick_reading():
        return loader.from_pretrained(folder, trust_remote_code=False, **arguments)


@contextmanager
def errors_of_damaged_files() -> Iterator[None]:
    """Raise InvalidInput, with a text of one line, for any error of a library that reads what may be damaged."""
    try:
        yield
    except DilapError:
        raise
    except BaseException as error:
        # The loaders raise dozens of types for damaged files; a panic in the Rust of tokenizers is no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        if "trust_remote_code" in str(error):
            raise InvalidInput("it needs Python code of its own to be loaded, which DiLAP never runs") from error
        reason = reason_of(error)
        if "GGUF model with architecture" in reason:
            reason = f"GGUF files like it are not read, give the folder that its maker published ({reason})"
        raise InvalidInput(reason) from error


def _require_fetched(folder: Path) -> None:
    """Raise InvalidInput for a folder with a file of which Git has only a pointer."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.is_file() and path.stat().st_size < _LONGEST_POINTER and path.read_bytes().startswith(_POINTER):
            raise InvalidInput(f"{path} is only Git's pointer to the file: run `git lfs pull` in {folder}")


def require_sound_gguf(path: Path) -> None:
    """Raise InvalidInput for a file that is cut off, or whose header has numbers that no model has."""
    header = read_header(path)
    _require_whole(header, path)
    if (parts := header.metadata.get("split.count") or 1) > 1:
        raise InvalidInput(
            f"{path}: one of the {parts} files of a model; join them first: llama-gguf-split --merge FIRST OUT.gguf"
        )
    architecture = f"{header.metadata.get('general.architecture')}."
    counts = {key.removeprefix(architecture): value for key, value in header.metadata.items()}
    require_plausible(counts, source=str(path))
    _require_memory(4 * header.num_weights, source=str(path))  # transformers converts all weights to f32


def _require_whole(header: GgufHeader, path: Path) -> None:
    """Raise InvalidInput where a file ends before the last of its tensors."""
    num_bytes = path.stat().st_size
    for name, shape in header.shapes.items():
        try:
            weights, size = GGML_QUANT_SIZES[GGMLQuantizationType(header.types[name])]
        except ValueError:
            raise InvalidInput(f"{path}: the tensor {name} is of the unknown type {header.types[name]}") from None
        if header.begins[name] + math.prod(shape) // weights * size > num_bytes:
            raise InvalidInput(f"{path}: not a whole GGUF file: it ends before the end of its tensor {name}")


def require_plausible(config: Mapping[str, Any], *, source: str) -> None:
    """Raise InvalidInput for numbers that no model has, or for far more weights than this machine can hold."""
    for name, most in _LIMITS.items():
        for value in _numbers(config.get(name), name, source):
            if not 0 <= value <= most:
                raise InvalidInput(f"{source}: {name} is {value:,}; models have at most {most:,}")
        if name in _AT_LEAST_ONE and config.get(name) == 0:
            raise InvalidInput(f"{source}: {name} is 0; models have at least 1")
    for widths in _rows(config.get("layer_widths"), source):
        if not 0 <= min(widths) <= max(widths) <= MAX_WIDTH:
            raise InvalidInput(f"{source}: layer_widths has {list(widths)}; models have at most {MAX_WIDTH:,}")
    if isinstance(config.get("num_hidden_layers"), int):
        _require_memory(2 * _num_weights(config), source=source)


def _numbers(value: Any, name: str, source: str) -> tuple[int, ...]:
    """Return the numbers of an entry that is one number, one for every layer, or None. Raises InvalidInput."""
    found = tuple(value) if isinstance(value, list | tuple) else () if value is None else (value,)
    if odd := [one for one in found if type(one) is not int]:
        raise InvalidInput(f"{source}: {name} is no whole number but {odd[0]!r:.80}")
    return found


def _rows(value: Any, source: str) -> list[tuple[int, ...]]:
    """Return [heads, KV heads, channels] of every layer of a pruned checkpoint. Raises InvalidInput."""
    if value is None:
        return []
    if not isinstance(value, list) or len(value) > MAX_LAYERS or not all(isinstance(row, list) for row in value):
        raise InvalidInput(f"{source}: layer_widths is no list of a list for every layer")
    rows = [_numbers(row, "layer_widths", source) for row in value]
    if any(len(row) != 3 for row in rows):
        raise InvalidInput(f"{source}: layer_widths needs heads, KV heads and channels of every layer")
    return rows


def _num_weights(config: Mapping[str, Any]) -> int:
    """Estimate how many weights the layers and the embeddings have."""

    def count(*names: str, default: int = 0) -> int:
        return next((config[name] for name in names if type(config.get(name)) is int), default)

    hidden, heads = count("hidden_size"), count("num_attention_heads", default=1)
    head_dim = count("head_dim", default=hidden // max(1, heads))
    rows = _rows(config.get("layer_widths"), "")
    experts = count("num_local_experts", "num_experts") * count("moe_intermediate_size")
    inner = 2 * heads * head_dim + 2 * (experts or count("intermediate_size", "ffn_dim"))
    layers = sum(2 * row[0] * head_dim + 2 * row[2] for row in rows) or count("num_hidden_layers") * inner
    positions = count("max_position_embeddings") if config.get("model_type") == "opt" else 0
    return hidden * (layers + count("vocab_size") + positions)


def _require_memory(num_bytes: int, *, source: str) -> None:
    memory = psutil.virtual_memory().total
    if num_bytes > _MEMORY_FACTOR * memory:
        asked, there = num_bytes / 1e9, memory / 1e9
        raise InvalidInput(f"{source}: its weights take {asked:,.0f} GB, and this machine's memory has {there:,.0f}")

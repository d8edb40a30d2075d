"""Safe calls of transformers' loaders: no code of a checkpoint runs, no question is asked, no absurd size is loaded."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import psutil
from transformers import AutoTokenizer

from dilap.backends.llamacpp.gguf_header import read_header
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
)
_POSITIONS = ("max_position_embeddings", "context_length")
_LIMITS = {
    **dict.fromkeys(_LAYERS, MAX_LAYERS),
    **dict.fromkeys(_WIDTHS, MAX_WIDTH),
    **dict.fromkeys(_POSITIONS, MAX_TOKENS),
}
_MEMORY_FACTOR = 4  # times this machine's memory: a model that takes more is refused


def from_pretrained(loader: Any, folder: str | Path, *, gguf_file: str | None = None, **arguments: Any) -> Any:
    """Load a folder, a GGUF file in it or a hub id by `loader` (AutoConfig, AutoTokenizer, a class of models).

    Raises InvalidInput, with a text of one line, for any error of the loader.
    """
    if gguf_file is not None:
        arguments["gguf_file"] = gguf_file
        require_sound_gguf(Path(folder) / gguf_file)
    elif (config := Path(folder) / "config.json").is_file():
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
        raise InvalidInput(reason_of(error)) from error


def require_sound_gguf(path: Path) -> None:
    """Raise InvalidInput for a file that is cut off, or whose header has numbers that no model has."""
    header = read_header(path)
    if (parts := header.metadata.get("split.count") or 1) > 1:
        raise InvalidInput(
            f"{path}: one of the {parts} files of a model; join them first: llama-gguf-split --merge FIRST OUT.gguf"
        )
    architecture = f"{header.metadata.get('general.architecture')}."
    counts = {key.removeprefix(architecture): value for key, value in header.metadata.items()}
    require_plausible(counts, source=str(path))
    _require_memory(4 * header.num_weights, source=str(path))  # transformers converts all weights to f32


def require_plausible(config: Mapping[str, Any], *, source: str) -> None:
    """Raise InvalidInput for numbers that no model has, or for far more weights than this machine can hold."""
    for name, most in _LIMITS.items():
        for value in _numbers(config.get(name), name, source):
            if not 0 <= value <= most:
                raise InvalidInput(f"{source}: {name} is {value:,}; models have at most {most:,}")
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
    inner = 2 * heads * head_dim + 2 * count("intermediate_size", "ffn_dim")
    layers = sum(2 * row[0] * head_dim + 2 * row[2] for row in rows) or count("num_hidden_layers") * inner
    positions = count("max_position_embeddings") if config.get("model_type") == "opt" else 0
    return hidden * (layers + count("vocab_size") + positions)


def _require_memory(num_bytes: int, *, source: str) -> None:
    memory = psutil.virtual_memory().total
    if num_bytes > _MEMORY_FACTOR * memory:
        asked, there = num_bytes / 1e9, memory / 1e9
        raise InvalidInput(f"{source}: its weights take {asked:,.0f} GB, and this machine's memory has {there:,.0f}")

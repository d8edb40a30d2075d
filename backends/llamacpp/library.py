"""The only binding to llama.cpp: its library, models, contexts and batches, and the errors in its log."""

import ctypes
import functools
import importlib
import os
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dilap.backends.llamacpp.gguf_header import read_header
from dilap.core.errors import InvalidInput, Unavailable, Unsupported

FLASH_ATTENTION = {"auto": -1, "off": 0}  # LLAMA_FLASH_ATTN_TYPE_*
CACHE_TYPES = {"f32": 0, "f16": 1, "q8_0": 8}  # GGML_TYPE_*
_ERROR_LEVEL = 4  # GGML_LOG_LEVEL_ERROR
_errors: deque[str] = deque(maxlen=20)  # llama.cpp's complaints: a load failure is otherwise a bare null pointer


@functools.cache
def library() -> Any:
    """Return the low-level llama_cpp module. Raises Unavailable where it is not installed or cannot be loaded."""
    try:
        found = importlib.import_module("llama_cpp.llama_cpp")
    except (ImportError, OSError, RuntimeError) as error:
        hint = "pip install llama-cpp-python (it compiles llama.cpp: needs cmake and a C++ compiler)"
        raise Unavailable(f"llama.cpp is not usable here ({error}); {hint}") from error
    found.llama_backend_init()
    return found


@functools.cache
def _log_callback() -> Any:
    """Return the callback that collects errors; it is kept for ever, because llama.cpp holds a bare pointer to it."""

    def record(level: int, text: bytes, _: object) -> None:
        if level == _ERROR_LEVEL:
            _errors.append(text.decode("utf-8", "replace").strip())

    return library().llama_log_callback(record)


def collect_errors() -> None:
    """Let llama.cpp log to this module, and forget what it logged before."""
    library().llama_log_set(_log_callback(), None)
    _errors.clear()


def load_model(path: Path, *, repack: bool = True, vocab_only: bool = False) -> Any:
    """Load a model on the CPU. Raises InvalidInput, in one line, where a tensor or a key is missing or wrong."""
    if not path.is_file():
        raise InvalidInput(f"{path}: no such file")
    read_header(path)  # llama.cpp trusts the counts of a damaged header
    params = library().llama_model_default_params()
    params.load_mode = library().LLAMA_LOAD_MODE_MMAP  # one file open twice shares its pages
    params.n_gpu_layers, params.vocab_only = 0, vocab_only
    params.use_extra_bufts = repack
    collect_errors()
    model = library().llama_model_load_from_file(os.fsencode(path), params)
    if not model:
        raise InvalidInput(f"{path}: llama.cpp cannot load it: {reason()}")
    return model


def new_context(
    model: Any,
    num_tokens: int,
    *,
    max_outputs: int,
    threads: int,
    batch_tokens: int | None = None,
    flash_attention: str = "auto",
    kv_cache: str = "f16",
) -> Any:
    """Return a context for `num_tokens` tokens. Raises Unsupported where llama.cpp cannot make one.

    `max_outputs` is the number of rows in the logits buffer; all tokens are one batch unless `batch_tokens` says less.
    """
    params = library().llama_context_default_params()
    params.n_ctx, params.n_batch = num_tokens, batch_tokens or num_tokens
    params.n_ubatch, params.n_outputs_max = params.n_batch, max_outputs
    params.n_threads = params.n_threads_batch = threads
    params.flash_attn_type = FLASH_ATTENTION[flash_attention]
    params.type_k = params.type_v = CACHE_TYPES[kv_cache]
    context = library().llama_init_from_model(model, params)
    if not context:
        raise Unsupported(f"llama.cpp could not make a context of {num_tokens} tokens: {reason()}")
    return context


def reason() -> str:
    """Return llama.cpp's own message: its first error is the cause, the others say where it was noticed."""
    first = next(iter(_errors), "it gave no reason")
    return first.partition("error loading model: ")[2] or first


def batch_of(tokens: Sequence[int]) -> Any:
    """Return a batch of tokens that continue sequence 0, with logits for the last one only."""
    array = (ctypes.c_int32 * len(tokens))(*tokens)
    batch = library().llama_batch_get_one(array, len(tokens))
    batch.owner = array  # the batch only points to it
    return batch


def fill_(batch: Any, tokens: Sequence[int], *, first_position: int, num_rows: int) -> None:
    """Fill `batch` with tokens of sequence 0 and ask for the logits of the last `num_rows`."""
    batch.n_tokens = len(tokens)
    for index, token in enumerate(tokens):
        batch.token[index] = token
        batch.pos[index] = first_position + index
        batch.n_seq_id[index] = 1
        batch.seq_id[index][0] = 0
        batch.logits[index] = index >= len(tokens) - num_rows

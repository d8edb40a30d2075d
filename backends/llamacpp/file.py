"""A GGUF file opened by llama.cpp, to check its tokens and logits; and llama.cpp's quantiser."""

import ctypes
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dilap.backends.inputs import num_together
from dilap.backends.llamacpp.library import collect_errors, fill_, library, load_model, new_context, reason
from dilap.core.errors import InvalidInput, Unsupported

NO_VOCABULARY = 0  # LLAMA_VOCAB_TYPE_NONE
FILE_TYPES = {"q8_0": 7, "q5_0": 8, "iq4_nl": 25, "q4_0": 2}  # LLAMA_FTYPE_MOSTLY_*
TENSOR_TYPES = {"f32": 0, "f16": 1, "q8_0": 8, "q5_0": 6, "iq4_nl": 20, "q4_0": 2, "q6_K": 14}  # GGML_TYPE_*


class Gguf:
    """A GGUF file opened by llama.cpp on the CPU; `num_tokens` is the longest input of `logits`.

    The KV cache is f32 and flash attention is off, so that only the weights' precision shows in the logits.
    """

    def __init__(self, path: Path, *, vocab_only: bool = False, num_tokens: int = 0) -> None:
        """Open the file. Raises InvalidInput, in one line, where a tensor or a key is missing or wrong."""
        self._context: Any = None
        self._lib = library()
        self._model: Any = load_model(path, vocab_only=vocab_only)
        self._vocab = self._lib.llama_model_get_vocab(self._model)
        self._num_tokens = num_tokens
        # Half the cores: on all of them, any other load slows llama.cpp's spinning threads down (27 -> 730 ms).
        threads = max(1, (os.cpu_count() or 2) // 2)
        if num_tokens:
            try:
                self._context = new_context(
                    self._model,
                    num_tokens,
                    max_outputs=num_tokens,
                    threads=threads,
                    flash_attention="off",
                    kv_cache="f32",
                )
            except Unsupported as error:
                self.close()
                raise InvalidInput(f"{path}: llama.cpp cannot run it: {error}") from error

    def __enter__(self) -> "Gguf":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        if self._context:
            self._lib.llama_free(self._context)
            self._context = None
        if self._model:
            self._lib.llama_model_free(self._model)
            self._model = None

    @property
    def vocab_size(self) -> int:
        return int(self._lib.llama_vocab_n_tokens(self._vocab))

    @property
    def has_vocabulary(self) -> bool:
        return bool(self._lib.llama_vocab_type(self._vocab) != NO_VOCABULARY)

    @property
    def beginning(self) -> int | None:
        """The token that begins a text (the file's bos token, or else its eos token); None where it names neither."""
        tokens = (self._lib.llama_vocab_bos(self._vocab), self._lib.llama_vocab_eos(self._vocab))
        return next((int(token) for token in tokens if token >= 0), None)

    def tokens(self, text: str, *, add_special: bool = True) -> list[int]:
        """Return the token ids of a text, in which special tokens are recognised.

        With `add_special`, they include the special tokens that the file says to add.
        """
        data = text.encode()
        buffer = (ctypes.c_int32 * (len(data) + 8))()  # at most one token a byte, and a few added ones
        count = self._lib.llama_tokenize(self._vocab, data, len(data), buffer, len(buffer), add_special, True)
        assert count >= 0, "the buffer holds one token a byte"
        return list(buffer[:count])

    def token_text(self, token: int) -> str:
        text: bytes = self._lib.llama_vocab_get_text(self._vocab, token)
        return text.decode(errors="replace")

    def logits(self, token_ids: Sequence[int], *, incremental: bool) -> NDArray[np.float32]:
        """Return the logits (tokens x vocabulary), computed in one pass.

        If `incremental`, the last quarter of the tokens is run one by one through the KV cache instead.
        """
        assert self._context, "opened without room for tokens"
        assert len(token_ids) <= self._num_tokens
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)
        together = num_together(len(token_ids), incremental=incremental)
        rows = [self._decode(token_ids[:together], start=0)]
        rows += [self._decode(token_ids[i : i + 1], start=i) for i in range(together, len(token_ids))]
        return np.concatenate(rows)

    def _decode(self, token_ids: Sequence[int], *, start: int) -> NDArray[np.float32]:
        batch = self._lib.llama_batch_init(len(token_ids), 0, 1)
        try:
            fill_(batch, token_ids, first_position=start, num_rows=len(token_ids))
            if self._lib.llama_decode(self._context, batch) != 0:
                raise InvalidInput(f"llama.cpp cannot run the model: {reason()}")
        finally:
            self._lib.llama_batch_free(batch)
        values = self._lib.llama_get_logits(self._context)
        return np.ctypeslib.as_array(values, (len(token_ids), self.vocab_size)).copy()


def validate(path: Path) -> None:
    """Check that llama.cpp opens a file. Raises InvalidInput, in one line, where a tensor is missing or wrong."""
    Gguf(path, num_tokens=1).close()


def quantise(source: Path, target: Path, *, precision: str, file_type: int, types: Mapping[str, str]) -> None:
    """Write the f16 or f32 GGUF `source` as `precision`, llama.cpp's `file_type`, with its own quantiser.

    `types` has, by name, those of TENSOR_TYPES that tensors get whatever the quantiser would choose for them.
    """
    lib = library()
    collect_errors()
    params = lib.llama_model_quantize_default_params()
    params.ftype, params.nthread = file_type, os.cpu_count() or 1
    overrides = (lib.llama_model_tensor_override * (len(types) + 1))()  # the last one, empty, ends the list
    for override, (name, kind) in zip(overrides, types.items(), strict=False):
        override.pattern, override.type = f"^{re.escape(name)}$".encode(), TENSOR_TYPES[kind]
    params.tt_overrides = overrides
    if lib.llama_model_quantize(os.fsencode(source), os.fsencode(target), ctypes.byref(params)) != 0:
        raise InvalidInput(f"llama.cpp cannot write {target.name} as {precision}: {reason()}")

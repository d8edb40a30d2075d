"""llama.cpp on the CPU, through the C interface that llama-cpp-python carries."""

import importlib.metadata
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dilap.backends import MAX_READ_TOKENS
from dilap.backends.inputs import random_tokens, setting
from dilap.backends.llamacpp.bench_flags import llama_bench_flags
from dilap.backends.llamacpp.build import cmake_args_here
from dilap.backends.llamacpp.library import CACHE_TYPES, batch_of, fill_, library, load_model, new_context, reason
from dilap.core.errors import InvalidInput, Unavailable, Unsupported
from dilap.core.rules import Capabilities, NetworkCapabilities
from dilap.core.shape import PRECISION_BITS, Architecture
from dilap.core.workload import Workload

# With flash attention a token of SmolLM2-135M after 256 others takes 18 % longer in llama.cpp (AMX Xeon, two threads);
# repacked weights need memory of their own; a quantised cache is smaller. What is faster depends on the machine.
_SWITCHES = {
    "flash_attention": ("auto", "off"),
    "repack": ("on", "off"),
    "kv_cache": ("f16", "q8_0", "f32"),
}
_NOT_NORMED = (
    "llama.cpp makes the weights of a token's experts sum to 1, whatever a file says, and this model does not"
    " (norm_topk_prob is false); use --backend onnxruntime"
)


class LlamaCpp:
    """Runs GGUF files in llama.cpp."""

    name = "llamacpp"
    format = "gguf"
    load_seconds = 300.0
    shares_threads = False
    lossy_switches = frozenset({"kv_cache"})

    def unavailable(self) -> str | None:
        try:
            library()
        except Unavailable as error:
            return str(error)
        return None

    def version(self) -> str:
        return importlib.metadata.version("llama-cpp-python")

    def build(self) -> str:
        text: bytes = library().llama_print_system_info()
        return text.decode().strip()

    def precisions(self) -> tuple[str, ...]:
        return ("f16", "f32", "q8_0", "q5_0", "iq4_nl", "q4_0")

    def network_precisions(self) -> tuple[str, ...]:
        """Return none: llama.cpp runs language models."""
        return ()

    def switches(self) -> Mapping[str, tuple[str, ...]]:
        return _SWITCHES

    def how_to_run(self, file: str, workload: Workload) -> dict[str, str]:
        flash, repack, cache = (setting(workload, _SWITCHES, name) for name in _SWITCHES)
        threads = workload.threads
        command = [f"llama-cli -m {file} -t {threads}"]
        command += [] if flash == "auto" else ["-fa off"]
        command += [] if repack == "on" else ["--no-repack"]
        # llama-cpp-python's own default is no flash attention; it has no name for repacking
        call = [f'llama_cpp.Llama("{file}", n_threads={threads}, n_threads_batch={threads}']
        call += [f"flash_attn={flash != 'off'}"]
        if cache != "f16":
            command.append(f"-ctk {cache} -ctv {cache}")
            call.append(f"type_k={CACHE_TYPES[cache]}, type_v={CACHE_TYPES[cache]}")
        commands = {"llama-cli": " ".join(command), "python": ", ".join(call) + ")"}
        if cache == "f32":
            return commands
        return {"llama-bench": " ".join(["llama-bench", "-m", file, *llama_bench_flags(workload)]), **commands}

    def cache_bits(self, workload: Workload) -> float:
        return PRECISION_BITS[setting(workload, _SWITCHES, "kv_cache")]

    def after_a_crash(self) -> str:
        built = cmake_args_here()
        again = "pip install --force-reinstall --no-cache-dir llama-cpp-python"
        if not built:
            return f"try another version: {again}"
        return f"a build with AMX does so: build it again with CMAKE_ARGS='{built}' {again}"

    def capabilities(self, architecture: Architecture, *, precision: str) -> Capabilities:
        if precision not in self.precisions():
            raise InvalidInput(f"llama.cpp precision {precision!r} is unknown; use {', '.join(self.precisions())}")
        if architecture.num_positions:
            return Capabilities(unsupported="llama.cpp has no OPT architecture; use --backend onnxruntime")
        if architecture.experts is not None:  # of which llama.cpp has one number for all layers
            return Capabilities(
                unsupported=None if architecture.experts.normed else _NOT_NORMED,
                per_layer_widths=False,
                attention_removal=False,
                ffn_removal=False,
                output_biases=False,
            )
        if architecture.qk_norm or architecture.family == "gemma2":  # `deci`, with widths per layer, has not its norms
            return Capabilities(
                per_layer_widths=False,
                attention_removal=False,
                ffn_removal=False,
                ffn_multiple=32,
                output_biases=False,  # llama.cpp's graphs of these families add none
                untied_precisions=architecture.family != "gemma2",  # of which it reads no head from the file
            )
        if architecture.family == "smollm3":  # of which llama.cpp turns the heads of fixed layers, and adds no biases
            return Capabilities(
                per_layer_widths=False,
                attention_removal=False,
                ffn_removal=False,
                layer_removal=False,
                ffn_multiple=32,
                output_biases=False,
            )
        # 32: a quantisation block; one step for every precision keeps plans portable between them
        return Capabilities(ffn_multiple=32)

    def network_capabilities(self, *, precision: str) -> NetworkCapabilities:  # noqa: ARG002
        return NetworkCapabilities()

    def load(self, path: Path, workload: Workload) -> "LlamaCppSession":
        return LlamaCppSession(path, workload)


class LlamaCppSession:
    """One model and one context, whose KV cache has the workload's content before every sample."""

    def __init__(self, path: Path, workload: Workload) -> None:
        if workload.phase == "forward":
            raise Unsupported("llama.cpp runs no networks of one forward pass; use --backend onnxruntime")
        if workload.batch != 1:
            raise Unsupported(f"llama.cpp is timed with batch 1, got batch {workload.batch}")
        self._workload = workload
        self._model = load_model(path, repack=setting(workload, _SWITCHES, "repack") == "on")
        self._context: Any = None
        try:
            self._prepare_()
        except Unsupported:
            self.close()
            raise

    def _prepare_(self) -> None:
        workload = self._workload
        self._vocab = library().llama_model_get_vocab(self._model)
        num_tokens = workload.context if workload.phase == "decode" else workload.prompt_tokens
        self._context = self._new_context(num_tokens + 1, max_outputs=1)
        self._memory = library().llama_get_memory(self._context)
        prompt = random_tokens(num_tokens, vocab_size=self._vocab_size)
        if workload.phase == "decode":
            self._decode(self._context, batch_of(prompt))
            self._batch = batch_of(prompt[:1])
            self._first_position = num_tokens
        else:
            self._batch = batch_of(prompt)
            self._first_position = 0

    def sample(self) -> int:
        lib = library()
        start = time.perf_counter_ns()
        status = lib.llama_decode(self._context, self._batch)
        lib.llama_synchronize(self._context)
        elapsed = time.perf_counter_ns() - start
        self._check(status)
        # back to where it was, so that every sample sees the same context length
        lib.llama_memory_seq_rm(self._memory, 0, self._first_position, -1)
        return elapsed

    def logits(self, token_ids: Sequence[int], *, incremental: bool) -> NDArray[np.float32]:
        lib = library()
        rows: list[NDArray[np.float32]] = []
        count = len(token_ids)
        context = self._new_context(count, max_outputs=count)
        try:
            for chunk in [[token] for token in token_ids] if incremental else [list(token_ids)]:
                batch = lib.llama_batch_init(len(chunk), 0, 1)
                try:
                    fill_(batch, chunk, first_position=len(rows), num_rows=len(chunk))
                    self._decode(context, batch)
                finally:
                    lib.llama_batch_free(batch)
                shape = (len(chunk), self._vocab_size)
                rows.extend(np.ctypeslib.as_array(lib.llama_get_logits(context), shape=shape).copy())
        finally:
            lib.llama_free(context)
        return np.stack(rows)

    def close(self) -> None:
        if self._context is not None:
            library().llama_free(self._context)
            self._context = None
        if self._model is not None:
            library().llama_model_free(self._model)
            self._model = None

    @property
    def _vocab_size(self) -> int:
        return int(library().llama_vocab_n_tokens(self._vocab))

    def _new_context(self, num_tokens: int, *, max_outputs: int) -> Any:
        return new_context(
            self._model,
            num_tokens,
            max_outputs=max_outputs,
            threads=self._workload.threads,
            flash_attention=setting(self._workload, _SWITCHES, "flash_attention"),
            kv_cache=setting(self._workload, _SWITCHES, "kv_cache"),
        )

    def _decode(self, context: Any, batch: Any) -> None:
        self._check(library().llama_decode(context, batch))

    def _check(self, status: int) -> None:
        if status != 0:
            raise Unsupported(f"llama.cpp failed ({status}) on {self._workload.describe()}: {reason()}")


class LlamaCppReader:
    """One model and one context; see `dilap.backends.Reader`."""

    def __init__(self, path: Path, *, threads: int, kv_cache: str = "f16") -> None:
        self._model, self._threads, self._kv_cache = load_model(path), threads, kv_cache
        self._context: Any = None
        self._batch = library().llama_batch_init(MAX_READ_TOKENS, 0, 1)
        self.max_tokens = int(library().llama_model_n_ctx_train(self._model))
        self.vocab_size = int(library().llama_vocab_n_tokens(library().llama_model_get_vocab(self._model)))

    def reserve(self, num_tokens: int) -> None:
        self._free_context_()
        at_once = min(num_tokens, MAX_READ_TOKENS)
        self._context = new_context(
            self._model,
            num_tokens,
            max_outputs=at_once,
            threads=self._threads,
            batch_tokens=at_once,
            kv_cache=self._kv_cache,
        )

    def read(self, token_ids: Sequence[int], *, start: int, num_rows: int) -> NDArray[np.float32]:
        lib = library()
        lib.llama_memory_seq_rm(lib.llama_get_memory(self._context), 0, start, -1)
        fill_(self._batch, token_ids, first_position=start, num_rows=num_rows)
        if (status := lib.llama_decode(self._context, self._batch)) != 0:
            raise Unsupported(f"llama.cpp failed ({status}) on {len(token_ids)} tokens at {start}: {reason()}")
        return np.ctypeslib.as_array(lib.llama_get_logits(self._context), shape=(num_rows, self.vocab_size)).copy()

    def close(self) -> None:
        self._free_context_()
        if self._model is not None:
            library().llama_batch_free(self._batch)
            library().llama_model_free(self._model)
            self._model = None

    def _free_context_(self) -> None:
        if self._context is not None:
            library().llama_free(self._context)
            self._context = None

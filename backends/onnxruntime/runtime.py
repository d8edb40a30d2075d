"""ONNX Runtime on the CPU, for image networks and for decoders whose KV cache is among their inputs and outputs."""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dilap.backends import Session
from dilap.backends.inputs import random_tokens, require_batch, setting
from dilap.backends.onnxruntime.library import NO_FLASH, SPINNING, library, open_session
from dilap.backends.onnxruntime.network import OnnxNetwork
from dilap.core.bounds import MAX_TOKENS
from dilap.core.codec import read_json
from dilap.core.documents import value_at
from dilap.core.errors import InvalidInput, Unavailable, Unsupported
from dilap.core.rules import Capabilities, NetworkCapabilities
from dilap.core.shape import Architecture
from dilap.core.workload import Workload

_PAST, _PRESENT = "past_key_values.", "present."
# Flash attention slows down single tokens: in ONNX Runtime 1.31 on x86-64, a token's attention in one layer of
# SmolLM2-135M takes 40 us with it and 23 us without (256 tokens before it; with 2048, 306 and 191 us). Prompts of 1024
# tokens or more are read faster with it. Threads that do not spin while they wait must be woken for every operator.
_SWITCHES = {"flash_attention": ("on", "off"), "spinning": ("on", "off")}
_MAX_TOKENS = 4096  # positions in the rotary tables of the probe models, on which latency tables are measured


class OnnxRuntime:
    """Runs the ONNX files that DiLAP's exporter writes."""

    name = "onnxruntime"
    format = "onnx"
    load_seconds = 300.0
    shares_threads = False
    lossy_switches: frozenset[str] = frozenset()

    def unavailable(self) -> str | None:
        try:
            library()
        except (Unavailable, OSError) as error:
            return str(error)
        return None

    def version(self) -> str:
        return str(library().__version__)

    def build(self) -> str:
        """Return the build and its execution providers; kernels are chosen by the processor at run time."""
        return f"{library().get_build_info()}, providers {', '.join(library().get_available_providers())}"

    def precisions(self) -> tuple[str, ...]:
        return ("f32", "int8", "int4")

    def network_precisions(self) -> tuple[str, ...]:
        return ("f32", "int8")

    def switches(self) -> Mapping[str, tuple[str, ...]]:
        return _SWITCHES

    def how_to_run(self, file: str, workload: Workload) -> dict[str, str]:
        lines = ["options = onnxruntime.SessionOptions()", f"options.intra_op_num_threads = {workload.threads}"]
        options = {"intra_op_num_threads": str(workload.threads)}
        if setting(workload, _SWITCHES, "spinning") == "off":
            lines.append(f'options.add_session_config_entry("{SPINNING}", "0")')
            options[SPINNING] = "0"
        lines.append(f'onnxruntime.InferenceSession("{file}", options)')
        found = {"python": "; ".join(lines)}
        if workload.phase != "forward":  # onnxruntime-genai runs decoders
            found["genai_config.json"] = f"session_options: {json.dumps(options)}"
        if setting(workload, _SWITCHES, "flash_attention") == "off":
            found["environment"] = f"{NO_FLASH}=1"
        return found

    def cache_bits(self, workload: Workload) -> float:  # noqa: ARG002  (the exported graphs keep floats)
        return 32.0

    def after_a_crash(self) -> str:
        return "try another version of it: pip install --upgrade onnxruntime"

    def capabilities(self, architecture: Architecture, *, precision: str) -> Capabilities:
        if precision not in self.precisions():
            raise InvalidInput(f"ONNX Runtime precision {precision!r} is unknown; use {', '.join(self.precisions())}")
        experts = architecture.experts
        if experts is not None and precision != "f32" and experts.num_channels % 32:
            return Capabilities(
                unsupported=f"ONNX Runtime quantises experts of a multiple of 32 channels, not {experts.num_channels};"
                " use --precision f32"
            )
        return Capabilities(
            # 32: a quantisation block; one step for every precision keeps plans portable between them
            ffn_multiple=32,
            # GroupQueryAttention takes head sizes in steps of 8, and rotates them (rotary embedding) in steps of 16
            head_dim_multiple=8 if architecture.num_positions else 16,
            # a quantised embedding (GatherBlockQuantized) has whole blocks only
            hidden_multiple=1 if precision == "f32" else 32,
            max_tokens=_MAX_TOKENS,
        )

    def network_capabilities(self, *, precision: str) -> NetworkCapabilities:  # noqa: ARG002
        # 8: channels lie in blocks of the vector registers (NCHWc: 8 floats with AVX2, 16 with AVX-512)
        return NetworkCapabilities(channel_multiple=8, switches=frozenset({"spinning"}))

    def load(self, path: Path, workload: Workload) -> Session:
        if workload.phase != "forward":
            return OnnxRuntimeSession(path, workload)
        network = OnnxNetwork(path, threads=workload.threads, spinning=setting(workload, _SWITCHES, "spinning"))
        require_batch(path, network.shape, workload)
        return network


class OnnxRuntimeSession:
    """One model with a KV cache that has the workload's content before every sample.

    The cache's inputs and outputs are the same buffers: the attention operator writes the new rows in place, so
    nothing is copied, and every sample overwrites the rows of the one before it.
    """

    def __init__(self, path: Path, workload: Workload) -> None:
        if workload.batch != 1:
            raise Unsupported(f"ONNX Runtime is timed with batch 1, got batch {workload.batch}")
        self._model = _Model(
            path,
            threads=workload.threads,
            flash_attention=setting(workload, _SWITCHES, "flash_attention"),
            spinning=setting(workload, _SWITCHES, "spinning"),
        )
        num_tokens = workload.context if workload.phase == "decode" else workload.prompt_tokens
        prompt = random_tokens(num_tokens, vocab_size=self._model.vocab_size)
        cache = self._model.new_cache(num_tokens + 1)
        self._binding, _ = self._model.bind(cache, prompt, start=0, num_rows=1)
        if workload.phase == "decode":
            self._model.run(self._binding)
            self._binding, _ = self._model.bind(cache, prompt[:1], start=num_tokens, num_rows=1)

    def sample(self) -> int:
        start = time.perf_counter_ns()
        self._model.run(self._binding)
        return time.perf_counter_ns() - start

    def logits(self, token_ids: Sequence[int], *, incremental: bool) -> NDArray[np.float32]:
        rows: list[NDArray[np.float32]] = []
        cache = self._model.new_cache(len(token_ids))
        for chunk in [[token] for token in token_ids] if incremental else [list(token_ids)]:
            binding, logits = self._model.bind(cache, chunk, start=len(rows), num_rows=len(chunk))
            self._model.run(binding)
            rows.extend(logits.numpy()[0].copy())
        return np.stack(rows)

    def close(self) -> None:
        self._binding = None
        self._model.close()


class OnnxRuntimeReader:
    """One model and one KV cache; see `dilap.backends.Reader`."""

    def __init__(self, path: Path, *, threads: int) -> None:
        self._model = _Model(path, threads=threads)
        self._cache: dict[str, Any] = {}
        self.vocab_size = self._model.vocab_size
        self.max_tokens = _context_length(path)

    def reserve(self, num_tokens: int) -> None:
        self._cache = self._model.new_cache(num_tokens)

    def read(self, token_ids: Sequence[int], *, start: int, num_rows: int) -> NDArray[np.float32]:
        binding, logits = self._model.bind(self._cache, token_ids, start=start, num_rows=num_rows)
        self._model.run(binding)
        rows: NDArray[np.float32] = logits.numpy()[0].copy()
        return rows

    def close(self) -> None:
        self._cache = {}
        self._model.close()


class _Model:
    """An inference session of a decoder, and how its inputs and outputs are bound."""

    def __init__(self, path: Path, *, threads: int, flash_attention: str = "on", spinning: str = "on") -> None:
        self._session: Any = open_session(path, threads=threads, flash_attention=flash_attention, spinning=spinning)
        self._inputs = {value.name: value for value in self._session.get_inputs()}
        self.vocab_size = self._read_vocab_size(path)

    def close(self) -> None:
        self._session = None

    def run(self, binding: Any) -> None:
        self._session.run_with_iobinding(binding)

    def _read_vocab_size(self, path: Path) -> int:
        """Return the size of the vocabulary. Raises InvalidInput for a file that is no decoder of DiLAP's exporter."""
        outputs = {value.name: value for value in self._session.get_outputs()}
        names = {*self._inputs, *outputs, *(value.name for value in self._session.get_overridable_initializers())}
        if missing := sorted({"input_ids", "attention_mask", "logits_to_keep", "logits"} - names):
            raise InvalidInput(f"{path}: not a decoder that DiLAP exported: it has no {missing[0]}")
        return int(outputs["logits"].shape[2])

    def new_cache(self, capacity: int) -> dict[str, Any]:
        """Return cache tensors of zeros with room for `capacity` tokens, by input name."""
        return {
            name: _tensor(np.zeros((1, value.shape[1], capacity, value.shape[3]), np.float32))
            for name, value in self._inputs.items()
            if name.startswith(_PAST)
        }

    def bind(self, cache: dict[str, Any], token_ids: Sequence[int], *, start: int, num_rows: int) -> tuple[Any, Any]:
        """Bind tokens that follow `start` others. Return the binding and its logits, which a run fills.

        The logits (1 x num_rows x vocabulary) are those of the last `num_rows` tokens.
        """
        end = start + len(token_ids)
        feed = {
            "input_ids": np.array([token_ids], np.int64),
            "attention_mask": np.ones((1, end), np.int64),
            "logits_to_keep": np.array([num_rows], np.int64),
        }
        if "position_ids" in self._inputs:
            feed["position_ids"] = np.arange(start, end, dtype=np.int64)[None]
        binding = self._session.io_binding()
        for name, array in feed.items():
            binding.bind_ortvalue_input(name, _tensor(array))
        for name, buffer in cache.items():
            binding.bind_ortvalue_input(name, buffer)
            binding.bind_ortvalue_output(name.replace(_PAST, _PRESENT), buffer)
        logits = _tensor(np.zeros((1, num_rows, self.vocab_size), np.float32))
        binding.bind_ortvalue_output("logits", logits)
        return binding, logits


def _context_length(path: Path) -> int:
    """Return the context length from the genai_config.json that lies beside the model. Raises InvalidInput."""
    config = path.with_name("genai_config.json")
    length = value_at(read_json(config), "model", "context_length")
    if type(length) is not int or not 0 < length <= MAX_TOKENS:
        raise InvalidInput(f"{config}: it has no model.context_length")
    return length


def _tensor(array: NDArray[np.generic]) -> Any:
    """Return an OrtValue that shares the array's memory."""
    return library().OrtValue.ortvalue_from_numpy(array)

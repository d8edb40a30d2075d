"""ExecuTorch on the CPU: its XNNPACK delegate, through the Python bindings of its wheel.

The bindings are linked against libtorch and load nothing without it (the torch-free runtime on PyPI is of an older
ExecuTorch and lacks the attention and cache operators that our programs call), so this runtime needs torch after all.
It is imported when the bindings are first used, not with this module.
"""

import importlib
import importlib.metadata
import importlib.util
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dilap.backends import Session
from dilap.backends.executorch.bindings import MAX_CONTEXT, bindings
from dilap.backends.executorch.network import ExecuTorchNetwork
from dilap.backends.executorch.program import Program, inputs_of
from dilap.backends.executorch.threads import hold_threads, release_threads, use_threads
from dilap.backends.inputs import random_tokens, require_batch
from dilap.core.errors import InvalidInput, Unsupported
from dilap.core.rules import Capabilities, NetworkCapabilities
from dilap.core.shape import Architecture
from dilap.core.workload import Workload

_PACKAGES = ("executorch", "torch")


class ExecuTorch:
    """Runs programs (.pte files) in ExecuTorch's runtime."""

    name = "executorch"
    format = "pte"
    load_seconds = 300.0
    shares_threads = True
    lossy_switches: frozenset[str] = frozenset()

    def unavailable(self) -> str | None:
        """Return which package is missing; None where all are installed.

        Nothing is imported: torch takes seconds, and torchao, which comes with it, lists at length the GPU libraries
        that it did not find.
        """
        missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
        if missing:
            return f"ExecuTorch is not usable here (no {' and no '.join(missing)}); pip install executorch"
        return None

    def version(self) -> str:
        return importlib.metadata.version("executorch")

    def build(self) -> str:
        """Return the machine type and the built-in delegates; XNNPACK chooses its kernels at run time."""
        bindings()  # imports what the next line does, without its warnings
        registry = importlib.import_module("executorch.runtime").Runtime.get().backend_registry
        return ", ".join([platform.machine(), *sorted(registry.registered_backend_names)])

    def precisions(self) -> tuple[str, ...]:
        return ("8da4w", "8da8w", "f32")

    def network_precisions(self) -> tuple[str, ...]:
        return ("f32", "int8")

    def switches(self) -> Mapping[str, tuple[str, ...]]:
        """Return none: only the number of threads can be chosen."""
        return {}

    def how_to_run(self, file: str, workload: Workload) -> dict[str, str]:
        threads = f"--cpu_threads={workload.threads}"
        for_text = {"llama_main": f"llama_main --model_path={file} --tokenizer_path=tokenizer.json {threads}"}
        return {
            **(for_text if workload.phase != "forward" else {}),
            "executor_runner": f"executor_runner --model_path={file} {threads}",
            "python": "import executorch.extension.llm.custom_ops.custom_ops, executorch.kernels.quantized, "
            "executorch.runtime; executorch.extension.pybindings.portable_lib._unsafe_reset_threadpool"
            f'({workload.threads}); executorch.runtime.Runtime.get().load_program("{file}")',
        }

    def cache_bits(self, workload: Workload) -> float:  # noqa: ARG002  (the exported graphs keep floats)
        return 32.0

    def after_a_crash(self) -> str:
        return "try another version of it: pip install --upgrade executorch"

    def capabilities(self, architecture: Architecture, *, precision: str) -> Capabilities:
        if precision not in self.precisions():
            raise InvalidInput(f"ExecuTorch precision {precision!r} is unknown; use {', '.join(self.precisions())}")
        if architecture.experts is not None:
            return Capabilities(unsupported="ExecuTorch's XNNPACK has no operator that sends tokens to experts")
        if architecture.family == "gemma2":
            reason = "ExecuTorch's attention has no soft cap, as Gemma 2 needs it; use --backend onnxruntime"
            return Capabilities(unsupported=reason)
        # 32: a group of 4-bit weights; one step for every precision keeps plans portable between them
        return Capabilities(ffn_multiple=32, hidden_multiple=1 if precision == "f32" else 32, max_tokens=MAX_CONTEXT)

    def network_capabilities(self, *, precision: str) -> NetworkCapabilities:  # noqa: ARG002
        # 8: XNNPACK's kernels compute 8 channels at once, or 16, with and without 8 bits
        return NetworkCapabilities(channel_multiple=8)

    def load(self, path: Path, workload: Workload) -> Session:
        if workload.phase != "forward":
            return ExecuTorchSession(path, workload)
        network = ExecuTorchNetwork(path, threads=workload.threads)
        require_batch(path, network.shape, workload)
        return network


class ExecuTorchSession:
    """One loaded program. A run names the position that it writes, so every sample sees the same context."""

    def __init__(self, path: Path, workload: Workload) -> None:
        if workload.batch != 1:
            raise Unsupported(f"ExecuTorch is timed with batch 1, got batch {workload.batch}")
        use_threads(workload.threads)
        self._workload = workload
        self._program = Program(path, method="forward")
        num_tokens = workload.context if workload.phase == "decode" else workload.prompt_tokens
        needed = num_tokens + (workload.phase == "decode")
        room, vocab_size = (self._program.constant(name) for name in ("get_max_context_len", "get_vocab_size"))
        if needed > room:
            raise Unsupported(f"{path}: it has room for {room} tokens, {workload.describe()} needs {needed}")
        hold_threads(self)
        prompt = random_tokens(num_tokens, vocab_size=vocab_size)
        if workload.phase == "decode":
            self._program.logits_at(prompt, position=0)
            self._inputs = inputs_of(prompt[:1], position=num_tokens)
        else:
            self._inputs = inputs_of(prompt, position=0)

    def sample(self) -> int:
        start = time.perf_counter_ns()
        self._program.run(self._inputs)
        return time.perf_counter_ns() - start

    def logits(self, token_ids: Sequence[int], *, incremental: bool) -> NDArray[np.float32]:
        # What this leaves in the cache changes no later sample: a run costs the same whatever the cache holds.
        return self._program.logits(token_ids, incremental=incremental)

    def close(self) -> None:
        release_threads(self)
        self._program.close()


class ExecuTorchReader:
    """Reads text with a program's method `score`, which has a KV cache of its own; see `dilap.backends.Reader`."""

    def __init__(self, path: Path, *, threads: int) -> None:
        use_threads(threads)
        self._program = Program(path, method="score")
        self.max_tokens = self._program.constant("get_max_context_len")
        self.vocab_size = self._program.constant("get_vocab_size")
        self._max_scored = self._program.constant("get_max_scored_len")
        hold_threads(self)

    def reserve(self, num_tokens: int) -> None:
        assert num_tokens <= self.max_tokens  # a program has reserved all its room

    def read(self, token_ids: Sequence[int], *, start: int, num_rows: int) -> NDArray[np.float32]:
        rows: list[NDArray[np.float32]] = []
        for at in range(0, len(token_ids), self._max_scored):
            tokens = token_ids[at : at + self._max_scored]
            logits = self._program.logits_at(tokens, position=start + at)
            rows.append(logits[max(0, len(token_ids) - num_rows - at) :])
        return np.concatenate(rows)

    def close(self) -> None:
        release_threads(self)
        self._program.close()

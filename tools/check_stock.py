"""Does a run keep its budget in the stock runtime, timed without any of DiLAP's code?

    tools/check_stock runs/quickstart                      as artifact.json says to run it, and in plain defaults beside
    tools/check_stock runs/quickstart --processes 8

RUN/dense and RUN/artifact are opened side by side in a fresh process, by llama-cpp-python's `Llama`, onnxruntime's
`InferenceSession` or ExecuTorch's `Runtime`, and do the workload of result.json in turns, round after round; several
processes follow one another. The interval comes from a bootstrap of processes and their rounds. Exit codes: 0 the
budget is kept, 1 it is missed or the interval does not tell, 2 bad input.
"""

import argparse
import importlib
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Step = Callable[[], object]  # does the workload once
_SAMPLES = 5  # of each model in a round
_LEAD_IN_SECONDS = 0.5  # before them
_WARM_UP = 10  # of each model in a process: caches, clocks and lazily packed weights
_RESAMPLES = 2000
_CACHE_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 8}  # GGML_TYPE_*
_NO_FLASH = "ORT_GQA_DISABLE_FLASH_ATTENTION"
_PACKAGES = {"llamacpp": "llama-cpp-python", "onnxruntime": "onnxruntime", "executorch": "executorch"}


class BadInput(Exception):
    """What is wrong, in one line for the user."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a process times: a token after `num_tokens` others, or a prompt of so many.

    `plain` leaves the number of threads and every switch at the runtime's defaults.
    """

    backend: str
    files: tuple[str, str]
    decode: bool
    num_tokens: int
    threads: int
    switches: dict[str, str]
    plain: bool = False

    @property
    def room(self) -> int:
        return self.num_tokens + self.decode


@dataclass(frozen=True, kw_only=True)
class Run:
    """What is checked of a run's folder; its budget is a share of the dense latency or a number of seconds."""

    work: Work
    fraction: float | None
    seconds: float | None
    quantile: float

    @property
    def limit(self) -> str:
        return f"{self.fraction:.4g} of dense" if self.fraction is not None else f"{(self.seconds or 0) * 1e3:.4g} ms"


def read_run(folder: Path) -> Run:
    """Read what is checked of a run's folder. Raises BadInput for a run that cannot be checked here."""
    result = _document(folder / "result.json")
    if result.get("type") != "PruneResult":
        raise BadInput(f"{folder} is no run with a latency budget: result.json is a {result.get('type')}")
    if result["target"] != "host_cpu" or result["status"] == "estimated":
        raise BadInput(f"{folder} was not measured on a machine like this: {result['target']}, {result['status']}")
    budget, workload = result["budget"], result["workload"]
    if budget.get("ratio") is not None:
        raise BadInput(f"{folder} was pruned to a share of its weights: there is no latency to keep")
    sidecars = [_document(folder / name / "artifact.json") for name in ("dense", "artifact")]
    run = sidecars[1].get("run") or workload  # how the artifact says to run it
    work = Work(
        backend=result["backend"],
        files=(str(folder / "dense" / sidecars[0]["path"]), str(folder / "artifact" / sidecars[1]["path"])),
        decode=workload["phase"] == "decode",
        num_tokens=workload["context"] if workload["phase"] == "decode" else workload["prompt_tokens"],
        threads=run["threads"],
        switches=run.get("switches", {}),
    )
    quantile = int(budget["statistic"].removeprefix("p")) / 100
    return Run(work=work, fraction=budget["fraction"], seconds=budget["seconds"], quantile=quantile)


def _document(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(f"{path} cannot be read: {error}") from error
    if not isinstance(document, dict):
        raise BadInput(f"{path} is no JSON object")
    return document


# the stock runtimes


def open_llamacpp(file: str, work: Work) -> Step:
    llama_cpp: Any = importlib.import_module("llama_cpp")
    options: dict[str, Any] = {}
    if not work.plain:
        cache = _CACHE_TYPES[work.switches.get("kv_cache", "f16")]
        batch = max(512, work.room)  # llama-cpp-python's default, or the whole prompt at once
        options = {
            "n_threads": work.threads,
            "n_threads_batch": work.threads,
            "flash_attn": work.switches.get("flash_attention") != "off",
            "type_k": cache,
            "type_v": cache,
            "n_batch": batch,
            "n_ubatch": batch,
        }
    model = llama_cpp.Llama(file, n_ctx=work.room, n_gpu_layers=0, verbose=False, **options)
    prompt = _tokens(work.num_tokens, vocab_size=model.n_vocab())
    before, after = (prompt, prompt[:1]) if work.decode else ([], prompt)
    model.eval(before)

    def step() -> None:
        model.n_tokens = len(before)  # `eval` cuts the KV cache back to this length
        model.eval(after)
        llama_cpp.llama_synchronize(model.ctx)

    return step


def open_onnxruntime(file: str, work: Work) -> Step:
    onnxruntime: Any = importlib.import_module("onnxruntime")
    options = onnxruntime.SessionOptions()
    if not work.plain:
        options.intra_op_num_threads = work.threads
        if work.switches.get("spinning") == "off":
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    inputs = {value.name: value for value in session.get_inputs()}
    vocab_size = next(value.shape[2] for value in session.get_outputs() if value.name == "logits")
    tensor = onnxruntime.OrtValue.ortvalue_from_numpy
    cache = {  # one buffer for past and present, as in ONNX Runtime GenAI
        name: tensor(np.zeros((1, value.shape[1], work.room, value.shape[3]), np.float32))
        for name, value in inputs.items()
        if name.startswith("past_key_values.")
    }
    logits = tensor(np.zeros((1, 1, vocab_size), np.float32))
    prompt = _tokens(work.num_tokens, vocab_size=vocab_size)

    def bound(tokens: Sequence[int], start: int) -> Any:
        end = start + len(tokens)
        feed: dict[str, NDArray[np.int64]] = {
            "input_ids": np.array([tokens], np.int64),
            "attention_mask": np.ones((1, end), np.int64),
            "position_ids": np.arange(start, end, dtype=np.int64)[None],
            "logits_to_keep": np.array([1], np.int64),
        }
        binding = session.io_binding()
        for name, array in feed.items():
            if name in inputs or name == "logits_to_keep":
                binding.bind_ortvalue_input(name, tensor(array))
        for name, buffer in cache.items():
            binding.bind_ortvalue_input(name, buffer)
            binding.bind_ortvalue_output(name.replace("past_key_values", "present"), buffer)
        binding.bind_ortvalue_output("logits", logits)
        return binding

    whole = bound(prompt, 0)
    session.run_with_iobinding(whole)
    once = bound(prompt[:1], work.num_tokens) if work.decode else whole
    return lambda: session.run_with_iobinding(once)


def open_executorch(file: str, work: Work) -> Step:
    for name in ("extension.llm.custom_ops.custom_ops", "kernels.quantized"):  # they register operators
        importlib.import_module(f"executorch.{name}")
    torch: Any = importlib.import_module("torch")
    if not work.plain:
        bindings: Any = importlib.import_module("executorch.extension.pybindings.portable_lib")
        if bindings._threadpool_get_thread_count() != work.threads:  # before any program is open
            bindings._unsafe_reset_threadpool(work.threads)
    program: Any = importlib.import_module("executorch.runtime").Runtime.get().load_program(file)
    (vocab_size,) = program.load_method("get_vocab_size").execute([])
    method = program.load_method("forward")
    prompt = _tokens(work.num_tokens, vocab_size=int(vocab_size))
    whole = [torch.tensor([prompt]), torch.tensor([0])]
    method.execute(whole)
    once = [torch.tensor([prompt[:1]]), torch.tensor([work.num_tokens])] if work.decode else whole

    return lambda: method.execute(once)


OPENERS: dict[str, Callable[[str, Work], Step]] = {
    "llamacpp": open_llamacpp,
    "onnxruntime": open_onnxruntime,
    "executorch": open_executorch,
}


def _tokens(count: int, *, vocab_size: int) -> list[int]:
    draw = random.Random(1)
    return [draw.randrange(vocab_size) for _ in range(count)]


# timing


def times(steps: Sequence[Step], *, rounds: int) -> list[list[list[int]]]:
    """Return nanoseconds by model, round and sample; the models take turns, in an order that every round reverses."""
    for step in steps:
        for _ in range(_WARM_UP):
            step()
    found: list[list[list[int]]] = [[] for _ in steps]
    for number in range(rounds):
        order = range(len(steps)) if number % 2 else reversed(range(len(steps)))
        for index in order:
            _lead_in(steps[index])
            found[index].append([_nanoseconds(steps[index]) for _ in range(_SAMPLES)])
    return found


def _lead_in(step: Step) -> None:
    """Run a model untimed for a while, until the caches hold as much of it as when nothing else runs."""
    end = time.perf_counter() + _LEAD_IN_SECONDS
    while time.perf_counter() < end:
        step()


def _nanoseconds(step: Step) -> int:
    start = time.perf_counter_ns()
    step()
    return time.perf_counter_ns() - start


def in_fresh_process(work: Work, *, rounds: int) -> list[list[list[int]]]:
    """Time the work in a new process; return nanoseconds by model, round and sample.

    Raises BadInput, with the last line of its errors, where the process fails or dies.
    """
    environment = {name: value for name, value in os.environ.items() if name != _NO_FLASH}
    if work.backend == "onnxruntime" and not work.plain and work.switches.get("flash_attention") == "off":
        environment[_NO_FLASH] = "1"
    command = [sys.executable, "-P", __file__, "--worker", json.dumps(asdict(work)), "--rounds", str(rounds)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        words = done.stderr.strip().splitlines() or ["nothing"]
        raise BadInput(f"{_PACKAGES[work.backend]} failed ({done.returncode}); it said last: {words[-1][:300]}")
    samples: list[list[list[int]]] = json.loads(done.stdout.splitlines()[-1])
    return samples


def _worker(text: str, rounds: int) -> None:
    document = json.loads(text)
    work = Work(**{**document, "files": tuple(document["files"])})
    steps = [OPENERS[work.backend](file, work) for file in work.files]
    print(json.dumps(times(steps, rounds=rounds)))


# arithmetic


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What was found: the latency of both models in seconds, and two numbers as (value, low, high).

    `ratio` is the pruned latency over the dense one, `share` the share of the budget that is used.
    """

    dense: float
    pruned: float
    ratio: tuple[float, float, float]
    share: tuple[float, float, float]

    @property
    def verdict(self) -> str:
        _, low, high = self.share
        return "kept" if high <= 1 else "missed" if low > 1 else "within the noise"


def finding(samples: NDArray[np.float64], run: Run, *, seed: int = 0) -> Finding:
    """Return what nanoseconds (processes x models x rounds x samples) say.

    A process is one observation: the ratio of its own quantiles. The bootstrap draws processes, and rounds in each.
    """
    generator = np.random.default_rng(seed)
    num_processes, _, num_rounds, _ = samples.shape

    def measured(chosen: Any, rows: Any) -> tuple[float, float]:
        """Return the ratio and the share of the budget, which are medians over processes."""
        picked = np.stack([samples[one][:, row] for one, row in zip(chosen, rows, strict=True)])
        values = np.quantile(picked.reshape(*picked.shape[:2], -1), run.quantile, axis=-1) * 1e-9
        ratio = float(np.median(values[:, 1] / values[:, 0]))
        used = ratio / run.fraction if run.fraction else float(np.median(values[:, 1])) / (run.seconds or 1.0)
        return ratio, used

    point = measured(np.arange(num_processes), np.tile(np.arange(num_rounds), (num_processes, 1)))
    size = (num_processes, num_rounds)
    drawn = [
        measured(generator.integers(num_processes, size=num_processes), generator.integers(num_rounds, size=size))
        for _ in range(_RESAMPLES)
    ]
    lows, highs = np.quantile(drawn, [0.025, 0.975], axis=0)
    dense, pruned = (float(np.quantile(samples[:, index], run.quantile)) * 1e-9 for index in (0, 1))
    ratio, share = ((point[i], float(lows[i]), float(highs[i])) for i in (0, 1))
    return Finding(dense=dense, pruned=pruned, ratio=ratio, share=share)


def line(name: str, found: Finding) -> str:
    ratio, low, high = found.ratio
    return (
        f"{name:22}{found.dense * 1e3:9.3f}{found.pruned * 1e3:9.3f}   {ratio:6.1%} [{low:.1%}, {high:.1%}]"
        f"   {found.share[0]:6.1%} used: {found.verdict}"
    )


def check(run: Run, *, processes: int, rounds: int) -> list[Finding]:
    """Return what is found as the artifact says to run it, and in plain defaults; their processes take turns."""
    works = [replace(run.work, plain=plain) for plain in (False, True)]
    samples = [[in_fresh_process(work, rounds=rounds) for work in works] for _ in range(processes)]
    return [finding(np.array(kept, np.float64), run) for kept in zip(*samples, strict=True)]


def _main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", type=Path, metavar="RUN")
    parser.add_argument("--processes", type=int, default=5, metavar="N", help="fresh ones, of each configuration (5)")
    parser.add_argument("--rounds", type=int, default=20, metavar="N", help="in each, of five samples a model (20)")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker is not None:
        _worker(given.worker, given.rounds)
        return 0
    if given.run is None or min(given.processes, given.rounds) < 2:
        raise BadInput("name a run's folder; --processes and --rounds are at least 2")
    run = read_run(given.run)
    if run.work.backend not in OPENERS:
        raise BadInput(f"{run.work.backend} is not run on this machine")
    what = f"a token after {run.work.num_tokens}" if run.work.decode else f"a prompt of {run.work.num_tokens}"
    switches = "".join(f", {name} {value}" for name, value in run.work.switches.items())
    print(f"{given.run}: {what}, {_PACKAGES[run.work.backend]}, budget {run.limit}")
    if run.work.backend == "llamacpp" and run.work.switches.get("repack") == "off":
        print("llama-cpp-python cannot leave weights as they lie in the file (repack off): it repacks them here")
    said, plain = check(run, processes=given.processes, rounds=given.rounds)
    print(f"{'':22}{'dense ms':>9}{'pruned':>9}   pruned / dense")
    print(line(f"{run.work.threads} threads{switches}", said))
    print(line("plain defaults", plain))
    return 0 if said.verdict == "kept" else 1


def main() -> None:
    try:
        code = _main()
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)


if __name__ == "__main__":
    main()

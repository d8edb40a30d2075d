"""Timing programs that the user builds for a device without Python, and what they print.

executor_runner   ExecuTorch's; kept running in server mode, one inference a line that it is sent
llama_main        ExecuTorch's language-model runner; needs the tokenizer, so it times models but no probes
llama-bench       llama.cpp's
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from dilap.backends.inputs import random_images, require_batch
from dilap.backends.llamacpp.bench_flags import llama_bench_flags
from dilap.core.artifact import Artifact
from dilap.core.bounds import MAX_TOKENS
from dilap.core.codec import checked, decode, read_json
from dilap.core.documents import parse_object, value_at
from dilap.core.errors import DilapError, InvalidInput, LinkLost, Unsupported
from dilap.core.workload import Workload
from dilap.profilers.instruments import memory
from dilap.profilers.links.transports import Completed, Process, Transport

_SECONDS = 600.0  # limit of a start, of the loading of a model and of one answer
_SESSION_SECONDS = 24 * 3600.0
_MAX_LOG_LINES = 100_000  # before the line that is waited for: a runner logs a dozen lines a run
_GENERATED = 32  # tokens of one start: many, because llama_main's clock counts milliseconds
_TOKENS_A_SAMPLE = 8  # llama-bench times so many at once; decoding them moves the context by less than 3 %
_WATCHED_SAMPLES = 8  # of a start whose memory is watched: together they take longer than its loading


@dataclass(frozen=True, kw_only=True)
class Job:
    """A model on the device, and how to time it. `prefix` is what pins the program to its cores."""

    model: str
    local: Path
    workload: Workload
    prefix: tuple[str, ...]
    put: Callable[[str, bytes], str]  # a small file's name and content to its path on the device


class RunnerSession(Protocol):
    """One model, loaded by one runner."""

    @property
    def load_seconds(self) -> float:
        """Seconds that loading took, as far as the program says."""

    @property
    def peak_memory_bytes(self) -> int:
        """The program's peak memory; 0 where the device does not say it."""

    def sample(self, count: int) -> list[int]:
        """Time the workload `count` times and return the nanoseconds."""

    def average_memory(self, runs: int) -> int | None:
        """Run the workload up to `runs` times, untimed; the program's average memory, None where it cannot be seen."""

    def close(self) -> None:
        """End the program."""


class Runner(Protocol):
    """A timing program: `name` is what its file's name begins with, `backend` the runtime that it has inside."""

    name: str
    backend: str

    def check(self, transport: Transport, program: str) -> str:
        """Return its version, as far as it says. Raises Unsupported for one that is too old."""

    def open(self, transport: Transport, program: str, job: Job) -> RunnerSession:
        """Load a model."""


def find_runner(path: Path) -> Runner:
    """Return the runner that a file is, by what its name begins with. Raises InvalidInput."""
    runner = next((one for name, one in RUNNERS.items() if path.name.startswith(name)), None)
    if runner is None:
        raise InvalidInput(f"{path}: not a runner that DiLAP knows; a file's name begins with {', '.join(RUNNERS)}")
    if not path.is_file():
        raise InvalidInput(f"{path}: no such runner; build it for the device and give its path with --runner")
    return runner


class ExecutorRunner:
    """ExecuTorch's executor_runner. A run lasts from one line of its log to another; the log counts microseconds."""

    name = "executor_runner"
    backend = "executorch"
    _FLAGS = ("server_mode", "input_shapes", "cpu_threads")

    def check(self, transport: Transport, program: str) -> str:
        # gflags prints its help and exits with 1
        said = transport.run([program, "--help"], seconds=_SECONDS)
        missing = [flag for flag in self._FLAGS if f"-{flag} " not in said.stdout + said.stderr]
        if missing:
            raise Unsupported(
                f"this executor_runner has no --{missing[0]}: build it from ExecuTorch of September 2026 or later"
            )
        return "server mode"

    def open(self, transport: Transport, program: str, job: Job) -> "ExecutorRunnerSession":
        return ExecutorRunnerSession(transport, program, job)


class ExecutorRunnerSession:
    """An executor_runner in server mode, which runs the model once for every line that it is sent."""

    # `I 00:00:01.234567 executorch:executor_runner.cpp:716] SERVER MODE DONE`
    _LINE = re.compile(r"[DIEF] ([0-9]{1,6}):([0-9]{1,2}):([0-9]{1,2})\.([0-9]{6}) executorch:[^\]]*\] (.*)")

    def __init__(self, transport: Transport, program: str, job: Job) -> None:
        files, shapes = _images(job) if job.workload.phase == "forward" else _tokens(job)
        argv = [
            *job.prefix,
            program,
            f"--model_path={job.model}",
            f"--inputs={','.join(files)}",
            f"--input_shapes={','.join(shapes)}",
            f"--cpu_threads={job.workload.threads}",
            f"--output_file={files[0]}.out",
            "--print_output=none",
            "--server_mode",
        ]
        self._transport = transport
        self._process: Process = transport.start(
            ["sh", "-c", 'echo "pid $$"; exec "$@" 2>&1', "dilap-runner", *argv], seconds=_SESSION_SECONDS
        )
        try:
            self._pid = self._process.read_line(timeout=_SECONDS).strip().removeprefix("pid ")
            self.load_seconds = self._until("Running in server mode") / 1e6  # the log's clock starts with the program
            self.sample(1)
        except DilapError:
            self._process.close()
            raise

    @property
    def peak_memory_bytes(self) -> int:
        status = self._transport.run(["cat", f"/proc/{self._pid}/status"], seconds=60).stdout
        return memory.peak_bytes(status)

    def sample(self, count: int) -> list[int]:
        """Time `count` runs. One more before them is not timed, because it waits for its line and wakes the threads."""
        self._process.write("\n" * (count + 1))
        self._until("SERVER MODE DONE")
        samples, last = [], self._last
        for _ in range(count):
            done = self._until("Writing output to file")  # logged before it writes
            samples.append((done - last) * 1000)
            last = self._until("SERVER MODE DONE")
        if min(samples) <= 0:
            raise LinkLost(f"executor_runner's clock went backwards: {samples}; try again")
        return samples

    def average_memory(self, runs: int) -> int | None:
        watch = self._transport.start(memory.watched_process(self._pid), seconds=_SECONDS)
        try:
            self.sample(runs)
            lines = iter(lambda: watch.read_line(timeout=_SECONDS), memory.END)
            return memory.average_bytes("".join(lines))
        finally:
            watch.close()

    def close(self) -> None:
        self._process.close()

    def _until(self, words: str) -> int:
        """Read on to the log line that contains `words`, and return its time in microseconds."""
        for _ in range(_MAX_LOG_LINES):
            line = self._process.read_line(timeout=_SECONDS)
            found = self._LINE.match(line)
            if found is None:
                if words in line:
                    raise Unsupported(
                        "executor_runner logs no times: build it with -DEXECUTORCH_PAL_DEFAULT=posix and "
                        "-DEXECUTORCH_ENABLE_LOGGING=ON"
                    )
                continue
            hours, minutes, seconds, micros = map(int, found.groups()[:4])
            self._last = ((hours * 60 + minutes) * 60 + seconds) * 1_000_000 + micros
            if words in found[5]:
                return self._last
        raise LinkLost(f"executor_runner logged {_MAX_LOG_LINES:,} lines, and {words!r} in none of them; try again")


def _tokens(job: Job) -> tuple[list[str], list[str]]:
    """Put a decoder's two inputs on the device; return their files and shapes. Raises Unsupported for too many tokens.

    The files have the shape's upper bound; what is beyond --input_shapes is not read.
    """
    workload = job.workload
    count, position = (1, workload.context) if workload.phase == "decode" else (workload.prompt_tokens, 0)
    room = _max_context(job.local)
    if position + count > room:
        raise Unsupported(f"{job.local}: it has room for {room} tokens, {workload.describe()} needs more")
    tokens = job.put("tokens.bin", bytes(8 * room))
    return [tokens, job.put("position.bin", position.to_bytes(8, "little"))], [f"1x{count}", "1"]


def _images(job: Job) -> tuple[list[str], list[str]]:
    """Put a batch of random images on the device; return its file and shape. Raises Unsupported for another batch."""
    sidecar = job.local.with_name("artifact.json")
    input_ = decode(Artifact, read_json(sidecar), source=str(sidecar)).input
    if input_ is None:
        raise Unsupported(f"{job.local} is a decoder: it is timed in decode and prefill")
    require_batch(job.local, input_.shape, job.workload)
    images = job.put("images.bin", random_images(input_.shape).tobytes())
    return [images], ["x".join(map(str, input_.shape))]


def _max_context(path: Path) -> int:
    """Return the most tokens that an exported program takes, as its sidecar says. Raises InvalidInput."""
    sidecar = path.with_name("artifact.json")
    found = value_at(read_json(sidecar), "details", "max_context")
    if type(found) is not int or not 0 < found <= MAX_TOKENS:
        raise InvalidInput(f"{sidecar}: it does not say the program's max_context; export it with dilap-export")
    return found


class _Starts:
    """A program that starts, times a model and ends: one start gives one sample or several."""

    load_seconds = 0.0

    def __init__(self, transport: Transport, argv_of: Callable[[int], list[str]], parse: Callable[[str], list[int]]):
        self._transport, self._argv_of, self._parse = transport, argv_of, parse
        self.peak_memory_bytes = memory.peak_bytes(self._watched(1))

    def sample(self, count: int) -> list[int]:
        samples: list[int] = []
        while len(samples) < count:
            samples += self._samples(self._transport.run(self._argv_of(count - len(samples)), seconds=_SECONDS))
        return samples

    def average_memory(self, runs: int) -> int | None:
        return memory.average_bytes(self._watched(min(runs, _WATCHED_SAMPLES)))

    def _watched(self, count: int) -> str:
        """Run the program once and return what the kernel said of its memory meanwhile."""
        done = self._transport.run(memory.watched_start(self._argv_of(count)), seconds=_SECONDS)
        self._samples(replace(done, stderr=memory.other_words(done.stderr)))
        return done.stderr

    def _samples(self, done: Completed) -> list[int]:
        samples = self._parse(done.checked("the runner"))
        if not samples:
            raise LinkLost("the runner printed no sample; try again")
        if min(samples) <= 0:
            raise LinkLost(f"the runner's clock went backwards: {samples}; try again")
        return samples

    def close(self) -> None:
        """Nothing runs between two starts."""


class LlamaBench:
    """llama.cpp's own benchmark: JSON lines with raw samples."""

    name = "llama-bench"
    backend = "llamacpp"

    def check(self, transport: Transport, program: str) -> str:
        said = transport.run([program, "--help"], seconds=_SECONDS)
        if "--n-depth" not in said.stdout + said.stderr:
            raise Unsupported("this llama-bench has no --n-depth: build it from llama.cpp of May 2025 or later")
        return "jsonl"

    def open(self, transport: Transport, program: str, job: Job) -> _Starts:
        return _Starts(transport, lambda count: self.argv(program, job, count), parse_llama_bench)

    def argv(self, program: str, job: Job, count: int) -> list[str]:
        workload = job.workload
        work = (
            ["-p", "0", "-n", str(_TOKENS_A_SAMPLE), "-d", str(workload.context)]
            if workload.phase == "decode"
            else ["-p", str(workload.prompt_tokens), "-n", "0"]
        )
        flags = llama_bench_flags(workload)
        return [*job.prefix, program, "-m", job.model, *work, *flags, "-r", str(count), "-o", "jsonl"]


def parse_llama_bench(output: str) -> list[int]:
    """Return nanoseconds per decoded token or per prompt. Raises LinkLost where the output has no test's line."""
    for line in output.splitlines():
        if line.startswith("{"):
            try:
                test = parse_object(line, source="its result")
                tokens = checked(int, test.get("n_gen"), source="n_gen") or 1  # 0: a prefill, timed as a whole
                samples = checked(tuple[int, ...], test.get("samples_ns"), source="samples_ns")
            except InvalidInput as error:
                raise LinkLost(f"llama-bench printed {line[:80]!r} ({error}); try again") from error
            return [round(sample / tokens) for sample in samples]
    raise LinkLost(f"llama-bench printed no result but {output[-80:]!r}; try again")


class LlamaMain:
    """ExecuTorch's language-model runner: `PyTorchObserver {json}` with milliseconds of every stage."""

    name = "llama_main"
    backend = "executorch"
    _FLAGS = ("num_bos", "max_new_tokens", "ignore_eos", "warmup")

    def check(self, transport: Transport, program: str) -> str:
        said = transport.run([program, "--help"], seconds=_SECONDS)
        missing = [flag for flag in self._FLAGS if f"-{flag} " not in said.stdout + said.stderr]
        if missing:
            raise Unsupported(f"this llama_main has no --{missing[0]}: build it from ExecuTorch 1.1 or later")
        return "PyTorchObserver"

    def open(self, transport: Transport, program: str, job: Job) -> _Starts:
        return _Starts(
            transport, lambda _: self.argv(program, job), lambda said: [parse_llama_main(said, job.workload)]
        )

    def argv(self, program: str, job: Job) -> list[str]:
        tokenizer = job.local.with_name("tokenizer.json")
        if not tokenizer.exists():
            raise Unsupported(
                f"llama_main needs a tokenizer, and {tokenizer} is not there (probe models have none): "
                "build tables with executor_runner"
            )
        workload = job.workload
        tokens = workload.context if workload.phase == "decode" else workload.prompt_tokens
        folder = job.model.rpartition("/")[0]
        return [
            *job.prefix,
            program,
            f"--model_path={job.model}",
            f"--tokenizer_path={folder}/tokenizer.json",
            "--prompt=a",
            f"--num_bos={tokens - 1}",  # with the prompt's one token: a prompt of any length without any text
            f"--max_new_tokens={_GENERATED if workload.phase == 'decode' else 2}",
            "--temperature=0",
            "--ignore_eos",
            "--warmup",
            f"--cpu_threads={workload.threads}",
        ]


def parse_llama_main(output: str, workload: Workload) -> int:
    """Return the nanoseconds per generated token, or of the prompt.

    Raises LinkLost where the output has no statistics, Unsupported where the prompt had another length than asked.
    """
    lines = [line for line in output.splitlines() if line.startswith("PyTorchObserver ")]
    if not lines:
        raise LinkLost(f"llama_main printed no PyTorchObserver line but {output[-80:]!r}; try again")
    try:
        stats = parse_object(lines[-1].removeprefix("PyTorchObserver "), source="its statistics")

        def number(name: str) -> int:
            return checked(int, stats.get(name), source=name)

        wanted = workload.context if workload.phase == "decode" else workload.prompt_tokens
        if abs(number("prompt_tokens") - wanted) > max(2, wanted // 50):
            raise Unsupported(f"llama_main made {number('prompt_tokens')} tokens of a prompt of {wanted}")
        if workload.phase == "prefill":
            return (number("prompt_eval_end_ms") - number("inference_start_ms")) * 1_000_000
        milliseconds = number("inference_end_ms") - number("prompt_eval_end_ms")
        return round(milliseconds * 1e6 / number("generated_tokens"))
    except (InvalidInput, ZeroDivisionError) as error:
        raise LinkLost(f"llama_main printed {lines[-1][:80]!r} ({error}); try again") from error


RUNNERS: Mapping[str, Runner] = {one.name: one for one in (ExecutorRunner(), LlamaMain(), LlamaBench())}


def pinned(mask: str | None) -> Sequence[str]:
    """Return the words that start a program on the cores of a mask (hexadecimal without 0x, for Android's taskset)."""
    return () if mask is None else ("taskset", mask)

"""Runtimes side by side: one decoded token and one prompt, dense and pruned, beside the speed of reading memory.

    tools/bench_backends                   SmolLM2-135M, and its shape with FFNs cut until 70 % of the weights are left
    tools/bench_backends --plan runs/NAME  dense, and the widths that a run of dilap-prune found
    tools/bench_backends --backends onnxruntime --starts 1 --json

Every runtime, precision and phase first gets its fastest configuration, found on the dense model. Then everything of
one phase is loaded at once, one process a runtime, and sampled in interleaved rounds; every start loads it afresh. The
models have random weights, because speed does not depend on what a weight is. Decoding reads every weight and the KV
cache once a token, so the share of the memory's speed says how much there is left to gain; it is given for floats,
where a file's bytes are all weights.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dilap import backends, export
from dilap.backends import host
from dilap.cli.console import Console, run
from dilap.core.artifact import Artifact
from dilap.core.codec import decode, file_sha256, read_json
from dilap.core.errors import InvalidInput
from dilap.core.measurement import Interval
from dilap.core.plan import Plan
from dilap.core.shape import PRECISION_BITS, Architecture
from dilap.core.workload import Phase, Workload
from dilap.models.anatomy import architecture_of
from dilap.models.builtin import DEFAULT_MODEL
from dilap.models.load import load
from dilap.profilers import intervals
from dilap.profilers.configuration import MeasuredWorld, find_fastest
from dilap.profilers.devices.device import get
from dilap.profilers.instruments.agent import InstrumentBench
from dilap.profilers.profiler import Case, Profiler
from dilap.profilers.protocol import TABLE, Bench, Trace, collect, judge

PRECISIONS: Mapping[str, tuple[str, ...]] = {  # 4-bit weights as each runtime has them, and floats
    "llamacpp": ("q4_0", "f16"),
    "onnxruntime": ("int4", "f32"),
    "executorch": ("8da4w", "f32"),
}
_PHASES: tuple[Phase, ...] = ("decode", "prefill")
_SHARE = 0.7  # of the parameters, left in the pruned shape
_READ_BYTES = 512 << 20  # about as many as the f32 model has, and far more than any cache holds
# The threads of a runtime that was just used spin for a while, and would slow those of the next one.
_PAUSE_SECONDS = 0.1
_PROTOCOL = TABLE


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model file that was written for the benchmark; `name` is `dense`, or that of the pruned shape."""

    backend: str
    precision: str
    name: str
    path: Path
    artifact: Artifact


@dataclass(frozen=True, kw_only=True)
class Result:
    """The samples of one model in one phase, or of reading memory, where `backend` and `model` are empty.

    `rounds` has the round of each sample, `first_rounds` the first round of each start.
    """

    phase: Phase
    backend: str
    precision: str
    model: str
    configuration: str
    num_bytes: int
    read_bytes: int | None
    samples_ns: tuple[int, ...]
    rounds: tuple[int, ...]
    first_rounds: tuple[int, ...]
    notes: tuple[str, ...]

    @property
    def interval(self) -> Interval:
        return intervals.latency(self)


class MemoryBench:
    """A `Bench` that times reading memory, with as many threads as the models have."""

    def __init__(self, threads: int) -> None:
        torch.set_num_threads(threads)
        self._numbers = torch.ones(_READ_BYTES // 4)  # a sum in f32 reads as fast as anything that was tried

    def sample(self, case: int, count: int) -> Sequence[int]:  # noqa: ARG002 - there is one case
        samples = []
        for _ in range(count):
            start = time.perf_counter_ns()
            self._numbers.sum()
            samples.append(time.perf_counter_ns() - start)
        return samples

    def other_load(self) -> float:
        """Return 0: the clock of CPU time is too coarse here, and the runtimes in the same rounds notice other load."""
        return 0.0

    def throttles(self) -> bool:
        return False

    def now(self) -> float:
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


class Benches:
    """Several benches as one; `cases` has the number of a bench, and of a case in that bench, for every case."""

    def __init__(self, benches: Sequence[Bench], cases: Sequence[tuple[int, int]]) -> None:
        self._benches, self._cases = benches, cases
        self._last: int | None = None

    def sample(self, case: int, count: int) -> Sequence[int]:
        bench, inner = self._cases[case]
        if bench != self._last:
            time.sleep(_PAUSE_SECONDS)
            self._last = bench
        return self._benches[bench].sample(inner, count)

    def other_load(self) -> float:
        return max(bench.other_load() for bench in self._benches)

    def throttles(self) -> bool:
        told = [bench.throttles() for bench in self._benches]  # ask all: each tells of the time since it was asked last
        return any(told)

    def now(self) -> float:
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--plan", type=Path, help="plan.json, or the folder of a run that has one")
    parser.add_argument("--backends", nargs="+", choices=list(PRECISIONS), default=list(PRECISIONS))
    parser.add_argument("--threads", type=int, default=get("host_cpu").default_threads())
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--starts", type=int, default=5, help="fresh processes, whose spread gives the intervals (5)")
    parser.add_argument("--json", action="store_true", help="with the raw samples")
    return parser.parse_args()


def _shapes(architecture: Architecture, plan: Path | None) -> dict[str, Architecture]:
    """Return the dense shape and a pruned one, by name."""
    if plan is None:
        return {"dense": architecture, "equal widths": _equal_widths(architecture)}
    path = plan / "plan.json" if plan.is_dir() else plan
    return {"dense": architecture, "plan": decode(Plan, read_json(path), source=str(path)).pruned_architecture()}


def _equal_widths(architecture: Architecture) -> Architecture:
    """Return the widest shape with narrower FFNs, equal in all layers, that has at most 70 % of the parameters.

    Multiples of 32 channels are taken away. Raises InvalidInput where even the narrowest has more parameters.
    """
    for width in range(architecture.layers[0].num_channels - 32, 0, -32):
        found = replace(architecture, layers=tuple(replace(one, num_channels=width) for one in architecture.layers))
        if found.num_parameters <= _SHARE * architecture.num_parameters:
            return found
    raise InvalidInput(f"no narrower FFNs leave {_SHARE:.0%} of the parameters of this model; take a larger one")


def _write(names: Sequence[str], shapes: Mapping[str, Architecture], folder: Path, console: Console) -> list[Model]:
    models = []
    for backend in names:
        for precision in PRECISIONS[backend]:
            for number, (name, shape) in enumerate(shapes.items()):
                start, out = time.monotonic(), folder / f"{backend}-{precision}-{number}"
                artifact = export.get(backend).export_probe(shape, precision=precision, seed=0, out=out)
                console.say(f"wrote {backend} {precision} {name} in {time.monotonic() - start:.1f} s")
                models.append(
                    Model(backend=backend, precision=precision, name=name, path=out / artifact.path, artifact=artifact)
                )
    return models


def _fastest(models: Sequence[Model], workload: Workload, console: Console) -> dict[tuple[str, str], Workload]:
    """Return the fastest configuration of every runtime and precision, found on the dense model.

    A KV cache in fewer bits is never taken, because its effect on a model with random weights says nothing.
    """
    found = {}
    for model in (one for one in models if one.name == "dense"):
        profiler = Profiler(get("host_cpu"), backend=model.backend)

        def measure(workloads: Sequence[Workload], model: Model = model, profiler: Profiler = profiler) -> Any:
            return profiler.measure([Case(path=model.path, workload=one) for one in workloads], TABLE)

        world = MeasuredWorld(
            backend=backends.get(model.backend),
            vocab_size=model.artifact.decoder.vocab_size,
            measure=measure,
            diverge=lambda *_: None,
        )
        plain = replace(workload, precision=model.precision)
        configuration = find_fastest(
            plain, backend=world.backend, threads=(workload.threads,), world=world, tell=console.say
        )
        found[model.backend, model.precision] = configuration.workload
    return found


def _measure(models: Sequence[Model], workload: Workload, *, starts: int, console: Console) -> Iterator[Result]:
    """Yield the result of every model under `workload`, with the samples of all starts, and of reading memory last."""
    fastest = _fastest(models, workload, console)
    workloads = [fastest[model.backend, model.precision] for model in models]
    traces: list[list[Trace]] = []
    first_rounds: list[int] = []
    for start in range(starts):
        console.say(f"{workload.phase}: start {start + 1} of {starts}, {len(models)} models")
        first_round = 1 + max((max(trace.rounds) for one in traces for trace in one), default=-1)
        first_rounds.append(first_round)
        traces.append(_measure_once(models, workloads, first_round=first_round, console=console))
    for index in range(len(models) + 1):
        parts = [one[index] for one in traces]
        model = models[index] if index < len(models) else None
        yield Result(
            phase=workload.phase,
            backend=model.backend if model else "",
            precision=model.precision if model else "",
            model=model.name if model else "",
            configuration=workloads[index].configuration if model else "",
            num_bytes=model.artifact.num_bytes if model else _READ_BYTES,
            read_bytes=_read_bytes(model, workload) if model else _READ_BYTES,
            samples_ns=tuple(sample for part in parts for sample in part.samples_ns),
            rounds=tuple(number for part in parts for number in part.rounds),
            first_rounds=tuple(first_rounds),
            notes=tuple(dict.fromkeys(note for part in parts if (note := judge([part], _PROTOCOL)[1]))),
        )


def _measure_once(
    models: Sequence[Model], workloads: Sequence[Workload], *, first_round: int, console: Console
) -> list[Trace]:
    device = get("host_cpu")
    with ExitStack() as stack:
        benches: list[Bench] = []
        cases = []
        for backend in dict.fromkeys(model.backend for model in models):
            agent = stack.enter_context(closing(device.open(backend)))
            handles: list[int] = []
            for model, workload in zip(models, workloads, strict=True):
                if model.backend != backend:
                    continue
                loaded = agent.load(
                    model.path,
                    sha256=file_sha256(model.path),
                    companions=model.artifact.companions,
                    workload=workload,
                )
                cases.append((len(benches), len(handles)))
                handles.append(loaded.handle)
            benches.append(InstrumentBench(agent, handles, lead_in_seconds=_PROTOCOL.lead_in_seconds))
        benches.append(MemoryBench(workloads[0].threads))
        cases.append((len(benches) - 1, 0))
        with console.bar(workloads[0].phase, total=len(cases), unit="case") as bar:

            def on_round(number: int, num_settled: int) -> None:
                bar.n = num_settled
                bar.set_postfix_str(f"round {number}")

            return collect(Benches(benches, cases), len(cases), _PROTOCOL, first_round=first_round, on_round=on_round)


def _read_bytes(model: Model, workload: Workload) -> int | None:
    """Return the bytes that a decoded token reads: the KV cache and the weights, of the embedding only one row.

    None where the weights are in quantised blocks.
    """
    if model.precision not in ("f32", "f16"):
        return None
    shape = model.artifact.decoder
    unread = 0 if shape.tied_embeddings else shape.vocab_size * shape.hidden_size
    weights = round((shape.num_parameters - unread) * PRECISION_BITS[model.precision] / 8)
    cached = 2 * sum(widths.num_kv_heads for widths in shape.layers) * shape.head_dim * workload.context
    return weights + round(cached * backends.get(model.backend).cache_bits(workload) / 8)


def _table(results: Sequence[Result], workloads: Mapping[Phase, Workload]) -> str:
    decode_work, prefill_work = workloads["decode"], workloads["prefill"]
    lines = [
        f"| runtime | precision | model | file MB | decode at context {decode_work.context}, ms | tok/s | / dense "
        f"| GB/s | of memory | prefill of {prefill_work.prompt_tokens}, ms | tok/s | / dense |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    by_key = {(one.phase, one.backend, one.precision, one.model): one for one in results}
    memory = by_key["decode", "", "", ""]
    speed = _READ_BYTES / memory.interval.value
    for one in (one for one in results if one.phase == "decode" and one.backend):
        prefill = by_key["prefill", one.backend, one.precision, one.model]
        dense = [by_key[phase, one.backend, one.precision, "dense"] for phase in _PHASES]
        cells = [
            *(one.backend, one.precision, one.model, f"{one.num_bytes / 1e6:.1f}"),
            *(_milliseconds(one.interval), f"{1 / one.interval.value:.1f}", _share(dense[0], one)),
            *_reading(memory, one),
            *(_milliseconds(prefill.interval), f"{prefill_work.prompt_tokens / prefill.interval.value:.0f}"),
            _share(dense[1], prefill),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    low, high = (_READ_BYTES / bound / 1e9 for bound in (memory.interval.high, memory.interval.low))
    lines += ["", f"memory read beside the decoding: {speed / 1e9:.1f} GB/s [{low:.1f}, {high:.1f}]"]
    dense_ones = [one for one in results if one.model == "dense"]
    lines += [f"{one.phase} {one.backend} {one.precision}: {one.configuration}" for one in dense_ones]
    lines += [f"{one.phase} {one.backend} {one.precision} {one.model}: {note}" for one in results for note in one.notes]
    return "\n".join(lines)


def _reading(memory: Result, one: Result) -> tuple[str, str]:
    """Format GB/s and the share of the memory's speed, paired by rounds; empty where the bytes are not known."""
    if one.read_bytes is None:
        return "", ""
    ratio = intervals.ratio(one, memory)
    share, low, high = (one.read_bytes / _READ_BYTES / latency for latency in (ratio.value, ratio.high, ratio.low))
    return f"{one.read_bytes / one.interval.value / 1e9:.1f}", f"{share:.0%} [{low:.0%}, {high:.0%}]"


def _milliseconds(interval: Interval) -> str:
    return f"{interval.value * 1e3:.2f} [{interval.low * 1e3:.2f}, {interval.high * 1e3:.2f}]"


def _share(dense: Result, other: Result) -> str:
    if other is dense:
        return ""
    ratio = intervals.ratio(other, dense)
    return f"{ratio.value:.1%} [{ratio.low:.1%}, {ratio.high:.1%}]"


def _main() -> int:
    given = _arguments()
    console = Console()
    common = {"threads": given.threads, "context": given.context, "prompt_tokens": given.prompt_tokens}
    workloads = {phase: Workload(phase=phase, **common) for phase in _PHASES}
    architecture = architecture_of(load(given.model).model)
    with tempfile.TemporaryDirectory() as folder:
        models = _write(given.backends, _shapes(architecture, given.plan), Path(folder), console)
        results = [
            result
            for phase in _PHASES
            for result in _measure(models, workloads[phase], starts=given.starts, console=console)
        ]
    versions = {name: backends.get(name).version() for name in given.backends}
    if given.json:
        document = {"model": given.model, "processor": host.processor(), "threads": given.threads, "versions": versions}
        json.dump(document | {"results": [asdict(one) for one in results]}, sys.stdout)
    else:
        print(f"{given.model}, {given.threads} threads, {host.processor()}; ", end="")
        print(", ".join(f"{name} {version}" for name, version in versions.items()) + "\n")
        print(_table(results, workloads))
    return 0


if __name__ == "__main__":
    run(_main)

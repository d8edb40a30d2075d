"""A prune job on a made-up device: real exports, fabricated seconds."""

import copy
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from dilap import backends
from dilap.backends import Backend
from dilap.backends.readers import open_network
from dilap.core.artifact import Artifact
from dilap.core.codec import decode, encode, read_json, write_json, written_aside
from dilap.core.graph import Network
from dilap.core.measurement import Measurement
from dilap.core.precisions import Mix
from dilap.core.rules import spread
from dilap.core.shape import UNMIXED, Architecture, LayerWidths, by_quality
from dilap.core.workload import Workload
from dilap.export.network import described
from dilap.job import api
from dilap.job.bench import Bench
from dilap.job.comparison import Row
from dilap.job.network_bench import NetworkBench
from dilap.job.result import PruneResult
from dilap.models.convolutional.load import NetworkSource
from dilap.models.network import Examples, TorchNetwork
from dilap.profilers.profiler import Case
from dilap.profilers.protocol import TABLE
from dilap.profilers.tables.entries import TableEntry, run_precisions, runs_of
from dilap.profilers.tables.networks.estimate import network_roofline
from dilap.profilers.tables.networks.model import NetworkLatency, NetworkObservation
from dilap.profilers.tables.probes import default_levels, list_probes
from dilap.profilers.tables.table import LatencyTable, TableHeader
from standins.fabricated import FINGERPRINT

LLAMACPP = backends.get("llamacpp")
SPEED = {
    "f32": 1.0,
    "f16": 1.0,
    "q8_0": 0.6,
    "q5_0": 0.65,
    "iq4_nl": 0.4,
    "q4_0": 0.35,
    "int8": 0.6,
    "int4": 0.4,
    "8da4w": 1.0,
}
FAST = ["--precision", "f16", "--evaluations", "3", "--step", "0.2", "--calib-length", "32", "--context", "64"]
QUICK: dict[str, Any] = {"precision": "f16", "evaluations": 3, "step": 0.2, "calib_length": 32, "context": 64}


def seconds_of(widths: Sequence[LayerWidths], mix: Mix) -> float:
    """A made-up device: 0.1 ms, 0.1 ms for the head and a few microseconds a head and channel, by precision."""
    total = 0.1e-3 + 0.1e-3 * SPEED[mix.of("head")]
    for index, one in enumerate(widths):
        attention = 20e-6 * one.num_heads + 30e-6 * one.num_kv_heads
        total += SPEED[mix.of(f"layers.{index}.attention")] * attention
        total += SPEED[mix.of(f"layers.{index}.ffn")] * 1e-6 * one.num_channels
    return total


def slowness_of(workload: Workload) -> float:
    """Of a made-up runtime: flash attention costs a quarter, any other switch that is set or one thread a half."""
    switches = workload.switches
    flash = "flash_attention" in switches
    return (1.0 if flash else 1.25) * 1.5 ** (len(switches) - flash + (workload.threads == 1))


@dataclass(frozen=True, kw_only=True)
class FinishedJob:
    """A prune job on the made-up device, its model and its text."""

    checkpoint: Path
    corpus: Path
    run: Path


def fabricated_measurement(artifact: Artifact, workload: Workload, *, seconds: float) -> Measurement:
    center = round(1e9 * seconds)
    return Measurement(
        artifact_sha256=artifact.sha256,
        workload=workload,
        fingerprint=FINGERPRINT,
        samples_ns=tuple(center + 10 * step for step in range(-7, 8)),
        rounds=tuple(range(15)),
        peak_memory_bytes=artifact.num_bytes,
        load_seconds=0.1,
        started="2026-01-01T00:00:00+00:00",
        status="ok",
    )


class FakeBench(Bench):
    """Real exports, fabricated seconds."""

    def measure_cases(self, cases: Sequence[Case], *, final: bool = False) -> list[Measurement]:
        found = []
        for case in cases:
            sidecar = case.path.with_name("artifact.json")
            artifact = decode(Artifact, read_json(sidecar), source=str(sidecar))
            mix = Mix(precision=artifact.precision, precisions=artifact.precisions)
            seconds = slowness_of(case.workload) * seconds_of(artifact.decoder.layers, mix)
            found.append(fabricated_measurement(artifact, case.workload, seconds=seconds))
        return found

    def divergence(self, path: Path, base: Workload, other: Workload, tokens: Sequence[int]) -> float | None:
        return 0.0

    def configuration_path(self, model: str, architecture: Architecture, *, threads: Sequence[int]) -> Path:
        return Path(model).with_suffix(f".{self.workload.precision}.configuration.json")

    def table_path(self, model: str, architecture: Architecture) -> Path:
        return Path(model).with_suffix(f".{'-'.join([self.workload.precision, *self.others])}.jsonl")

    def build_table(self, architecture: Architecture, path: Path) -> LatencyTable:
        table = fabricated_table(architecture.envelope, self.workload, self.backend, precisions=self.others)
        table.write(path)
        return table


def fabricated_table(
    architecture: Architecture, workload: Workload, backend: Backend = LLAMACPP, *, precisions: Sequence[str] = ()
) -> LatencyTable:
    capabilities = backend.capabilities(architecture, precision=workload.precision)
    attention, ffn = default_levels(architecture, capabilities)
    header = TableHeader(
        fingerprint=FINGERPRINT,
        workload=workload,
        architecture=architecture,
        backend=backend.name,
        protocol=TABLE,
        created="2026-01-01T00:00:00+00:00",
        precisions=by_quality((workload.precision, *precisions)) if precisions else (),
    )
    probes = list_probes(
        architecture,
        measured=(spread(attention, 6), spread(ffn, 6)),
        levels=(attention, ffn),
        others=dict.fromkeys(precisions, (attention, ffn)),
        heads=(workload.precision, *precisions) if precisions else (),
        uniform=not capabilities.per_layer_widths,
        num_random=6,
        num_holdout=3,
        seed=0,
    )

    def nanoseconds(widths: Sequence[LayerWidths], precisions: Mapping[str, str] = UNMIXED) -> int:
        mix = Mix(precision=workload.precision, precisions=precisions)
        return round(slowness_of(workload) * seconds_of(widths, mix) * 1e9)

    return LatencyTable(header).with_entries(
        TableEntry(
            role=probe.role,
            runs=runs_of(probe.widths, probe.precisions),
            precisions=run_precisions(probe.widths, probe.precisions),
            head=probe.precisions.get("head", ""),
            samples_ns=(nanoseconds(probe.widths, probe.precisions),) * 15,
            sentinel_ns=(nanoseconds(architecture.layers),) * 15,
            status="ok",
        )
        for probe in probes
    )


def quick(corpus: Path, out: Path, **options: Any) -> dict[str, Any]:
    """The options of a quick and silent job that reads `corpus`, and writes only into `out` and a folder beside it."""
    texts = {"calib": str(corpus), "eval_text": str(corpus)}
    return {"out": out, "cache": out.with_name("cache"), "progress": lambda _: None} | QUICK | texts | options


def prune_tiny(
    checkpoint: Path,
    corpus: Path,
    out: Path,
    *,
    budget: str | None = "70%",
    method: str = "magnitude",
    **options: Any,
) -> PruneResult:
    """A quick job through the Python interface; a ratio needs `budget=None`."""
    result = api.prune(str(checkpoint), **quick(corpus, out, budget=budget, method=method, **options))
    assert result is not None
    return result


def compare_tiny(checkpoint: Path, corpus: Path, out: Path, *methods: str, **options: Any) -> list[Row]:
    """A quick comparison of `methods` through the Python interface."""
    return api.compare(str(checkpoint), methods=methods, **quick(corpus, out, **options))


def call(main: Callable[[], None], *arguments: object) -> int:
    """Run a command's main; its exit code."""
    sys.argv = ["dilap", *map(str, arguments)]
    with pytest.raises(SystemExit) as stopped:
        main()
    return int(stopped.value.code or 0)


def last_line(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err.strip().splitlines()[-1]


class FakeNetworkBench(NetworkBench):
    """Real exports of image networks, and a made-up device that takes a nanosecond a byte of the file."""

    def measure_cases(self, cases: Sequence[Case], *, final: bool = False) -> list[Measurement]:
        if self.estimate:
            return super().measure_cases(cases, final=final)
        found = []
        for case in cases:
            artifact = self.read_artifact(case.path.parent)
            slowness = 1.5 if case.workload.threads == 1 else 1.0
            found.append(fabricated_measurement(artifact, case.workload, seconds=slowness * 1e-9 * artifact.num_bytes))
        return found

    def configuration_path(self, model: str, network: Network, *, threads: Sequence[int]) -> Path:
        return (self.tables or Path("tables")) / "configuration.json"

    def table_path(self, model: str, network: Network) -> Path:
        return (self.tables or Path("tables")) / "table.jsonl"

    def build_table(self, source: NetworkSource, path: Path, *, examples: Examples) -> Any:
        device = replace(self.device, bytes_per_second=1e9, flops_per_second=1e30)
        return FakeTable(network_roofline(source.traced.network, self.workload, device))


@dataclass(frozen=True)
class FakeTable:
    """The table of the made-up device, which says exactly what one held-out plan takes."""

    costs: NetworkLatency

    def model(self, _: str) -> NetworkLatency:
        dense = self.costs.network.widths_at({})
        seconds = self.costs.predict(dense)
        seen = NetworkObservation(role="holdout", counts=dense, seconds=seconds, half_width=0.0)
        return replace(self.costs, holdout=(seen,))

    def write(self, path: Path) -> None:
        path.write_text("a made-up table", encoding="utf-8")


class QuickNetworkBench(FakeNetworkBench):
    """Keeps networks as files of torch, which takes no time, instead of exporting them.

    In `int8` their numbers have 16 bits, and those of the last layer are wrong where 8 bits are to be `bad`.
    """

    bad: ClassVar[bool] = False

    def export(
        self,
        source: NetworkSource,
        folder: Path,
        *,
        examples: Examples,
        plan_digest: str = "",
        tokenizer: Path | None = None,
        precision: str | None = None,
    ) -> Artifact:
        chosen = precision or self.workload.precision
        model = source.model if chosen != "int8" else copy.deepcopy(source.model).half()
        if chosen == "int8" and self.bad:
            list(model.parameters())[-2].data *= -10
        with written_aside(folder) as part:
            part.mkdir()
            torch.save(model, part / "model.onnx")
            artifact = described(
                part / "model.onnx",
                source.model,
                source.input,
                backend=self.backend.name,
                precision=chosen,
                plan_digest=plan_digest,
                sqnr_db=None,
                details={},
            )
            write_json(part / "artifact.json", encode(artifact))
        return artifact


class QuickNetwork(TorchNetwork):
    """What `QuickNetworkBench` kept, opened as an artifact is."""

    def __init__(self, _: str, path: Path, *, threads: int) -> None:
        super().__init__(torch.load(path, weights_only=False).float())

    def close(self) -> None:
        """Nothing is open."""


def use_fake_network_bench(monkeypatch: pytest.MonkeyPatch, *, exports: bool) -> None:
    """Let jobs of image networks be measured on a made-up device; without `exports`, runtimes are made up as well."""
    monkeypatch.setattr("dilap.job.network_prune.NetworkBench", FakeNetworkBench if exports else QuickNetworkBench)
    monkeypatch.setattr("dilap.job.network_exam.open_network", open_network if exports else QuickNetwork)

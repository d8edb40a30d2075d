"""Build a latency table: probe models with random weights, through the real exporter and runtime."""

import random
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TypeVar

from dilap import backends, export
from dilap.backends import Capabilities
from dilap.codec import read_json
from dilap.errors import Mismatch, Unsupported
from dilap.profilers.fit import attention_work
from dilap.profilers.profiler import Case, Profiler, round_medians
from dilap.profilers.protocol import TABLE, Protocol
from dilap.profilers.table import LatencyTable, Role, TableEntry, TableHeader, runs_of
from dilap.types import PRECISION_BITS, Architecture, LayerWidths, Measurement, Workload

T = TypeVar("T")
AttentionLevel = tuple[int, int]  # heads, KV heads; (0, 0) is none
Progress = Callable[[int, int, str], None]  # probes done, probes in all, what is going on
_BLOCK = 4  # probes measured together, beside the dense one: about 1.3 GB of mapped files for 135M parameters in f16
_MAX_ATTENTION_LEVELS = 12


@dataclass(frozen=True, kw_only=True)
class Probe:
    role: Role
    widths: tuple[LayerWidths, ...]


def default_levels(architecture: Architecture, capabilities: Capabilities) -> tuple[list[AttentionLevel], list[int]]:
    """Attention levels and FFN widths to choose from, the dense ones included, ascending."""
    dense = _uniform_layer(architecture)
    ratio = dense.num_heads // max(1, dense.num_kv_heads)
    kv_heads, slots = list(range(1, dense.num_kv_heads + 1)), list(range(1, ratio + 1))
    if not capabilities.head_pruning:
        kv_heads, slots = kv_heads[-1:], slots[-1:]
    while len(kv_heads) * len(slots) > _MAX_ATTENTION_LEVELS:
        longer = kv_heads if len(kv_heads) >= len(slots) else slots
        longer[:] = spread(longer, len(longer) - 1)
    attention = sorted((kv * slot, kv) for kv in kv_heads for slot in slots)
    step = max(1, round(dense.num_channels / 12 / capabilities.ffn_multiple)) * capabilities.ffn_multiple
    ffn = sorted({*range(step, dense.num_channels, step), dense.num_channels})
    return (
        [(0, 0)] * capabilities.attention_removal + attention,
        [0] * capabilities.ffn_removal + ffn,
    )


def build_table(
    architecture: Architecture,
    *,
    profiler: Profiler,
    workload: Workload,
    path: Path,
    attention_levels: Sequence[AttentionLevel],
    ffn_levels: Sequence[int],
    num_measured: int = 6,
    num_random: int = 8,
    num_holdout: int = 6,
    seed: int = 0,
    protocol: Protocol = TABLE,
    progress: Progress | None = None,
) -> LatencyTable:
    """Measure a table into `path`, or what is missing of it: the same arguments give the same probes.

    `num_measured` levels of each kind, the extremes included, get a probe of their own; the random plans draw from
    all levels, so that the hold-out error covers the interpolation. Raises Mismatch where `path` was measured for
    something else.
    """
    backend = profiler.backend
    header = TableHeader(
        fingerprint=profiler.fingerprint(),
        workload=workload,
        architecture=architecture,
        backend=backend,
        protocol=protocol,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )
    table = _resumed(path, header) if path.exists() else LatencyTable(header)
    shallow = probe_architecture(architecture, workload, cache_bytes=header.fingerprint.last_level_cache_bytes)
    work = attention_work(architecture, workload)
    levels = sorted(attention_levels, key=lambda level: work(_layer(level, 0))), sorted(ffn_levels)
    capabilities = backends.get(backend).capabilities(architecture.family, precision=workload.precision)
    probes = list_probes(
        shallow,
        measured=(spread(levels[0], num_measured), spread(levels[1], num_measured)),
        levels=levels,
        uniform=not capabilities.per_layer_widths,
        num_random=num_random,
        num_holdout=num_holdout,
        seed=seed,
    )
    with _probe_folder(path) as folder:
        bench = _ProbeBench(profiler, backend, shallow, workload, protocol, folder)
        return _fill(table, probes, bench, path, progress)


def _resumed(path: Path, header: TableHeader) -> LatencyTable:
    table = LatencyTable.read(path)
    table.require_usable(
        fingerprint=header.fingerprint,
        workload=header.workload,
        architecture=header.architecture,
        backend=header.backend,
    )
    return table


def probe_architecture(architecture: Architecture, workload: Workload, *, cache_bytes: int) -> Architecture:
    """The model with just as many layers as keep its weights out of the cache.

    Eight times the cache for the dense probe leaves four times for one of half its width: a probe that fits in the
    cache would read faster than the real model does.
    """
    layer = _uniform_layer(architecture)
    parameters = architecture.attention_parameters(layer) + architecture.ffn_parameters(layer)
    layer_bytes = parameters * PRECISION_BITS[workload.precision] / 8
    needed = max(2, -(-8 * cache_bytes // max(1, int(layer_bytes))))
    return replace(architecture, layers=architecture.layers[: min(len(architecture.layers), needed)])


def list_probes(
    architecture: Architecture,
    *,
    measured: tuple[Sequence[AttentionLevel], Sequence[int]],
    levels: tuple[Sequence[AttentionLevel], Sequence[int]],
    uniform: bool,
    num_random: int,
    num_holdout: int,
    seed: int,
) -> list[Probe]:
    """The probes of a table, the dense one first; `uniform` plans have equal widths and lose whole layers only."""
    layers = architecture.layers
    dense = layers[0]
    probes = [Probe(role="dense", widths=layers), Probe(role="depth", widths=layers[: len(layers) // 2])]
    for level in measured[0]:
        if level != (dense.num_heads, dense.num_kv_heads):
            # a model without any attention is none: there the first layer keeps it
            first = dense if level == (0, 0) else _layer(level, dense.num_channels)
            rest = (_layer(level, dense.num_channels),) * (len(layers) - 1)
            probes.append(Probe(role="attention", widths=(first, *rest)))
    probes.extend(
        Probe(role="ffn", widths=(replace(dense, num_channels=channels),) * len(layers))
        for channels in measured[1]
        if channels != dense.num_channels
    )
    draw = random.Random(seed)
    drawn: dict[tuple[LayerWidths, ...], None] = {}
    for _ in range(20 * (num_random + num_holdout)):  # small models may not have that many different plans
        plan = _uniform_plan(layers, levels, draw) if uniform else _random_plan(layers, levels, draw)
        if plan != layers:
            drawn.setdefault(plan)
        if len(drawn) == num_random + num_holdout:
            break
    probes.extend(
        Probe(role="random" if index < num_random else "holdout", widths=plan) for index, plan in enumerate(drawn)
    )
    return probes


def spread(values: Sequence[T], count: int) -> list[T]:
    """At most `count` of the values, evenly spread, the first and the last included."""
    if len(values) <= count:
        return list(values)
    return [values[round(index * (len(values) - 1) / (count - 1))] for index in range(count)]


def _random_plan(
    layers: Sequence[LayerWidths],
    levels: tuple[Sequence[AttentionLevel], Sequence[int]],
    draw: random.Random,
) -> tuple[LayerWidths, ...]:
    """Every sublayer dense or at a random level; plans differ in how much they keep. The first layer has attention."""
    keep, dense = draw.random(), layers[0]
    plan = []
    for index in range(len(layers)):
        attention = (dense.num_heads, dense.num_kv_heads) if draw.random() < keep else draw.choice(levels[0])
        channels = dense.num_channels if draw.random() < keep else draw.choice(levels[1])
        layer = dense if index == 0 else _layer(attention, channels)
        if not layer.is_empty:
            plan.append(layer)
    return tuple(plan)


def _uniform_plan(
    layers: Sequence[LayerWidths],
    levels: tuple[Sequence[AttentionLevel], Sequence[int]],
    draw: random.Random,
) -> tuple[LayerWidths, ...]:
    attention = draw.choice([level for level in levels[0] if level != (0, 0)])
    channels = draw.choice([width for width in levels[1] if width])
    return (_layer(attention, channels),) * draw.randint((len(layers) + 1) // 2, len(layers))


@dataclass(frozen=True)
class _ProbeBench:
    """Writes a block of probes, measures it beside the dense one, and removes it."""

    profiler: Profiler
    backend: str
    architecture: Architecture
    workload: Workload
    protocol: Protocol
    folder: Path

    def measure(self, block: Sequence[Probe], progress: Callable[[str], None]) -> list[Measurement]:
        """One Measurement for the dense probe, then one a probe."""
        dense = self._write(self.architecture.layers, "dense", progress)
        try:
            paths = [self._write(probe.widths, str(index), progress) for index, probe in enumerate(block)]
            cases = [Case(path=path, workload=self.workload) for path in (dense, *paths)]
            return self.profiler.measure(cases, self.protocol, progress=progress)
        finally:
            for index in range(len(block)):
                shutil.rmtree(self.folder / str(index), ignore_errors=True)

    def _write(self, widths: tuple[LayerWidths, ...], name: str, progress: Callable[[str], None]) -> Path:
        out = self.folder / name
        if not out.exists():  # only the dense one stays
            progress(f"writing probe {name}")
            export.get(self.backend).export_probe(
                replace(self.architecture, layers=widths), precision=self.workload.precision, seed=0, out=out
            )
        return out / str(read_json(out / "artifact.json")["path"])


def _fill(
    table: LatencyTable, probes: Sequence[Probe], bench: _ProbeBench, path: Path, progress: Progress | None
) -> LatencyTable:
    """Measure the missing probes block by block, writing the table after each."""
    missing = [probe for probe in probes if (probe.role, probe.widths) not in table]
    while missing:
        done = len(probes) - len(missing)
        wants_dense = missing[0].role == "dense"
        block = missing[1 : 1 + _BLOCK] if wants_dense else missing[:_BLOCK]

        def tell(text: str, done: int = done) -> None:
            if progress is not None:
                progress(done, len(probes), text)

        dense, *measurements = bench.measure(block, tell)
        if differences := table.header.fingerprint.differences(dense.fingerprint):
            raise Mismatch(f"the device changed while its table was measured: {'; '.join(differences)}")
        measured = list(zip(block, measurements, strict=True))
        if wants_dense:
            measured.insert(0, (missing[0], dense))
        sentinels = round_medians(dense)
        table = table.with_entries(_entry(probe, one, sentinels) for probe, one in measured)
        table.write(path)
        missing = missing[len(measured) :]
    if progress is not None:
        progress(len(probes), len(probes), "table complete")
    return table


def _entry(probe: Probe, measurement: Measurement, sentinels: Mapping[int, float]) -> TableEntry:
    return TableEntry(
        role=probe.role,
        runs=runs_of(probe.widths),
        samples_ns=measurement.samples_ns,
        sentinel_ns=tuple(round(sentinels[number]) for number in measurement.rounds),
        status=measurement.status,
        note=measurement.note,
    )


@contextmanager
def _probe_folder(path: Path) -> Iterator[Path]:
    """A folder beside the table, on its disk; what a killed run left there is removed."""
    folder = path.with_name(f".{path.name}.probes")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _layer(attention: AttentionLevel, channels: int) -> LayerWidths:
    return LayerWidths(num_heads=attention[0], num_kv_heads=attention[1], num_channels=channels)


def _uniform_layer(architecture: Architecture) -> LayerWidths:
    """The one shape of a dense model's layers. Raises Unsupported."""
    if len(set(architecture.layers)) != 1 or len(architecture.layers) < 2:
        raise Unsupported("a latency table is measured on a dense model of at least two layers of equal widths")
    return architecture.layers[0]

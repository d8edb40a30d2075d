"""Build a latency table from probes: models with random weights that pass through the real exporter and runtime."""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

from filelock import FileLock, Timeout

from dilap import backends
from dilap.core.errors import Mismatch, Unsupported
from dilap.core.rules import Capabilities, spread
from dilap.core.shape import PRECISION_BITS, Architecture, LayerWidths
from dilap.core.workload import Workload
from dilap.profilers.profiler import Profiler
from dilap.profilers.protocol import TABLE, Protocol
from dilap.profilers.tables.fit import attention_work
from dilap.profilers.tables.measuring import Probe, Progress, Share, fill
from dilap.profilers.tables.table import LatencyTable, TableHeader, partner_path

AttentionLevel = tuple[int, int]  # heads, KV heads; (0, 0) is none


def default_levels(architecture: Architecture, capabilities: Capabilities) -> tuple[list[AttentionLevel], list[int]]:
    """Return the attention levels and FFN widths to choose from, ascending, the dense ones included."""
    dense = replace(architecture, layers=(_uniform_layer(architecture),))
    found: dict[str, list[LayerWidths]] = {"attention": [], "ffn": []}
    for block in dense.blocks:
        found[block.kind] = [dense.widths_of(block, level) for level in capabilities.levels(block)]
    attention = [(layer.num_heads, layer.num_kv_heads) for layer in found["attention"]]
    return attention, [layer.num_channels for layer in found["ffn"]]


def build_table(
    architecture: Architecture,
    *,
    profiler: Profiler,
    helpers: Sequence[Profiler] = (),
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
    """Measure a latency table into the file `path`, or what is missing in it; return the table.

    The same arguments give the same probes. `num_measured` levels of each kind, the extremes included, get a probe of
    their own; the random plans draw from all levels, so that the hold-out error covers the interpolation. `helpers` are
    other devices of the same kind, which share the work. If another process measures the same table, its end is waited
    for. Raises Mismatch where `path` was measured for something else.
    """
    with _alone(path, progress):
        shares = _shares([profiler, *helpers], path, workload=workload, architecture=architecture, protocol=protocol)
        cache_bytes = shares[0].table.header.fingerprint.last_level_cache_bytes
        shallow = probe_architecture(architecture, workload, cache_bytes=cache_bytes)
        backend = backends.get(profiler.backend)
        work = attention_work(architecture, workload, cache_bits=backend.cache_bits(workload))
        levels = sorted(attention_levels, key=lambda level: work(_layer(level, 0))), sorted(ffn_levels)
        capabilities = backend.capabilities(architecture, precision=workload.precision)
        probes = list_probes(
            shallow,
            measured=(spread(levels[0], num_measured), spread(levels[1], num_measured)),
            levels=levels,
            uniform=not capabilities.per_layer_widths,
            num_random=num_random,
            num_holdout=num_holdout,
            seed=seed,
        )
        return fill(shares, probes, architecture=shallow, progress=progress)


@contextmanager
def _alone(path: Path, progress: Progress | None) -> Iterator[None]:
    """Wait until no other process measures the same table, and keep others waiting meanwhile.

    Two processes would spoil each other's samples and remove each other's probes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if progress is not None:
            progress(0, 0, "another process measures this table: waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _shares(
    profilers: Sequence[Profiler], path: Path, *, workload: Workload, architecture: Architecture, protocol: Protocol
) -> list[Share]:
    """Return every device's table as far as it was measured. Raises Mismatch for devices that are not of one kind."""
    shares: list[Share] = []
    for number, profiler in enumerate(profilers, start=1):
        header = TableHeader(
            fingerprint=profiler.fingerprint(),
            workload=workload,
            architecture=architecture,
            backend=profiler.backend,
            protocol=protocol,
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        )
        own = path if number == 1 else partner_path(path, number)
        table = _resumed(own, header) if own.exists() else LatencyTable(header)
        shares.append(Share(profiler=profiler, table=replace(table, partners=()), path=own))
        first = shares[0].table.header.fingerprint
        if differences := first.differences(replace(header.fingerprint, serial_sha256=first.serial_sha256)):
            raise Mismatch(f"device {number} is not of the first one's kind: {'; '.join(differences)}")
    return shares


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
    """Return the model with only as many layers as it needs so that no probe's weights fit in the cache.

    A probe in the cache would be read faster than the real model is. The dense probe gets eight times the size of the
    cache, so that a probe of half its width still has four times. Of experts only those count to which one token is
    sent, because the same token is timed again and again.
    """
    layer = _uniform_layer(architecture)
    parameters = architecture.attention_parameters(layer) + architecture.active_ffn_parameters(layer)
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
    """Return the probes of a table, the dense one first.

    With `uniform`, the plans of the random and hold-out probes have equal widths in all of their layers.
    """
    layers = architecture.layers
    dense = layers[0]
    probes = [Probe(role="dense", widths=layers), Probe(role="depth", widths=layers[: len(layers) // 2])]
    for level in measured[0]:
        if level != (dense.num_heads, dense.num_kv_heads):
            # a model needs some attention: where the level is none, the first layer keeps its own
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
    # where there are fewer plans than asked for, the held-out ones keep their share: no budget is claimed without them
    num_fitted = len(drawn) * num_random // max(1, num_random + num_holdout)
    probes.extend(
        Probe(role="random" if index < num_fitted else "holdout", widths=plan) for index, plan in enumerate(drawn)
    )
    return probes


def _random_plan(
    layers: Sequence[LayerWidths],
    levels: tuple[Sequence[AttentionLevel], Sequence[int]],
    draw: random.Random,
) -> tuple[LayerWidths, ...]:
    """Return a plan whose sublayers are dense or at random levels, in random shares; its first layer is dense."""
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


def _layer(attention: AttentionLevel, channels: int) -> LayerWidths:
    return LayerWidths(num_heads=attention[0], num_kv_heads=attention[1], num_channels=channels)


def _uniform_layer(architecture: Architecture) -> LayerWidths:
    """Return the widths that all layers of a dense model have. Raises Unsupported where they differ."""
    if len(set(architecture.layers)) != 1 or len(architecture.layers) < 2:
        raise Unsupported("a latency table is measured on a dense model of at least two layers of equal widths")
    return architecture.layers[0]

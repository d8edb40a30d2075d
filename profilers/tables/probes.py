"""Build a latency table from probes: models with random weights that pass through the real exporter and runtime."""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

from dilap import backends, export
from dilap.backends import Backend
from dilap.core.errors import Mismatch, Unsupported
from dilap.core.measurement import Measurement
from dilap.core.rules import Capabilities, spread
from dilap.core.shape import PRECISION_BITS, Architecture, LayerWidths
from dilap.core.workload import Workload
from dilap.profilers.profiler import Profiler
from dilap.profilers.protocol import TABLE, Protocol
from dilap.profilers.tables.entries import Probe, TableEntry, run_precisions, runs_of
from dilap.profilers.tables.measuring import ProbeKind, Progress, fill
from dilap.profilers.tables.model import attention_work
from dilap.profilers.tables.resuming import alone, shares_of
from dilap.profilers.tables.table import LatencyTable, TableHeader

AttentionLevel = tuple[int, int]  # heads, KV heads; (0, 0) is none
Levels = tuple[Sequence[AttentionLevel], Sequence[int]]  # of attention, and numbers of channels
_NONE: Mapping[str, Levels] = MappingProxyType({})
_PLANS, _MIXED_PLANS = (8, 6), (12, 12)  # random ones that are fitted, and held-out ones
T = TypeVar("T")


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
    others: Mapping[str, Levels] = _NONE,
    num_measured: int = 6,
    num_random: int | None = None,
    num_holdout: int | None = None,
    seed: int = 0,
    protocol: Protocol = TABLE,
    progress: Progress | None = None,
) -> LatencyTable:
    """Measure a latency table into the file `path`, or what is missing in it; return the table.

    The same arguments give the same probes. `num_measured` levels of each kind, the extremes included, get a probe of
    their own; the random plans draw from all levels, so that the hold-out error covers the interpolation. `others` are
    the levels in every precision on offer beside the workload's own: each gets seven probes, and there are more random
    plans, which mix widths and precisions. `helpers` are other devices of the same kind, which share the work. If
    another process measures the same table, its end is waited for. Raises Mismatch where `path` was measured for
    something else.
    """
    precisions = (workload.precision, *others) if others else ()

    def start(profiler: Profiler, created: str) -> LatencyTable:
        return LatencyTable(
            TableHeader(
                fingerprint=profiler.fingerprint(),
                workload=workload,
                architecture=architecture,
                backend=profiler.backend,
                protocol=protocol,
                created=created,
                precisions=precisions,
            )
        )

    with alone(path, progress):
        shares = shares_of([profiler, *helpers], path, start=start, resume=_resumed)
        cache_bytes = shares[0].table.header.fingerprint.last_level_cache_bytes
        shallow = probe_architecture(architecture, workload, cache_bytes=cache_bytes, precisions=precisions)
        backend = backends.get(profiler.backend)
        work = attention_work(architecture, workload, cache_bits=backend.cache_bits(workload))

        def ascending(levels: Levels) -> Levels:
            return sorted(levels[0], key=lambda level: work(_layer(level, 0))), sorted(levels[1])

        levels = ascending((attention_levels, ffn_levels))
        plans = _MIXED_PLANS if others else _PLANS
        capabilities = backend.capabilities(architecture, precision=workload.precision)
        probes = list_probes(
            shallow,
            measured=(spread(levels[0], num_measured), spread(levels[1], num_measured)),
            levels=levels,
            others={precision: ascending(theirs) for precision, theirs in others.items()},
            heads=precisions,
            uniform=not capabilities.per_layer_widths,
            num_random=plans[0] if num_random is None else num_random,
            num_holdout=plans[1] if num_holdout is None else num_holdout,
            seed=seed,
        )
        return fill(shares, probes, kind=_kind(shallow, workload, backend), progress=progress)


def _resumed(path: Path, header: TableHeader) -> LatencyTable:
    table = LatencyTable.read(path)
    table.require_usable(
        fingerprint=header.fingerprint,
        workload=header.workload,
        architecture=header.architecture,
        backend=header.backend,
        precisions=header.offered,
    )
    if table.header.offered != header.offered:  # it has more, and another choice of random plans
        raise Mismatch(
            f"{path}: the table is of the precisions {', '.join(table.header.offered)}, and "
            f"{', '.join(header.offered)} is asked for: ask for the same ones, or measure another table"
        )
    return table


def _kind(architecture: Architecture, workload: Workload, backend: Backend) -> ProbeKind[Probe, TableEntry]:
    """Return how probes of a decoder are written: models with random weights, by the runtime's exporter."""

    def named(probe: Probe) -> Mapping[str, str]:
        """Return the probe's precisions; where the runtime reads the head from the embedding, for that too."""
        if "head" not in probe.precisions or not architecture.tied_embeddings:
            return probe.precisions
        if backend.capabilities(architecture, precision=workload.precision).untied_precisions:
            return probe.precisions
        return {**probe.precisions, "embedding": probe.precisions["head"]}

    def write(probe: Probe, out: Path) -> Path:
        artifact = export.get(backend.name).export_probe(
            replace(architecture, layers=probe.widths),
            precision=workload.precision,
            precisions=named(probe),
            seed=0,
            out=out,
        )
        return out / artifact.path

    return ProbeKind(dense=Probe(role="dense", widths=architecture.layers), write=write, entry=_entry)


def _entry(probe: Probe, measurement: Measurement, sentinel_ns: tuple[int, ...]) -> TableEntry:
    return TableEntry(
        role=probe.role,
        runs=runs_of(probe.widths, probe.precisions),
        precisions=run_precisions(probe.widths, probe.precisions),
        head=probe.precisions.get("head", ""),
        samples_ns=measurement.samples_ns,
        sentinel_ns=sentinel_ns,
        status=measurement.status,
        note=measurement.note,
        forced=measurement.forced,
    )


def probe_architecture(
    architecture: Architecture, workload: Workload, *, cache_bytes: int, precisions: Sequence[str] = ()
) -> Architecture:
    """Return the model with only as many layers as it needs so that no probe's weights fit in the cache.

    A probe in the cache would be read faster than the real model is. The dense probe gets eight times the size of the
    cache in the smallest of `precisions`, so that a probe of half its width still has four times. Of experts only those
    count to which one token is sent, because the same token is timed again and again.
    """
    layer = _uniform_layer(architecture)
    parameters = architecture.attention_parameters(layer) + architecture.active_ffn_parameters(layer)
    layer_bytes = parameters * min(PRECISION_BITS[one] for one in (workload.precision, *precisions)) / 8
    needed = max(2, -(-8 * cache_bytes // max(1, int(layer_bytes))))
    return replace(architecture, layers=architecture.layers[: min(len(architecture.layers), needed)])


def list_probes(
    architecture: Architecture,
    *,
    measured: Levels,
    levels: Levels,
    others: Mapping[str, Levels] = _NONE,
    heads: Sequence[str] = (),
    uniform: bool,
    num_random: int,
    num_holdout: int,
    seed: int,
) -> list[Probe]:
    """Return the probes of a table, the dense one first.

    `levels` are those in the workload's own precision, of which `measured` get a probe; `others` are those in every
    other precision on offer, and `heads` the precisions on offer for the head. The workload's own is one of them,
    because a head that is given it may differ from one of which nothing is said. With `uniform`, the plans of the
    random and hold-out probes have equal widths in all of their layers.
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
    for precision, theirs in others.items():
        probes.extend(_precision_probes(layers, theirs, precision))
    probes.extend(Probe(role="head", widths=layers, precisions={"head": precision}) for precision in heads)
    draw, offered = random.Random(seed), {"": levels, **others}

    def draw_plan() -> Probe:
        if others:
            return _mixed_plan(layers, offered, heads, draw, uniform=uniform)
        widths = _uniform_plan(layers, levels, draw) if uniform else _random_plan(layers, levels, draw)
        return Probe(role="random", widths=widths)

    return probes + _drawn(draw_plan, layers, num_random=num_random, num_holdout=num_holdout)


def _precision_probes(layers: tuple[LayerWidths, ...], levels: Levels, precision: str) -> Iterator[Probe]:
    """Return the probes of one precision: all sublayers in it, attention alone, and narrower sublayers of each kind.

    What is not named stays in the workload's own precision. In a simulation of five precisions with 2 % of noise on
    every probe, held-out plans are off by 1.7 % (median) with 12 random plans, by 2.3 % with 6, and by 2.3 % without
    attention's probe at its full width, by 2.0 % without those in the middle. With 0.5 % of noise it is 0.4 %.
    """
    dense = layers[0]
    attention, ffn = (
        {f"layers.{index}.{kind}": precision for index in range(len(layers))} for kind in ("attention", "ffn")
    )
    yield Probe(role="precision", widths=layers, precisions=attention | ffn)
    yield Probe(role="attention", widths=layers, precisions=attention)
    for level in _two_narrower([one for one in levels[0] if one != (0, 0)]):
        narrow = (_layer(level, dense.num_channels),) * len(layers)
        yield Probe(role="attention", widths=narrow, precisions=attention)
    for channels in _two_narrower([one for one in levels[1] if one]):
        yield Probe(role="ffn", widths=(replace(dense, num_channels=channels),) * len(layers), precisions=ffn)


def _two_narrower(widths: Sequence[T]) -> list[T]:
    """Return the narrowest width, and the one in the middle of all, which are ascending."""
    return spread(widths, 3)[:-1]


def _drawn(
    draw_plan: Callable[[], Probe], layers: tuple[LayerWidths, ...], *, num_random: int, num_holdout: int
) -> list[Probe]:
    """Return so many different random and held-out plans, or fewer, because small models may not have as many."""
    drawn: dict[object, Probe] = {}
    for _ in range(20 * (num_random + num_holdout)):
        plan = draw_plan()
        if plan.widths != layers or plan.precisions:
            drawn.setdefault(plan.key, plan)
        if len(drawn) == num_random + num_holdout:
            break
    # where there are fewer plans than asked for, the held-out ones keep their share: no budget is claimed without them
    num_fitted = len(drawn) * num_random // max(1, num_random + num_holdout)
    plans = list(drawn.values())
    return plans[:num_fitted] + [replace(plan, role="holdout") for plan in plans[num_fitted:]]


def _random_plan(layers: Sequence[LayerWidths], levels: Levels, draw: random.Random) -> tuple[LayerWidths, ...]:
    """Return a plan whose sublayers are dense or at random levels, in random shares; its first layer is dense."""
    keep, dense = draw.random(), layers[0]
    plan = []
    for index in range(len(layers)):
        drawn = _random_layer(dense, *levels, keep, draw)
        layer = dense if index == 0 else drawn
        if not layer.is_empty:
            plan.append(layer)
    return tuple(plan)


def _random_layer(
    dense: LayerWidths, attention: Sequence[AttentionLevel], ffn: Sequence[int], keep: float, draw: random.Random
) -> LayerWidths:
    """Return a layer with sublayers that are dense, with the probability `keep`, or at random levels."""
    level = (dense.num_heads, dense.num_kv_heads) if draw.random() < keep else draw.choice(attention)
    return _layer(level, dense.num_channels if draw.random() < keep else draw.choice(ffn))


def _uniform_plan(layers: Sequence[LayerWidths], levels: Levels, draw: random.Random) -> tuple[LayerWidths, ...]:
    attention = draw.choice([level for level in levels[0] if level != (0, 0)])
    channels = draw.choice([width for width in levels[1] if width])
    return (_layer(attention, channels),) * draw.randint((len(layers) + 1) // 2, len(layers))


def _mixed_plan(
    layers: Sequence[LayerWidths],
    levels: Mapping[str, Levels],
    heads: Sequence[str],
    draw: random.Random,
    *,
    uniform: bool,
) -> Probe:
    """Return a plan of random widths and precisions, the latter in random shares, and a head in a random one.

    Its first layer has its full width. With `uniform` all layers have the same, such as every precision has.
    """
    names = list(levels)
    shares = [[draw.expovariate(1) for _ in names] for _ in ("attention", "ffn")]
    keep, equal = draw.random(), _uniform_plan(layers, _common_levels(levels), draw)
    widths: list[LayerWidths] = []
    precisions = {"head": draw.choice(heads)}
    for dense in equal if uniform else layers:
        attention, ffn = (draw.choices(names, share)[0] for share in shares)
        may_shrink = bool(widths) and not uniform
        layer = _random_layer(dense, levels[attention][0], levels[ffn][1], keep, draw) if may_shrink else dense
        if layer.num_heads:
            precisions[f"layers.{len(widths)}.attention"] = attention
        if layer.num_channels:
            precisions[f"layers.{len(widths)}.ffn"] = ffn
        if not layer.is_empty:
            widths.append(layer)
    named = {name: precision for name, precision in precisions.items() if precision}
    return Probe(role="random", widths=tuple(widths), precisions=named)


def _common_levels(levels: Mapping[str, Levels]) -> Levels:
    """Return the levels that every precision has."""
    attention, *others = (one[0] for one in levels.values())
    ffn, *more = (one[1] for one in levels.values())
    return (
        [level for level in attention if all(level in one for one in others)],
        [width for width in ffn if all(width in one for one in more)],
    )


def _layer(attention: AttentionLevel, channels: int) -> LayerWidths:
    return LayerWidths(num_heads=attention[0], num_kv_heads=attention[1], num_channels=channels)


def _uniform_layer(architecture: Architecture) -> LayerWidths:
    """Return the widths that all layers of a dense model have. Raises Unsupported where they differ."""
    if len(set(architecture.layers)) != 1 or len(architecture.layers) < 2:
        raise Unsupported("a latency table is measured on a dense model of at least two layers of equal widths")
    return architecture.layers[0]

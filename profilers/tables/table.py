"""Latency tables: raw samples of probe models as JSON Lines; every cost is derived on reading."""

import itertools
import json
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from dilap import backends
from dilap.core.codec import decode, encode, written_aside
from dilap.core.documents import parse_object, read_text
from dilap.core.errors import InvalidInput, Mismatch
from dilap.core.measurement import Fingerprint, Status, median_interval, quantile
from dilap.core.shape import PRECISION_BITS, Architecture, LayerWidths
from dilap.core.workload import Statistic, Workload
from dilap.profilers.protocol import Protocol
from dilap.profilers.tables.fit import LatencyModel, Observation, fit

Role = Literal["dense", "depth", "attention", "ffn", "random", "holdout"]
Run = tuple[int, int, int, int]  # layers in a row, heads, KV heads, channels
_LONGEST_NS = 10**13  # three hours for one token or one prompt: what is longer is no sample


@dataclass(frozen=True, kw_only=True)
class TableHeader:
    """What holds for all entries: device, workload, runtime and protocol, and the dense model's `architecture`."""

    fingerprint: Fingerprint
    workload: Workload
    architecture: Architecture
    backend: str
    protocol: Protocol
    created: str

    def __post_init__(self) -> None:
        layers = self.architecture.layers
        if len(layers) < 2 or len(set(layers)) != 1 or not layers[0].num_heads or not layers[0].num_channels:
            raise ValueError("a table is of a dense model: two layers or more, all of one shape")
        if self.workload.precision not in PRECISION_BITS:
            raise ValueError(f"unknown precision {self.workload.precision!r}")


@dataclass(frozen=True, kw_only=True)
class TableEntry:
    """One measured probe.

    `sentinel_ns` has, for every sample, the dense probe's median in the same round; `forced` says what made the device
    unfit and was overridden.
    """

    role: Role
    runs: tuple[Run, ...]
    samples_ns: tuple[int, ...]
    sentinel_ns: tuple[int, ...]
    status: Status
    note: str = ""
    forced: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.samples_ns or len(self.sentinel_ns) != len(self.samples_ns):
            raise ValueError("an entry needs samples, and the sentinel of each")
        if not all(0 < one <= _LONGEST_NS for one in (*self.samples_ns, *self.sentinel_ns)):
            raise ValueError(f"a sample takes between 1 and {_LONGEST_NS} nanoseconds, and one here does not")
        if self.status == "estimated":
            raise ValueError("it is estimated, and a latency table holds what was measured")
        if not self.runs or min(run[0] for run in self.runs) < 1:
            raise ValueError("every run has at least one layer")
        for _, heads, kv_heads, channels in self.runs:
            LayerWidths(num_heads=heads, num_kv_heads=kv_heads, num_channels=channels)

    @property
    def is_fitted(self) -> bool:
        """Whether costs are fitted to it: not if other processes used the cores meanwhile, unless overridden."""
        return self.status != "contended" or bool(self.forced)

    @property
    def num_layers(self) -> int:
        return sum(run[0] for run in self.runs)

    def misfit(self, architecture: Architecture) -> str | None:
        """Return why this is no probe of that dense model; None where it is.

        This is asked before `widths` lists the layers one by one, because a damaged file may count a billion of them.
        """
        dense, most = architecture.layers[0], len(architecture.layers)
        if self.num_layers > most:
            return f"it has {self.num_layers} layers, and the model {most}"
        slots = dense.num_heads // dense.num_kv_heads
        for _, heads, kv_heads, channels in self.runs:
            if kv_heads > dense.num_kv_heads or heads > kv_heads * slots or channels > dense.num_channels:
                return (
                    f"a layer of {heads} heads, {kv_heads} KV heads and {channels} channels is not cut from one of "
                    f"{dense.num_heads}, {dense.num_kv_heads} and {dense.num_channels}"
                )
        has_dense_layers = {run[1:] for run in self.runs} == {runs_of([dense])[0][1:]}
        if (self.role in ("dense", "depth")) != has_dense_layers and self.role in (
            "dense",
            "depth",
            "attention",
            "ffn",
        ):
            return f"a probe of role {self.role} {'has' if has_dense_layers else 'lacks'} the model's own layers"
        return None

    @property
    def probe(self) -> tuple[Role, tuple[Run, ...]]:
        """What tells the probe from others: what it was measured for, and its layers."""
        return self.role, self.runs

    @property
    def widths(self) -> tuple[LayerWidths, ...]:
        return tuple(
            LayerWidths(num_heads=heads, num_kv_heads=kv_heads, num_channels=channels)
            for count, heads, kv_heads, channels in self.runs
            for _ in range(count)
        )


def runs_of(widths: Sequence[LayerWidths]) -> tuple[Run, ...]:
    """Return the layers as runs: equal layers in a row become one run with their number."""
    runs: list[Run] = []
    for layer in widths:
        level = (layer.num_heads, layer.num_kv_heads, layer.num_channels)
        count = runs.pop()[0] if runs and runs[-1][1:] == level else 0
        runs.append((count + 1, *level))
    return tuple(runs)


@dataclass(frozen=True)
class LatencyTable:
    """A header and its entries, in the order they were measured.

    `partners` are tables of other devices of the same kind, with the probes that those measured. The entries of two
    devices are never in one table, but the costs are fitted to all of them, those of each device relative to its own
    dense probe.
    """

    header: TableHeader
    entries: tuple[TableEntry, ...] = ()
    partners: tuple["LatencyTable", ...] = ()

    def __contains__(self, probe: tuple[Role, Sequence[LayerWidths]]) -> bool:
        role, widths = probe
        return (role, runs_of(widths)) in {entry.probe for entry in self.all_entries if entry.is_fitted}

    @property
    def all_entries(self) -> tuple[TableEntry, ...]:
        """All entries, those of the partners included."""
        return (*self.entries, *(entry for partner in self.partners for entry in partner.entries))

    def with_entries(self, entries: Iterable[TableEntry]) -> "LatencyTable":
        """Return the table with more entries, which replace earlier ones of the same probes."""
        added = tuple(entries)
        again = {entry.probe for entry in added}
        return replace(self, entries=(*(one for one in self.entries if one.probe not in again), *added))

    def caveats(self) -> tuple[str, ...]:
        """Return what a reader of the table's costs must know of how they were measured."""
        entries = self.all_entries
        found: list[str] = []
        for title, chosen in (
            ("left out, because other processes used the cores", [one for one in entries if not one.is_fitted]),
            ("noisy", [one for one in entries if one.status == "noisy"]),
        ):
            notes = [one.note for one in chosen if one.note and one.status == "noisy"]
            if chosen:
                example = f" ({notes[0]})" if notes else ""
                found.append(f"{len(chosen)} of the latency table's {len(entries)} probes are {title}{example}")
        if forced := [one for one in entries if one.forced]:
            reasons = "; ".join(dict.fromkeys(reason for one in forced for reason in one.forced))
            title = "measured in an unfit state (--force)"
            found.append(f"{len(forced)} of the latency table's {len(entries)} probes were {title}: {reasons}")
        return tuple(found)

    def require_usable(
        self, *, fingerprint: Fingerprint, workload: Workload, architecture: Architecture, backend: str
    ) -> None:
        """Raise Mismatch, naming every field that differs, where the table was made for something else."""
        header = self.header
        pairs = [("backend", header.backend, backend)]
        for name, mine, theirs in (
            ("workload", header.workload, workload),
            ("model", header.architecture, architecture),
        ):
            other = asdict(theirs)
            pairs += [(f"{name} {key}", value, other[key]) for key, value in asdict(mine).items()]
        unused = "workload prompt_tokens" if workload.phase == "decode" else "workload context"
        differences = header.fingerprint.differences(fingerprint)
        differences += [_difference(*pair) for pair in pairs if pair[1] != pair[2] and pair[0] != unused]
        if differences:
            raise Mismatch(
                f"the latency table was measured for something else (table / here): {'; '.join(differences)}; "
                "measure one with dilap-profile"
            )

    def model(self, statistic: Statistic = "p50") -> LatencyModel:
        """Return the costs fitted to the entries that count. Raises InvalidInput where a necessary probe is missing.

        For p90 the hold-out errors are those of the median too: p90 is the median times one factor for the tail, which
        no hold-out plan tests.
        """
        entries, *others = [[e for e in one.entries if e.is_fitted] for one in (self, *self.partners)]
        observations = observations_of(entries, statistic)
        for theirs in others if entries else ():
            scale = _sentinel_seconds(entries) / _sentinel_seconds(theirs) if theirs else 1.0
            observations += [replace(one, seconds=one.seconds * scale) for one in observations_of(theirs, statistic)]
        header = self.header
        cache_bits = backends.get(header.backend).cache_bits(header.workload)
        model = fit(observations, architecture=header.architecture, workload=header.workload, cache_bits=cache_bits)
        return replace(model, caveats=self.caveats())

    def write(self, path: Path) -> None:
        """Write the file as a whole, so that a kill never leaves half a line, and the partners into files beside it."""
        for number, partner in enumerate(self.partners, start=2):
            partner.write(partner_path(path, number))
        lines = [{**encode(self.header), "type": "LatencyTable"}, *map(encode, self.entries)]
        with written_aside(path) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> "LatencyTable":
        """Read a table and its partners. Raises InvalidInput, naming the line, where one is damaged."""
        header, entries = _read_lines(path)
        dense = next((one.num_layers for one in entries if one.role == "dense"), None)
        _require_consistent(header, entries, dense_layers=dense, source=str(path))
        partners = []
        for other in _partner_paths(path):
            theirs, measured = _read_lines(other)
            if (theirs.architecture, theirs.workload) != (header.architecture, header.workload):
                raise InvalidInput(f"{other}: line 1 is of another model or workload than {path}")
            _require_consistent(theirs, measured, dense_layers=dense, source=str(other))
            partners.append(cls(theirs, tuple(measured)))
        return cls(header, tuple(entries), tuple(partners))


def _read_lines(path: Path) -> tuple[TableHeader, list[TableEntry]]:
    """Return the header and the entries of one device's file. Raises InvalidInput."""
    if not path.exists():
        raise InvalidInput(f"{path}: no such latency table; measure one with dilap-profile")
    lines = read_text(path).split("\n")
    if lines.pop():  # what follows the last newline
        raise InvalidInput(f"{path}: line {len(lines) + 1} is cut off")
    documents = [parse_object(line, source=f"{path}: line {number}") for number, line in enumerate(lines, start=1)]
    if not documents or documents[0].get("type") != "LatencyTable":
        raise InvalidInput(f"{path}: line 1 is not the header of a latency table")
    header = decode(TableHeader, {**documents[0], "type": "TableHeader"}, source=f"{path}: line 1")
    return header, [
        decode(TableEntry, document, source=f"{path}: line {number}")
        for number, document in enumerate(documents[1:], start=2)
    ]


def _require_consistent(
    header: TableHeader, entries: Sequence[TableEntry], *, dense_layers: int | None, source: str
) -> None:
    """Raise InvalidInput, naming the line, for an entry of another model, or one that is there twice."""
    seen: set[tuple[Role, tuple[Run, ...]]] = set()
    for number, entry in enumerate(entries, start=2):
        reason = entry.misfit(header.architecture)
        if reason is None and entry.probe in seen:
            reason = f"its probe of role {entry.role} is in the table twice"
        if reason is None and dense_layers is not None:
            reason = _unlike_dense(entry, dense_layers)
        if reason is not None:
            raise InvalidInput(f"{source}: line {number}: {reason}; measure the table again with dilap-profile")
        seen.add(entry.probe)


def _unlike_dense(entry: TableEntry, dense_layers: int) -> str | None:
    """Return why an entry cannot be compared with the dense probe; None where it can."""
    if entry.role in ("attention", "ffn") and entry.num_layers != dense_layers:
        return f"a probe of role {entry.role} has {entry.num_layers} layers, and the dense one {dense_layers}"
    if entry.role == "depth" and entry.num_layers >= dense_layers:
        return f"the shallow probe has {entry.num_layers} layers, and the dense one {dense_layers}"
    if entry.role == "dense" and entry.num_layers != dense_layers:
        return "it is a second dense probe"
    return None


def partner_path(path: Path, number: int) -> Path:
    """Return where the table of the `number`-th device of a kind lies, beside the first one's."""
    return path.with_name(f"{path.stem}.{number}{path.suffix}")


def _partner_paths(path: Path) -> Iterator[Path]:
    for number in itertools.count(2):
        if not partner_path(path, number).exists():
            return
        yield partner_path(path, number)


def _difference(name: str, mine: object, theirs: object) -> str:
    if name == "model layers":
        return "model layers differ"
    return f"{name}: {mine} / {theirs}"


def observations_of(entries: Sequence[TableEntry], statistic: Statistic) -> list[Observation]:
    """Return the entries as observations, with the machine's drift divided out by the sentinels.

    What p90 adds to the median belongs to the machine and not to a width, so it is one factor: the entries' median.
    """
    if not entries:
        return []
    reference = _sentinel_seconds(entries)
    if statistic == "p90":
        reference *= statistics.median(
            quantile(entry.samples_ns, 0.9) / statistics.median(entry.samples_ns) for entry in entries
        )
    return [_observation(entry, reference) for entry in entries]


def _sentinel_seconds(entries: Sequence[TableEntry]) -> float:
    """Return the median seconds of the dense probe beside all of the entries."""
    return statistics.median(statistics.median(entry.sentinel_ns) for entry in entries) / 1e9


def _observation(entry: TableEntry, reference_seconds: float) -> Observation:
    # Ratios are taken within rounds, because other load that outlasts a round slows the probe and the sentinel alike.
    ratios = [sample / sentinel for sample, sentinel in zip(entry.samples_ns, entry.sentinel_ns, strict=True)]
    middle = median_interval(ratios)
    return Observation(
        role=entry.role,
        widths=entry.widths,
        seconds=middle.value * reference_seconds,
        half_width=middle.half_width,
    )

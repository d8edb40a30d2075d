"""Latency tables: raw samples of probe models as JSON Lines; every cost is derived on reading."""

import itertools
import json
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import ClassVar

from dilap import backends
from dilap.core.codec import decode, encode, written_aside
from dilap.core.documents import parse_object, read_text
from dilap.core.errors import InvalidInput, Mismatch
from dilap.core.measurement import Fingerprint, median_interval, quantile
from dilap.core.shape import PRECISION_BITS, Architecture, by_quality
from dilap.core.workload import Statistic, Workload
from dilap.profilers.protocol import Protocol
from dilap.profilers.tables.entries import Probe, TableEntry
from dilap.profilers.tables.fit import fit
from dilap.profilers.tables.model import LatencyModel, Observation


@dataclass(frozen=True, kw_only=True)
class TableHeader:
    """What holds for all entries: device, workload, runtime and protocol, and the dense model's `architecture`.

    `precisions` are those that a part of a model may have, the workload's own included; none means that one alone.
    """

    VERSION: ClassVar[int] = 2  # 1 had no precisions: everything was in the workload's own

    fingerprint: Fingerprint
    workload: Workload
    architecture: Architecture
    backend: str
    protocol: Protocol
    created: str
    precisions: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        layers = self.architecture.layers
        if len(layers) < 2 or len(set(layers)) != 1 or not layers[0].num_heads or not layers[0].num_channels:
            raise ValueError("a table is of a dense model: two layers or more, all of one shape")
        if self.workload.precision not in PRECISION_BITS:
            raise ValueError(f"unknown precision {self.workload.precision!r}")
        if odd := sorted({*self.precisions} - {*PRECISION_BITS}):
            raise ValueError(f"unknown precision {odd[0]!r:.80}")
        if self.precisions and self.workload.precision not in self.precisions:
            raise ValueError(f"the precisions on offer lack the workload's own, {self.workload.precision}")

    @property
    def offered(self) -> tuple[str, ...]:
        """The precisions that a part of a model may have, of ever lower quality; the first is the reference."""
        return by_quality([self.workload.precision, *self.precisions])

    @property
    def others(self) -> tuple[str, ...]:
        """The precisions on offer beside the workload's own."""
        return tuple(name for name in self.offered if name != self.workload.precision)


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

    def __contains__(self, probe: Probe) -> bool:
        return probe.key in {entry.key for entry in self.all_entries if entry.is_fitted}

    @property
    def all_entries(self) -> tuple[TableEntry, ...]:
        """All entries, those of the partners included."""
        return (*self.entries, *(entry for partner in self.partners for entry in partner.entries))

    def with_entries(self, entries: Iterable[TableEntry]) -> "LatencyTable":
        """Return the table with more entries, which replace earlier ones of the same probes."""
        added = tuple(entries)
        again = {entry.key for entry in added}
        return replace(self, entries=(*(one for one in self.entries if one.key not in again), *added))

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
        self,
        *,
        fingerprint: Fingerprint,
        workload: Workload,
        architecture: Architecture,
        backend: str,
        precisions: Sequence[str] = (),
    ) -> None:
        """Raise Mismatch, naming every field that differs, where the table was made for something else.

        `precisions` are those that the table has to have, beside the workload's own.
        """
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
        if {*precisions} - {*header.offered}:
            differences.append(f"precisions: {', '.join(header.offered)} / {', '.join(precisions)}")
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
        model = fit(
            observations,
            architecture=header.architecture,
            workload=header.workload,
            cache_bits=cache_bits,
            precisions=header.others,
        )
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
            if any(getattr(theirs, name) != getattr(header, name) for name in ("architecture", "workload", "offered")):
                raise InvalidInput(f"{other}: line 1 is of another model, workload or precisions than {path}")
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
    seen: set[tuple[object, ...]] = set()
    for number, entry in enumerate(entries, start=2):
        reason = entry.misfit(header.architecture)
        blocks = {precision for pair in entry.precisions for precision in pair}
        odd = sorted((blocks - {"", *header.others}) | ({entry.head} - {"", *header.precisions}))
        if reason is None and odd:
            reason = f"it has a part in {odd[0]}, which is none of the other precisions of the table"
        if reason is None and entry.key in seen:
            reason = f"its probe of role {entry.role} is in the table twice"
        if reason is None and dense_layers is not None:
            reason = _unlike_dense(entry, dense_layers)
        if reason is not None:
            raise InvalidInput(f"{source}: line {number}: {reason}; measure the table again with dilap-profile")
        seen.add(entry.key)


def _unlike_dense(entry: TableEntry, dense_layers: int) -> str | None:
    """Return why an entry cannot be compared with the dense probe; None where it can."""
    if entry.role in ("attention", "ffn", "precision", "head") and entry.num_layers != dense_layers:
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
        precisions=entry.named_precisions,
        seconds=middle.value * reference_seconds,
        half_width=middle.half_width,
    )

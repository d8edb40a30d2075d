"""Latency tables of decoders: raw samples of probe models; every cost is derived on reading."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import ClassVar

from dilap import backends
from dilap.core.errors import Mismatch
from dilap.core.measurement import Fingerprint
from dilap.core.shape import PRECISION_BITS, Architecture, by_quality
from dilap.core.workload import Statistic, Workload
from dilap.profilers.tables.entries import TableEntry
from dilap.profilers.tables.fit import fit
from dilap.profilers.tables.model import LatencyModel, Observation
from dilap.profilers.tables.record import Header, RecordedTable
from dilap.profilers.tables.samples import dense_seconds, sentinel_seconds


@dataclass(frozen=True, kw_only=True)
class TableHeader(Header):
    """What holds for all entries, and the dense model's `architecture`.

    `precisions` are those that a part of a model may have, the workload's own included; none means that one alone.
    """

    VERSION: ClassVar[int] = 2  # 1 had no precisions: everything was in the workload's own

    architecture: Architecture
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

    @property
    def subject(self) -> object:
        return self.architecture, self.workload, self.offered


@dataclass(frozen=True)
class LatencyTable(RecordedTable[TableHeader, TableEntry]):
    """The table of a decoder, whose probes are fewer, narrower or less precise layers."""

    HEADER, ENTRY = TableHeader, TableEntry

    @classmethod
    def misfit(cls, entry: TableEntry, header: TableHeader, dense: TableEntry | None) -> str | None:
        if (reason := entry.misfit(header.architecture)) is not None:
            return reason
        blocks = {precision for pair in entry.precisions for precision in pair}
        if odd := sorted((blocks - {"", *header.others}) | ({entry.head} - {"", *header.precisions})):
            return f"it has a part in {odd[0]}, which is none of the other precisions of the table"
        return None if dense is None else _unlike_dense(entry, dense.num_layers)

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
            scale = sentinel_seconds(entries) / sentinel_seconds(theirs) if theirs else 1.0
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


def _unlike_dense(entry: TableEntry, dense_layers: int) -> str | None:
    """Return why an entry cannot be compared with the dense probe; None where it can."""
    if entry.role in ("attention", "ffn", "precision", "head") and entry.num_layers != dense_layers:
        return f"a probe of role {entry.role} has {entry.num_layers} layers, and the dense one {dense_layers}"
    if entry.role == "depth" and entry.num_layers >= dense_layers:
        return f"the shallow probe has {entry.num_layers} layers, and the dense one {dense_layers}"
    if entry.role == "dense" and entry.num_layers != dense_layers:
        return "it is a second dense probe"
    return None


def _difference(name: str, mine: object, theirs: object) -> str:
    if name == "model layers":
        return "model layers differ"
    return f"{name}: {mine} / {theirs}"


def observations_of(entries: Sequence[TableEntry], statistic: Statistic) -> list[Observation]:
    """Return the entries as observations, with the machine's drift divided out by the sentinels."""
    if not entries:
        return []
    reference = dense_seconds(entries, statistic)
    return [_observation(entry, reference) for entry in entries]


def _observation(entry: TableEntry, reference_seconds: float) -> Observation:
    ratio = entry.ratio
    return Observation(
        role=entry.role,
        widths=entry.widths,
        precisions=entry.named_precisions,
        seconds=ratio.value * reference_seconds,
        half_width=ratio.half_width,
    )

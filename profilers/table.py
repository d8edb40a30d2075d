"""Latency tables: raw samples of probe models as JSON Lines; every cost is derived on reading."""

import itertools
import json
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from dilap.codec import decode, encode, written_aside
from dilap.errors import InvalidInput, Mismatch
from dilap.profilers.fit import LatencyModel, Observation, fit
from dilap.profilers.protocol import Protocol
from dilap.types import (
    Architecture,
    Fingerprint,
    LayerWidths,
    Statistic,
    Status,
    Workload,
    median_interval,
    quantile,
)

Role = Literal["dense", "depth", "attention", "ffn", "random", "holdout"]
Run = tuple[int, int, int, int]  # layers in a row, heads, KV heads, channels


@dataclass(frozen=True, kw_only=True)
class TableHeader:
    """What every entry was measured on, for and with; `architecture` is the dense model's."""

    fingerprint: Fingerprint
    workload: Workload
    architecture: Architecture
    backend: str
    protocol: Protocol
    created: str


@dataclass(frozen=True, kw_only=True)
class TableEntry:
    """One probe model. `sentinel_ns` has, for every sample, the dense probe's median in the same round."""

    role: Role
    runs: tuple[Run, ...]
    samples_ns: tuple[int, ...]
    sentinel_ns: tuple[int, ...]
    status: Status
    note: str = ""

    def __post_init__(self) -> None:
        if not self.samples_ns or len(self.sentinel_ns) != len(self.samples_ns):
            raise ValueError("an entry needs samples, and the sentinel of each")

    @property
    def widths(self) -> tuple[LayerWidths, ...]:
        return tuple(
            LayerWidths(num_heads=heads, num_kv_heads=kv_heads, num_channels=channels)
            for count, heads, kv_heads, channels in self.runs
            for _ in range(count)
        )


def runs_of(widths: Sequence[LayerWidths]) -> tuple[Run, ...]:
    """Equal layers in a row as one."""
    runs: list[Run] = []
    for layer in widths:
        level = (layer.num_heads, layer.num_kv_heads, layer.num_channels)
        count = runs.pop()[0] if runs and runs[-1][1:] == level else 0
        runs.append((count + 1, *level))
    return tuple(runs)


@dataclass(frozen=True)
class LatencyTable:
    """A header and its entries, in the order they were measured.

    `partners` are tables of other devices of the kind, with the probes that those measured. Entries of two devices are
    never in one table; a model is fitted to all, each device's relative to its own dense probe.
    """

    header: TableHeader
    entries: tuple[TableEntry, ...] = ()
    partners: tuple["LatencyTable", ...] = ()

    def __contains__(self, probe: tuple[Role, Sequence[LayerWidths]]) -> bool:
        role, widths = probe
        entries = (*self.entries, *(entry for partner in self.partners for entry in partner.entries))
        return (role, runs_of(widths)) in {(entry.role, entry.runs) for entry in entries}

    def with_entries(self, entries: Iterable[TableEntry]) -> "LatencyTable":
        return replace(self, entries=(*self.entries, *entries))

    def require_usable(
        self, *, fingerprint: Fingerprint, workload: Workload, architecture: Architecture, backend: str
    ) -> None:
        """Raises Mismatch naming every field in which the table was made for something else."""
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
        """The costs that explain the entries. Raises InvalidInput where the probes are not all there.

        The hold-out errors are those of the median for either statistic: p90 is the median times one tail factor,
        which no hold-out plan tests.
        """
        observations = observations_of(self.entries, statistic)
        for partner in self.partners:
            scale = _sentinel_seconds(self.entries) / _sentinel_seconds(partner.entries) if partner.entries else 1.0
            observations += [
                replace(one, seconds=one.seconds * scale) for one in observations_of(partner.entries, statistic)
            ]
        return fit(observations, architecture=self.header.architecture, workload=self.header.workload)

    def write(self, path: Path) -> None:
        """Replace the file as a whole, so that a kill never leaves half a line; partners go into files beside it."""
        for number, partner in enumerate(self.partners, start=2):
            partner.write(partner_path(path, number))
        lines = [{**encode(self.header), "type": "LatencyTable"}, *map(encode, self.entries)]
        with written_aside(path) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> "LatencyTable":
        """Raises InvalidInput naming the line that is damaged."""
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise InvalidInput(f"{path}: no such latency table; measure one with dilap-profile") from None
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidInput(f"{path}: not a readable latency table ({error})") from error
        lines = text.split("\n")
        if lines.pop():  # what follows the last newline
            raise InvalidInput(f"{path}: line {len(lines) + 1} is cut off")
        documents = [_parse(line, source=f"{path}: line {number}") for number, line in enumerate(lines, start=1)]
        if not documents or documents[0].get("type") != "LatencyTable":
            raise InvalidInput(f"{path}: line 1 is not the header of a latency table")
        header = decode(TableHeader, {**documents[0], "type": "TableHeader"}, source=f"{path}: line 1")
        entries = [
            decode(TableEntry, document, source=f"{path}: line {number}")
            for number, document in enumerate(documents[1:], start=2)
        ]
        return cls(header, tuple(entries), tuple(cls.read(one) for one in _partner_paths(path)))


def partner_path(path: Path, number: int) -> Path:
    """Where the table of the `number`-th device of a kind lies, beside the first one's."""
    return path.with_name(f"{path.stem}.{number}{path.suffix}")


def _partner_paths(path: Path) -> Iterator[Path]:
    for number in itertools.count(2):
        if not partner_path(path, number).exists():
            return
        yield partner_path(path, number)


def _parse(line: str, *, source: str) -> dict[str, object]:
    try:
        document = json.loads(line)
    except json.JSONDecodeError as error:
        raise InvalidInput(f"{source} is damaged ({error})") from error
    if not isinstance(document, dict):
        raise InvalidInput(f"{source} is not a JSON object")
    return document


def _difference(name: str, mine: object, theirs: object) -> str:
    if name == "model layers":
        return "model layers differ"
    return f"{name}: {mine} / {theirs}"


def observations_of(entries: Sequence[TableEntry], statistic: Statistic) -> list[Observation]:
    """Entries with the drift of the machine divided out by their sentinels.

    The tail that p90 adds belongs to the machine, not to a width: it is one factor, the entries' median.
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
    """Of the dense probe, over all that was measured beside it."""
    return statistics.median(statistics.median(entry.sentinel_ns) for entry in entries) / 1e9


def _observation(entry: TableEntry, reference_seconds: float) -> Observation:
    # within rounds, because a spell of other load that outlasts a round slows both alike
    ratios = [sample / sentinel for sample, sentinel in zip(entry.samples_ns, entry.sentinel_ns, strict=True)]
    middle = median_interval(ratios)
    return Observation(
        role=entry.role,
        widths=entry.widths,
        seconds=middle.value * reference_seconds,
        half_width=middle.half_width,
    )

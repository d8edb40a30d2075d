"""The file of a latency table: a header and measured probes as JSON Lines, and the files of other devices beside it."""

import abc
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from dilap.core.codec import decode, encode, written_aside
from dilap.core.documents import parse_object, read_text
from dilap.core.errors import InvalidInput
from dilap.core.measurement import Fingerprint
from dilap.core.workload import Workload
from dilap.profilers.protocol import Protocol
from dilap.profilers.tables.samples import Samples, caveats_of


@dataclass(frozen=True, kw_only=True)
class Header(abc.ABC):
    """What holds for all entries of a table: device, workload, runtime and protocol."""

    fingerprint: Fingerprint
    workload: Workload
    backend: str
    protocol: Protocol
    created: str

    @property
    @abc.abstractmethod
    def subject(self) -> object:
        """What is measured. The tables of several devices, which are fitted together, have it in common."""


AnyHeader = TypeVar("AnyHeader", bound=Header)
AnyEntry = TypeVar("AnyEntry", bound=Samples)
AnyTable = TypeVar("AnyTable", bound="RecordedTable[Any, Any]")


@dataclass(frozen=True)
class RecordedTable(abc.ABC, Generic[AnyHeader, AnyEntry]):
    """A header and its entries, in the order they were measured.

    `partners` are tables of other devices of the same kind, with the probes that those measured. The entries of two
    devices are never in one table, but the costs are fitted to all of them, those of each device relative to its own
    dense probe.
    """

    HEADER: ClassVar[type[Header]]
    ENTRY: ClassVar[type[Samples]]

    header: AnyHeader
    entries: tuple[AnyEntry, ...] = ()
    partners: "tuple[RecordedTable[AnyHeader, AnyEntry], ...]" = ()

    @classmethod
    @abc.abstractmethod
    def misfit(cls, entry: AnyEntry, header: AnyHeader, dense: AnyEntry | None) -> str | None:
        """Return why an entry cannot be in a table with this header and this dense probe; None where it can."""

    def __contains__(self, probe: Any) -> bool:
        return probe.key in {entry.key for entry in self.all_entries if entry.is_fitted}

    @property
    def all_entries(self) -> tuple[AnyEntry, ...]:
        """All entries, those of the partners included."""
        return (*self.entries, *(entry for partner in self.partners for entry in partner.entries))

    def with_entries(self: AnyTable, entries: Iterable[AnyEntry]) -> AnyTable:
        """Return the table with more entries, which replace earlier ones of the same probes."""
        added = tuple(entries)
        again = {entry.key for entry in added}
        return replace(self, entries=(*(one for one in self.entries if one.key not in again), *added))

    def caveats(self) -> tuple[str, ...]:
        """Return what a reader of the table's costs must know of how they were measured."""
        return caveats_of(self.all_entries)

    def write(self, path: Path) -> None:
        """Write the file as a whole, so that a kill never leaves half a line, and the partners into files beside it."""
        for number, partner in enumerate(self.partners, start=2):
            partner.write(partner_path(path, number))
        lines = [{**encode(self.header), "type": type(self).__name__}, *map(encode, self.entries)]
        with written_aside(path) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")

    @classmethod
    def read(cls: type[AnyTable], path: Path) -> AnyTable:
        """Read a table and its partners. Raises InvalidInput, naming the line, where one is damaged."""
        header, entries = cls._read_lines(path)
        dense = next((one for one in entries if one.key[0] == "dense"), None)
        cls._require_consistent(header, entries, dense=dense, source=str(path))
        partners = []
        for other in _partner_paths(path):
            theirs, measured = cls._read_lines(other)
            if theirs.subject != header.subject:
                raise InvalidInput(f"{other}: line 1 is of another model, workload or precisions than {path}")
            cls._require_consistent(theirs, measured, dense=dense, source=str(other))
            partners.append(cls(theirs, tuple(measured)))
        return cls(header, tuple(entries), tuple(partners))

    @classmethod
    def _read_lines(cls, path: Path) -> tuple[Any, list[Any]]:
        """Return the header and the entries of one device's file. Raises InvalidInput."""
        if not path.exists():
            raise InvalidInput(f"{path}: no such latency table; measure one with dilap-profile")
        lines = read_text(path).split("\n")
        if lines.pop():  # what follows the last newline
            raise InvalidInput(f"{path}: line {len(lines) + 1} is cut off")
        documents = [parse_object(line, source=f"{path}: line {number}") for number, line in enumerate(lines, start=1)]
        if not documents or documents[0].get("type") != cls.__name__:
            raise InvalidInput(f"{path}: line 1 is not the header of a latency table")
        protocol = documents[0].get("protocol")
        if isinstance(protocol, dict) and "lead_in_seconds" not in protocol:
            raise InvalidInput(
                f"{path}: it was measured by an earlier DiLAP, which timed models right after others, when the caches "
                "held less of them than in use: measure a new one with dilap-profile"
            )
        header = decode(cls.HEADER, {**documents[0], "type": cls.HEADER.__name__}, source=f"{path}: line 1")
        return header, [
            decode(cls.ENTRY, document, source=f"{path}: line {number}")
            for number, document in enumerate(documents[1:], start=2)
        ]

    @classmethod
    def _require_consistent(
        cls, header: AnyHeader, entries: Sequence[AnyEntry], *, dense: AnyEntry | None, source: str
    ) -> None:
        """Raise InvalidInput, naming the line, for an entry of another model, or one that is there twice."""
        seen: set[tuple[object, ...]] = set()
        for number, entry in enumerate(entries, start=2):
            reason = cls.misfit(entry, header, dense)
            if reason is None and entry.key in seen:
                reason = f"its probe of role {entry.key[0]} is in the table twice"
            if reason is not None:
                raise InvalidInput(f"{source}: line {number}: {reason}; measure the table again with dilap-profile")
            seen.add(entry.key)


def partner_path(path: Path, number: int) -> Path:
    """Return where the table of the `number`-th device of a kind lies, beside the first one's."""
    return path.with_name(f"{path.stem}.{number}{path.suffix}")


def _partner_paths(path: Path) -> Iterator[Path]:
    for number in itertools.count(2):
        if not partner_path(path, number).exists():
            return
        yield partner_path(path, number)

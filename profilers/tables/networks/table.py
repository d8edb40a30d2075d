"""Latency tables of networks: raw samples of narrower networks; every cost is derived on reading."""

from dataclasses import asdict, dataclass, replace
from typing import ClassVar

from dilap.core.errors import Mismatch
from dilap.core.graph import Network
from dilap.core.measurement import Fingerprint
from dilap.core.workload import Statistic, Workload
from dilap.profilers.tables.networks.entries import NetworkEntry, named
from dilap.profilers.tables.networks.fit import fit
from dilap.profilers.tables.networks.model import NetworkLatency, NetworkObservation
from dilap.profilers.tables.record import Header, RecordedTable
from dilap.profilers.tables.samples import dense_seconds, sentinel_seconds

_UNUSED = ("prompt_tokens", "context")  # of the workload of a forward pass


@dataclass(frozen=True, kw_only=True)
class NetworkTableHeader(Header):
    """What holds for all entries, and the dense network's shape."""

    VERSION: ClassVar[int] = 1

    network: Network

    def __post_init__(self) -> None:
        if self.workload.phase != "forward":
            raise ValueError(f"a network is timed in a forward pass, and the workload is {self.workload.describe()}")
        if not self.network.groups or not self.network.layers:
            raise ValueError("the network has no groups whose widths could differ, or no layers")

    @property
    def subject(self) -> object:
        return self.network, self.workload


@dataclass(frozen=True)
class NetworkTable(RecordedTable[NetworkTableHeader, NetworkEntry]):
    """The table of a network, whose probes have fewer units in some of its groups."""

    HEADER, ENTRY = NetworkTableHeader, NetworkEntry

    @classmethod
    def misfit(cls, entry: NetworkEntry, header: NetworkTableHeader, dense: NetworkEntry | None) -> str | None:  # noqa: ARG003
        return entry.misfit(header.network)

    def require_usable(self, *, fingerprint: Fingerprint, workload: Workload, network: Network, backend: str) -> None:
        """Raise Mismatch, naming every field that differs, where the table was made for something else."""
        header, theirs = self.header, asdict(workload)
        differences = [] if header.backend == backend else [f"backend: {header.backend} / {backend}"]
        differences += header.fingerprint.differences(fingerprint)
        differences += [
            f"workload {name}: {value} / {theirs[name]}"
            for name, value in asdict(header.workload).items()
            if value != theirs[name] and name not in _UNUSED
        ]
        differences += [f"network {name} differ" for name in _shape_differences(header.network, network)]
        if differences:
            raise Mismatch(
                f"the latency table was measured for something else (table / here): {'; '.join(differences)}; "
                "measure one with dilap-profile"
            )

    def model(self, statistic: Statistic = "p50") -> NetworkLatency:
        """Return the costs fitted to the entries that count. Raises InvalidInput where a necessary probe is missing.

        For p90 the hold-out errors are those of the median too: p90 is the median times one factor for the tail, which
        no hold-out plan tests.
        """
        own, *others = [[e for e in one.entries if e.is_fitted] for one in (self, *self.partners)]
        observations = self._observations(own, statistic)
        for theirs in others if own else ():
            scale = sentinel_seconds(own) / sentinel_seconds(theirs) if theirs else 1.0
            scaled = self._observations(theirs, statistic)
            observations += [replace(one, seconds=one.seconds * scale) for one in scaled]
        model = fit(observations, network=self.header.network, workload=self.header.workload)
        return replace(model, caveats=self.caveats())

    def _observations(self, entries: list[NetworkEntry], statistic: Statistic) -> list[NetworkObservation]:
        """Return the entries as observations, with the machine's drift divided out by the sentinels."""
        if not entries:
            return []
        reference = dense_seconds(entries, statistic)
        return [
            NetworkObservation(
                role=one.role,
                counts=named(self.header.network, one.counts),
                seconds=one.ratio.value * reference,
                half_width=one.ratio.half_width,
            )
            for one in entries
        ]


def _shape_differences(mine: Network, theirs: Network) -> list[str]:
    """Return the names of what differs between the shapes of two networks, whatever they are called."""
    return [
        name
        for name in ("input_size", "tensors", "layers", "groups", "branches")
        if getattr(mine, name) != getattr(theirs, name)
    ]

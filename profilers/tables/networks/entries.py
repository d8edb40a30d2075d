"""Probes of networks, and the entries of a network's latency table, which are measured probes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from dilap.core.graph import Network
from dilap.profilers.tables.samples import Samples

Role = Literal["dense", "even", "random", "holdout"]  # an `even` probe keeps the same share of every group


@dataclass(frozen=True, kw_only=True)
class NetworkProbe:
    """A network to measure: how many units are left in every group, in the network's order.

    `role` says what its entry in the table is for.
    """

    role: Role
    counts: tuple[int, ...]

    @property
    def key(self) -> tuple[object, ...]:
        return self.role, self.counts


@dataclass(frozen=True, kw_only=True)
class NetworkEntry(Samples):
    """One measured probe."""

    VERSION: ClassVar[int] = 1

    role: Role
    counts: tuple[int, ...]

    @property
    def key(self) -> tuple[object, ...]:
        return self.role, self.counts

    def misfit(self, network: Network) -> str | None:
        """Return why this is no probe of that network; None where it is."""
        if len(self.counts) != len(network.groups):
            return f"it has {len(self.counts)} groups, and the network {len(network.groups)}"
        for group, count in zip(network.groups, self.counts, strict=True):
            if not 0 <= count <= group.num_units:
                return f"it has {count} units of {group.name}, and the network {group.num_units}"
        try:
            network.require_network(named(network, self.counts))
        except ValueError as error:
            return str(error)
        is_dense = self.counts == dense_counts(network)
        if is_dense != (self.role == "dense"):
            return f"a probe of role {self.role} {'has' if is_dense else 'lacks'} all units of the network"
        return None


def dense_counts(network: Network) -> tuple[int, ...]:
    """Return the number of units of every group."""
    return tuple(group.num_units for group in network.groups)


def named(network: Network, counts: tuple[int, ...]) -> Mapping[str, int]:
    """Return the units that are left by the names of their groups."""
    return {group.name: count for group, count in zip(network.groups, counts, strict=True)}

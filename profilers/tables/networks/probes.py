"""Build the latency table of a network from probes: narrower networks that pass through the real exporter."""

import random
from collections.abc import Callable, Mapping, Sequence
from math import gcd, prod
from pathlib import Path

from dilap.core.graph import Network
from dilap.core.groups import Group
from dilap.core.measurement import Measurement
from dilap.core.workload import Workload
from dilap.profilers.profiler import Profiler
from dilap.profilers.protocol import TABLE, Protocol
from dilap.profilers.tables.measuring import ProbeKind, Progress, fill
from dilap.profilers.tables.networks.entries import NetworkEntry, NetworkProbe, dense_counts, named
from dilap.profilers.tables.networks.table import NetworkTable, NetworkTableHeader
from dilap.profilers.tables.resuming import alone, shares_of

WriteProbe = Callable[[Mapping[str, int], Path], Path]
_SHARES = (0.25, 0.5, 0.75)  # of units that the `even` probes keep
_SPREAD = 0.25  # how far the share of a group lies from that of its plan in plans like those of a search
_REMOVED = (0.0, 0.15, 0.4)  # shares of the residual branches that random plans remove


def build_network_table(
    network: Network,
    *,
    profiler: Profiler,
    helpers: Sequence[Profiler] = (),
    write_probe: WriteProbe,
    workload: Workload,
    path: Path,
    multiple: int = 8,
    num_random: int = 24,
    num_holdout: int = 12,
    seed: int = 0,
    protocol: Protocol = TABLE,
    progress: Progress | None = None,
) -> NetworkTable:
    """Measure a latency table into the file `path`, or what is missing in it; return the table.

    `write_probe` gets the units left in every group, and a folder that is not there yet; it exports a network with
    these widths, whatever its weights, into that folder and returns the model's file. The same arguments give the same
    probes; their channels are multiples of `multiple`, where groups have as many. `helpers` are other devices of the
    same kind, which share the work. If another process measures the same table, its end is waited for. Raises Mismatch
    where `path` was measured for something else.
    """

    def start(profiler: Profiler, created: str) -> NetworkTable:
        return NetworkTable(
            NetworkTableHeader(
                fingerprint=profiler.fingerprint(),
                workload=workload,
                network=network,
                backend=profiler.backend,
                protocol=protocol,
                created=created,
            )
        )

    kind = ProbeKind(
        dense=NetworkProbe(role="dense", counts=dense_counts(network)),
        write=lambda probe, folder: write_probe(named(network, probe.counts), folder),
        entry=_entry,
    )
    probes = list_network_probes(network, multiple=multiple, num_random=num_random, num_holdout=num_holdout, seed=seed)
    with alone(path, progress):
        shares = shares_of([profiler, *helpers], path, start=start, resume=_resumed)
        return fill(shares, probes, kind=kind, progress=progress)


def _resumed(path: Path, header: NetworkTableHeader) -> NetworkTable:
    table = NetworkTable.read(path)
    table.require_usable(
        fingerprint=header.fingerprint, workload=header.workload, network=header.network, backend=header.backend
    )
    return table


def _entry(probe: NetworkProbe, measurement: Measurement, sentinel_ns: tuple[int, ...]) -> NetworkEntry:
    return NetworkEntry(
        role=probe.role,
        counts=probe.counts,
        samples_ns=measurement.samples_ns,
        sentinel_ns=sentinel_ns,
        status=measurement.status,
        note=measurement.note,
        forced=measurement.forced,
    )


def list_network_probes(
    network: Network, *, multiple: int, num_random: int, num_holdout: int, seed: int
) -> list[NetworkProbe]:
    """Return the probes of a table, the dense one first.

    Most change all widths at once, because every probe then tells of all layers. In a simulation of EfficientNet-Lite0
    on four devices (padded channels, kernels that small layers do not fill, caches, arithmetic that hides transfers)
    with 1 % of noise on every probe, plans that were held out are off by

        1.1 % (median) and 4.3 % (worst of 60) with 3 even probes and 24 random plans,
        1.2 % and 4.9 % with 24 random plans alone,
        1.4 % and 6.1 % with 3 even probes and 16 random plans,
        1.1 % and 4.8 % with 6 probes that narrow one resolution, 3 even ones and 18 random plans,
        3.8 % and 13 % with one probe for each of the 24 groups instead, 1.6 % and 7.0 % with 8 random plans more,
        0.9 % and 3.5 % with 80 random plans.

    With 2 % of noise it is 1.9 % and 7.0 % for the first. A device on which some widths are slower than wider ones is
    predicted only at multiples that avoid them: 4 % and 20 % with multiples of 8 where kernels need 16, 1.1 % and 4.5 %
    with multiples of 16.
    """
    levels, dense = [widths_of(group, multiple) for group in network.groups], dense_counts(network)
    evens = dict.fromkeys(tuple(_nearest(widths, share * widths[-1]) for widths in levels) for share in _SHARES)
    evens.pop(dense, None)  # small groups have few widths
    plans = _drawn(network, levels, num_random + num_holdout, known=[dense, *evens], draw=random.Random(seed))
    # where there are fewer plans than asked for, the held-out ones keep their share: no budget is claimed without them
    num_fitted = len(plans) * num_random // max(1, num_random + num_holdout)
    return [
        NetworkProbe(role="dense", counts=dense),
        *(NetworkProbe(role="even", counts=counts) for counts in evens),
        *(NetworkProbe(role="random", counts=counts) for counts in plans[:num_fitted]),
        *(NetworkProbe(role="holdout", counts=counts) for counts in plans[num_fitted:]),
    ]


def _drawn(
    network: Network,
    levels: Sequence[Sequence[int]],
    number: int,
    *,
    known: Sequence[tuple[int, ...]],
    draw: random.Random,
) -> list[tuple[int, ...]]:
    """Return so many different plans that are not known, or fewer, because small networks may not have as many."""
    found = dict.fromkeys(known)
    for attempt in range(20 * number):
        if len(found) == len(known) + number:
            break
        found.setdefault(_random_plan(network, levels, draw, like_found=attempt % 2 == 0))
    return list(found)[len(known) :]


def widths_of(group: Group, multiple: int) -> list[int]:
    """Return the numbers of units of a group whose channels are multiples of `multiple`, and all of them, ascending."""
    channels = prod(group.members[0].grid) // group.num_units
    step = multiple // gcd(multiple, channels)
    return sorted({*range(step, group.num_units, step), group.num_units})


def _random_plan(
    network: Network, levels: Sequence[Sequence[int]], draw: random.Random, *, like_found: bool
) -> tuple[int, ...]:
    """Return a plan of random widths, with some residual branches removed.

    The widths are any with the same probability, or with `like_found` around one share of all units, as in the plans
    that a search finds.
    """
    share = draw.uniform(0.3, 1)
    counts = {}
    for group, widths in zip(network.groups, levels, strict=True):
        around = min(1.0, max(0.1, share + draw.uniform(-_SPREAD, _SPREAD)))
        counts[group.name] = _nearest(widths, around * widths[-1]) if like_found else draw.choice(widths)
    removed = draw.choice(_REMOVED)
    for branch in network.branches:
        if draw.random() < removed:
            counts |= dict.fromkeys(branch.groups, 0)
    return tuple(counts.values())


def _nearest(widths: Sequence[int], wanted: float) -> int:
    return min(widths, key=lambda width: abs(width - wanted))

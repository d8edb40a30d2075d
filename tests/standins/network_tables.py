"""A made-up network and latency tables of it, with fabricated seconds."""

import random
from collections.abc import Callable, Mapping

from dilap.core.graph import Branch, Layer, Network
from dilap.core.groups import Group, Member
from dilap.core.workload import Workload
from dilap.profilers.protocol import TABLE
from dilap.profilers.tables.networks.entries import NetworkEntry, NetworkProbe, dense_counts, named
from dilap.profilers.tables.networks.probes import list_network_probes
from dilap.profilers.tables.networks.table import NetworkTable, NetworkTableHeader
from dilap.profilers.tables.networks.works import Kind, amount, layer_works
from standins.fabricated import FINGERPRINT

Seconds = Callable[[Mapping[str, int]], float]


def layer(name: str, side: int, *, num_groups: int = 1, stride: int = 1) -> Layer:
    return Layer(
        name=name,
        kind="convolution",
        stride=(stride, stride),
        num_groups=num_groups,
        output_sizes=((side, side),),
    )


def group(name: str, num_units: int, *places: tuple[str, int] | tuple[str, int, int]) -> Group:
    """A group at (tensor, axis) or (tensor, axis, offset)."""
    members = tuple(
        Member(tensor=f"{place[0]}.weight", axis=place[1], grid=(num_units,), offset=place[2] if len(place) > 2 else 0)
        for place in places
    )
    return Group(name=name, num_units=num_units, members=members)


# A depthwise convolution, a branch that can be removed, a concatenation (`joined` reads `stem` and `side`), and a
# convolution whose outputs are added to its inputs.
NETWORK = Network(
    name="tiny",
    input_size=(3, 32, 32),
    tensors={
        "stem.weight": (24, 3, 3, 3),
        "depthwise.weight": (24, 1, 3, 3),
        "expand.weight": (96, 24, 1, 1),
        "project.weight": (24, 96, 1, 1),
        "side.weight": (12, 24, 1, 1),
        "joined.weight": (64, 36, 1, 1),
        "loop.weight": (64, 64, 3, 3),
        "head.weight": (7, 64),
    },
    layers=(
        layer("stem", 16, stride=2),
        layer("depthwise", 16, num_groups=24),
        layer("expand", 16),
        layer("project", 16),
        layer("side", 16),
        layer("joined", 8, stride=2),
        layer("loop", 8),
        Layer(name="head", kind="linear"),
    ),
    groups=(
        group("stem", 24, ("stem", 0), ("depthwise", 0), ("expand", 1), ("project", 0), ("side", 1), ("joined", 1)),
        group("expand", 96, ("expand", 0), ("project", 1)),
        group("side", 12, ("side", 0), ("joined", 1, 24)),
        group("joined", 64, ("joined", 0), ("loop", 0), ("loop", 1), ("head", 1)),
    ),
    branches=(Branch(name="project", groups=("expand",), modules={"expand": (), "project": ()}, last="project"),),
)
DENSE = dict(named(NETWORK, dense_counts(NETWORK)))
WORKLOAD = Workload(phase="forward", precision="f32", threads=2)
HEADER = NetworkTableHeader(
    fingerprint=FINGERPRINT,
    workload=WORKLOAD,
    network=NETWORK,
    backend="onnxruntime",
    protocol=TABLE,
    created="2026-01-01T00:00:00+00:00",
)
FIXED = 2e-4
SPEEDS: dict[Kind, float] = {"operations": 2e-11, "reads": 2e-10, "writes": 3e-10, "weights": 1e-10, "launch": 5e-6}
DEPTHWISE = 6.0  # times slower
EFFICIENCY = {one.name: 1 + 0.2 * (-1) ** index for index, one in enumerate(NETWORK.layers)}


def in_reach(counts: Mapping[str, int]) -> float:
    """Seconds on a device whose kernels fill 8 channels, all layers of a kernel at the same speeds."""
    return FIXED + sum(
        (DEPTHWISE if one.kernel == "depthwise" else 1) * SPEEDS[kind] * amount(work, counts)
        for one in layer_works(NETWORK, multiple=8)
        for kind, work in one.works.items()
    )


def out_of_reach(counts: Mapping[str, int]) -> float:
    """Seconds on a device that no sum of products describes.

    Its kernels fill 16 channels, layers have efficiencies of their own, and computing hides most of what is moved.
    """
    total = FIXED
    for one in layer_works(NETWORK, multiple=16):
        amounts = {kind: amount(work, counts) for kind, work in one.works.items()}
        if not amounts["launch"]:
            continue
        computed = SPEEDS["operations"] * (amounts["operations"] + 10 * amounts["writes"])
        moved = sum(SPEEDS[kind] * amounts[kind] for kind in ("reads", "writes", "weights"))
        total += EFFICIENCY[one.layer] * (computed**3 + moved**3) ** (1 / 3) + SPEEDS["launch"]
    return total


def entry(probe: NetworkProbe, seconds: Seconds, *, noise: float = 0.0, drift: float = 1.0) -> NetworkEntry:
    center = seconds(named(NETWORK, probe.counts)) * drift * (1 + noise * random.Random(str(probe.key)).gauss(0, 1))
    return NetworkEntry(
        role=probe.role,
        counts=probe.counts,
        samples_ns=tuple(round(center * 1e9 * (1 + 0.001 * (step - 7))) for step in range(15)),
        sentinel_ns=(round(seconds(DENSE) * drift * 1e9),) * 15,
        status="ok",
    )


def probes_of(network: Network = NETWORK, *, seed: int = 0) -> list[NetworkProbe]:
    return list_network_probes(network, multiple=8, num_random=24, num_holdout=12, seed=seed)


def measured_table(seconds: Seconds = in_reach, *, noise: float = 0.0, drifting: bool = False) -> NetworkTable:
    return NetworkTable(HEADER).with_entries(
        entry(probe, seconds, noise=noise, drift=1 + 0.1 * (index // 4) * drifting)
        for index, probe in enumerate(probes_of())
    )

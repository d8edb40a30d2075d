"""Probes, which are models to measure, and the entries of a latency table, which are measured probes."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from dilap.core.shape import PRECISION_BITS, UNMIXED, Architecture, LayerWidths
from dilap.profilers.tables.samples import Samples

# `attention` and `ffn` probes have one sublayer of all layers in another width or precision, `precision` probes all
# sublayers in another precision, `head` probes only the head.
Role = Literal["dense", "depth", "attention", "ffn", "precision", "head", "random", "holdout"]
Run = tuple[int, int, int, int]  # layers in a row, heads, KV heads, channels
RunPrecisions = tuple[str, str]  # of the attention and of the feed-forward network of these layers


@dataclass(frozen=True, kw_only=True)
class Probe:
    """A model to measure; `role` says what its entry in the table is for.

    `precisions` has, by the names of blocks and of the head, those of the parts that are not in the workload's own.
    """

    role: Role
    widths: tuple[LayerWidths, ...]
    precisions: Mapping[str, str] = field(default_factory=dict)

    @property
    def key(self) -> tuple[object, ...]:
        """What tells the probe from others."""
        return (
            self.role,
            runs_of(self.widths, self.precisions),
            run_precisions(self.widths, self.precisions),
            self.precisions.get("head", ""),
        )


@dataclass(frozen=True, kw_only=True)
class TableEntry(Samples):
    """One measured probe.

    `precisions` has those of every run of layers, and none where all are in the workload's own; an empty one is the
    workload's own.
    """

    VERSION: ClassVar[int] = 2  # 1 had no precisions: every part was in the workload's own

    role: Role
    runs: tuple[Run, ...]
    precisions: tuple[RunPrecisions, ...] = ()
    head: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.runs or min(run[0] for run in self.runs) < 1:
            raise ValueError("every run has at least one layer")
        for _, heads, kv_heads, channels in self.runs:
            LayerWidths(num_heads=heads, num_kv_heads=kv_heads, num_channels=channels)
        if self.precisions and len(self.precisions) != len(self.runs):
            raise ValueError(f"it has {len(self.runs)} runs of layers, and precisions of {len(self.precisions)}")
        if odd := sorted(self.precisions_used - {*PRECISION_BITS}):
            raise ValueError(f"unknown precision {odd[0]!r:.80}")

    @property
    def num_layers(self) -> int:
        return sum(run[0] for run in self.runs)

    @property
    def precisions_used(self) -> set[str]:
        """The precisions in which some part is, beside the workload's own."""
        return {self.head, *itertools.chain.from_iterable(self.precisions)} - {""}

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
        if self.role in ("random", "holdout"):
            return None
        has_dense_layers = {run[1:] for run in self.runs} == {runs_of([dense])[0][1:]}
        is_narrower = self.role in ("attention", "ffn")
        if not has_dense_layers and not is_narrower:
            return f"a probe of role {self.role} lacks the model's own layers"
        if has_dense_layers and is_narrower and not self.precisions_used:
            return f"a probe of role {self.role} has the model's own layers"
        return None if self._has_precisions_of_role else f"a probe of role {self.role} does not have these precisions"

    @property
    def _has_precisions_of_role(self) -> bool:
        """Whether its precisions, the same in all layers, are those that a probe of its role can have."""
        if self.role == "head":
            return bool(self.head) and not self.precisions
        name = next(iter(self.precisions_used), "")
        pairs = {"attention": (name, ""), "ffn": ("", name), "precision": (name, name)}
        is_changed = bool(name) and {*self.precisions} == {pairs.get(self.role)}
        return not self.head and (is_changed or (self.role != "precision" and not self.precisions))

    @property
    def key(self) -> tuple[object, ...]:
        """What tells the probe from others, as `Probe.key`: what it was measured for, its layers and precisions."""
        return self.role, self.runs, self.precisions, self.head

    @property
    def widths(self) -> tuple[LayerWidths, ...]:
        return tuple(
            LayerWidths(num_heads=heads, num_kv_heads=kv_heads, num_channels=channels)
            for count, heads, kv_heads, channels in self.runs
            for _ in range(count)
        )

    @property
    def named_precisions(self) -> dict[str, str]:
        """The precisions, by the names of blocks and of the head, of the parts that are not in the workload's own."""
        of_layers = (
            pair
            for (count, *_), pair in zip(self.runs, self.precisions, strict=False)  # there may be none
            for _ in range(count)
        )
        found = {
            f"layers.{index}.{kind}": precision
            for index, pair in enumerate(of_layers)
            for kind, precision in zip(("attention", "ffn"), pair, strict=True)
        }
        return {name: precision for name, precision in {**found, "head": self.head}.items() if precision}


def runs_of(widths: Sequence[LayerWidths], precisions: Mapping[str, str] = UNMIXED) -> tuple[Run, ...]:
    """Return the layers as runs: equal layers in a row become one run with their number."""
    return tuple((count, *level) for count, level, _ in _runs(widths, precisions))


def run_precisions(widths: Sequence[LayerWidths], precisions: Mapping[str, str]) -> tuple[RunPrecisions, ...]:
    """Return the precisions of every run of layers; none where all are in the workload's own."""
    found = tuple(pair for _, _, pair in _runs(widths, precisions))
    return found if any(map(any, found)) else ()


def _runs(
    widths: Sequence[LayerWidths], precisions: Mapping[str, str]
) -> list[tuple[int, tuple[int, int, int], RunPrecisions]]:
    """Return for every run of equal layers their number, their widths and their precisions."""
    layers = [
        (
            (layer.num_heads, layer.num_kv_heads, layer.num_channels),
            (precisions.get(f"layers.{index}.attention", ""), precisions.get(f"layers.{index}.ffn", "")),
        )
        for index, layer in enumerate(widths)
    ]
    return [(len(list(same)), *layer) for layer, same in itertools.groupby(layers)]

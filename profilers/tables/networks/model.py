"""The fitted latency of every group of a network, and of every two that meet in a layer, in every width."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dilap.core.costs import Setting, undominated
from dilap.core.errors import InvalidInput
from dilap.core.groups import Block
from dilap.core.workload import Workload
from dilap.profilers.tables.networks.costs import NetworkCosts
from dilap.profilers.tables.networks.works import amount


@dataclass(frozen=True, kw_only=True)
class NetworkObservation:
    """One measured network: its drift-corrected seconds, and the relative half-width of their interval.

    `counts` are the units that are left, by the names of all groups.
    """

    role: str
    counts: Mapping[str, int]
    seconds: float
    half_width: float


@dataclass(frozen=True, kw_only=True)
class Fit:
    """How costs are fitted: the channels that kernels are taken to fill, and how freely the speeds of layers differ.

    With `freedom` 0 all layers of a kernel have the same speeds. With 1, a layer that is slower by 100 % weighs as much
    as a probe that is missed by 1 %.
    """

    multiple: int
    freedom: float

    def __str__(self) -> str:
        return f"multiples of {self.multiple} channels, speeds of layers free by {self.freedom:.0%}"


@dataclass(frozen=True, kw_only=True)
class NetworkLatency(NetworkCosts):
    """Predicts the seconds of a network with any widths on one device (`dilap.core.costs.Costs`).

    `terms` are in seconds, by layer, and under "" what no layer takes. `method` says how they were found, and
    `cross_validation` the relative error (root of the mean square) of every way that was tried on plans that it has not
    seen. `noise_seconds` is the difference of two widths of one block that the measurements cannot tell from none,
    `holdout` are the models that the fit has not seen, and `caveats` what a reader must know of how the probes were
    measured.
    """

    workload: Workload
    method: str
    cross_validation: Mapping[str, float]
    noise_seconds: float
    holdout: tuple[NetworkObservation, ...]

    def layer_seconds(self, widths: Mapping[str, int]) -> dict[str, float]:
        """Return the seconds of every layer, and under "" of what no layer takes."""
        counts = self.network.widths_at(widths)
        return {layer: amount(work, counts) for layer, work in self.terms.items()}

    @property
    def dense_seconds(self) -> float:
        """Seconds of the network that keeps all widths."""
        return self.predict({})

    def holdout_errors(self) -> list[float]:
        """Return the absolute relative errors on the plans that took no part in the fit."""
        return [abs(self.predict(one.counts) / one.seconds - 1) for one in self.holdout]

    def cheaper(self, block: Block, settings: Sequence[Setting]) -> list[Setting]:
        """Return the settings that are measurably faster beside full neighbours; see `Costs.cheaper`."""
        ordered = sorted(dict.fromkeys(settings), key=lambda setting: -setting[0][0])
        kept = [ordered[0]]
        step = max(self.noise_seconds, 0.005 * self.beside_full_ones(block, ordered[0]))
        for setting in ordered[1:]:
            if self.beside_full_ones(block, kept[-1]) - self.beside_full_ones(block, setting) > step:
                kept.append(setting)
        return undominated(kept, cost=functools.partial(self.beside_full_ones, block))

    def require_own(self, precision: str) -> None:
        """Raise InvalidInput for a precision in which the network was not measured."""
        if precision not in ("", self.workload.precision):
            raise InvalidInput(
                f"nothing is known of the latency of the network in {precision}: its table is of"
                f" {self.workload.precision}, and every part of it has that precision"
            )

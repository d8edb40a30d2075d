"""Fit what a unit of work takes, in every layer of a network, to measurements of whole networks.

Seconds are linear in the speeds, so that these are found by non-negative least squares, in two steps: first the speeds
that all layers of a kernel share, drawn to those of a plain device; then how many times slower than these each layer
is, drawn to once the more, the less freedom it has. Cross-validation chooses the channels that kernels fill, and then
the freedom. In the simulation of `list_network_probes`, layers that have speeds of their own for every kind of work are
predicted no better.
"""

import statistics
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from dilap.core.errors import InvalidInput
from dilap.core.graph import Network
from dilap.core.workload import Workload
from dilap.profilers.tables.networks.model import Fit, NetworkLatency, NetworkObservation
from dilap.profilers.tables.networks.works import KINDS, Kind, Term, Work, amount, in_seconds, layer_works

Vector = NDArray[np.float64]
_MULTIPLES, _FREEDOMS = (1, 8, 16, 32), (0.1, 0.3, 1.0)
_FOLDS = 5
# A plain device, whose speeds only have to be in proportion: as long as it reads or writes one number, it multiplies
# and adds 20 times; an operator starts as fast as it does 300,000 of those.
_PLAIN: Mapping[Kind, float] = {"operations": 1.0, "reads": 20.0, "writes": 20.0, "weights": 20.0, "launch": 3e5}
# What a deviation of speeds weighs as much as: the relative error of a measured network, beyond half the width of its
# interval. No fit is closer, so that better known probes do not weigh more.
_ERROR = 0.01
_TRUST = 10.0  # how far the shared speeds may be from those of the plain device before that weighs as much, as a share


def fit(observations: Sequence[NetworkObservation], *, network: Network, workload: Workload) -> NetworkLatency:
    """Fit the costs of all widths. Raises InvalidInput without the dense probe, or without any other."""
    used = [one for one in observations if one.role != "holdout"]
    if not any(one.role == "dense" for one in used) or len(used) < 2:
        raise InvalidInput(
            "the latency table has no dense probe yet, or nothing beside it, that was measured without other load on"
            " the cores; stop other programs and resume its measurement with dilap-profile"
        )
    designs = {multiple: _Design(network, multiple, used) for multiple in _MULTIPLES}
    errors = {Fit(multiple=one, freedom=0.0): design.cross_validated(0.0) for one, design in designs.items()}
    multiple = min(errors, key=lambda one: errors[one]).multiple
    design = designs[multiple]
    errors |= {Fit(multiple=multiple, freedom=one): design.cross_validated(one) for one in _FREEDOMS}
    best = min(errors, key=lambda one: errors[one])
    noise = 2**0.5 * statistics.median(one.half_width * one.seconds for one in used)  # of a difference of two
    return NetworkLatency(
        network=network,
        workload=workload,
        method=str(best),
        terms=design.terms(design.speeds(np.arange(len(used)), best.freedom)),
        cross_validation={str(one): error for one, error in errors.items()},
        noise_seconds=noise / len(network.groups),  # spread over the blocks
        holdout=tuple(one for one in observations if one.role == "holdout"),
    )


class _Design:
    """The works of all layers in all measured networks, as the matrix of a linear model of their seconds.

    Its columns are the constant and then every kind of work of every layer.
    """

    def __init__(self, network: Network, multiple: int, observations: Sequence[NetworkObservation]) -> None:
        self._works = layer_works(network, multiple=multiple)
        self._columns = [(one, kind) for one in self._works for kind in KINDS]
        self._seconds = np.array([one.seconds for one in observations])
        rows = [self._row(network.widths_at(one.counts)) for one in observations]
        dense = next(index for index, one in enumerate(observations) if one.role == "dense")
        self._matrix = np.array(rows) / self._seconds[:, None]  # errors are relative ones
        self._trust = _ERROR / np.hypot(_ERROR, [one.half_width for one in observations])
        plain = np.array([0.0, *(_PLAIN[kind] for _, kind in self._columns)])
        scale = self._seconds[dense] / (rows[dense] @ plain)
        self._plain = plain * scale
        self._plain[0] = 0.01 * self._seconds[dense]
        self._shared = _members([(one.kernel, kind) for one, kind in self._columns])
        self._layers = _members([one.layer for one, _ in self._columns])

    def _row(self, counts: Mapping[str, int]) -> Vector:
        return np.array([1.0, *(amount(one.works[kind], counts) for one, kind in self._columns)])

    def speeds(self, rows: NDArray[np.int64], freedom: float) -> Vector:
        """Return the constant, and what a unit of every work takes, fitted to some of the measured networks."""
        matrix, trust = self._matrix[rows], self._trust[rows]
        plain = self._plain @ self._shared / self._shared.sum(axis=0)
        shared = _drawn(matrix @ self._shared, trust, middle=plain, width=_TRUST * plain)
        speeds = self._shared @ shared
        if not freedom:
            return speeds
        alike = np.ones(self._layers.shape[1])
        slowness = _drawn(matrix @ (speeds[:, None] * self._layers), trust, middle=alike, width=freedom * alike)
        return np.asarray(speeds * (self._layers @ slowness), dtype=np.float64)

    def cross_validated(self, freedom: float) -> float:
        """Return the relative error (root of the mean square) on networks that the fit has not seen, fold by fold.

        Networks that are known badly weigh less.
        """
        folds = np.arange(len(self._seconds)) % _FOLDS
        errors = np.zeros(len(folds))
        for fold in range(_FOLDS):
            speeds = self.speeds(np.flatnonzero(folds != fold), freedom)
            errors[folds == fold] = self._matrix[folds == fold] @ speeds - 1
        return float(np.sqrt(np.average(errors**2, weights=self._trust**2)))

    def terms(self, speeds: Vector) -> dict[str, Work]:
        """Return the seconds of every layer as terms, and of what no layer takes under ""."""
        by_layer = speeds[1:].reshape(len(self._works), len(KINDS))
        return {"": (Term(weight=float(speeds[0])),)} | {
            one.layer: in_seconds(one, dict(zip(KINDS, map(float, row), strict=True)))
            for one, row in zip(self._works, by_layer, strict=True)
        }


def _members(names: Sequence[object]) -> Vector:
    """Return which columns of works (rows) have the same name (columns), after the constant, which is alone."""
    different = list(dict.fromkeys(names))
    found = np.zeros((1 + len(names), 1 + len(different)))
    found[0, 0] = 1
    found[np.arange(len(names)) + 1, [1 + different.index(name) for name in names]] = 1
    return found


def _drawn(matrix: Vector, trust: Vector, *, middle: Vector, width: Vector) -> Vector:
    """Return the non-negative numbers with which every row of `matrix` comes closest to 1, drawn to `middle`.

    A deviation by `width` weighs as much as an error of _ERROR in one row whose `trust` is 1.
    """
    rows = np.vstack([trust[:, None] * matrix * width, _ERROR * np.eye(len(width))])
    found, _ = nnls(rows, np.concatenate([trust, _ERROR * middle / width]))
    return np.asarray(found * width, dtype=np.float64)

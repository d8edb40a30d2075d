"""What a search over measured levels gets, and what it returns."""

from collections.abc import Callable
from dataclasses import dataclass, field

from dilap.core.space import Space
from dilap.search.allocation import Config
from dilap.search.journal import Evaluator
from dilap.search.options import SearchOptions


def _silent(_: str) -> None:
    """Report nothing."""


@dataclass(frozen=True, kw_only=True)
class SearchTask:
    """The task to choose a config of `space` that costs at most `limit`.

    `report` takes a line for the log. `previous` is a result for a nearby limit, from which a search may start.
    """

    evaluator: Evaluator
    space: Space
    limit: float
    options: SearchOptions = field(default_factory=SearchOptions)
    report: Callable[[str], None] = _silent
    previous: "SearchResult | None" = None


@dataclass(frozen=True, kw_only=True)
class Round:
    """One round of the search: the limit, the config chosen for it, its KL as predicted and as it really is."""

    limit: float
    config: Config
    predicted_kl: float
    real_kl: float


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """The config chosen, with its real KL on the validation split.

    `curvature_scale` is the factor of the curvature with which the quadratic model predicts the real KL.
    """

    config: Config
    kl: float
    rounds: tuple[Round, ...] = ()
    curvature_scale: float = 1.0


Search = Callable[[SearchTask], SearchResult]

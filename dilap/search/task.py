"""What a search over measured levels gets, and what it returns."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import torch

from dilap.core.space import Space
from dilap.search.allocation import Config
from dilap.search.curvature import Curvature
from dilap.search.journal import Evaluator
from dilap.search.options import SearchOptions


class Answers(Protocol):
    """What a search asks of a model whose parts can be set to levels."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """The number of levels of every choice."""

    def kl(self, config: Sequence[int]) -> float:
        """Return how far the model at `config` is from the dense one, in the mean over the validation split."""

    def kls(self, config: Sequence[int]) -> torch.Tensor:
        """Return how far it is on every example of the validation split."""

    def curvature(self, config: Sequence[int], *, samples: int, seed: int) -> Curvature:
        """Return the quadratic model of that distance around `config`, from `samples` draws for every example."""


if TYPE_CHECKING:  # where nothing is said of a task, it is a decoder's
    import typing_extensions

    Asked_co = typing_extensions.TypeVar("Asked_co", bound=Answers, covariant=True, default=Evaluator)
else:
    Asked_co = TypeVar("Asked_co", covariant=True)


def _silent(_: str) -> None:
    """Report nothing."""


@dataclass(frozen=True, kw_only=True)
class SearchTask(Generic[Asked_co]):
    """The task to choose a config of `space` that costs at most `limit`.

    `distance` is the name, for the log, of how far a model is from the dense one; `report` takes a line for the log.
    `previous` is a result for a nearby limit, from which a search may start.
    """

    evaluator: Asked_co
    space: Space[Any]
    limit: float
    options: SearchOptions = field(default_factory=SearchOptions)
    distance: str = "KL"
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

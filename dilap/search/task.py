"""What a search over measured levels gets, and what it returns."""

from collections.abc import Callable
from dataclasses import dataclass, field

from dilap.core.space import Space
from dilap.search.allocation import Config, RelaxationOptions
from dilap.search.journal import Evaluator


def _silent(_: str) -> None:
    """Report nothing."""


@dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """Settings of DiLAP's search.

    The limits of its rounds are `step` of the dense latency apart. `label_samples` is how often labels are drawn for a
    quadratic model. `cross_terms` keeps interactions between sublayers in it; `caution` is the number of standard
    errors by which its slopes are taken to be worse than measured. `restarts` is the number of starts of the
    relaxation. `evaluations` is how many configs are scored by the real KL while polishing.
    """

    # Validation KL of SmolLM2-135M at 70 %, before the polish: two steps of 15 % 1.18, three of 10 % 0.95, six of 5 %
    # 0.99.
    step: float = 0.1
    label_samples: int = 2
    # Few interactions are kept, but they lower the KL on unseen text from 0.595 to 0.562 at 85 %, from 1.350 to 1.218
    # at 70 %, from 1.994 to 1.970 at 55 % (tools/bench_search, means of three seeds).
    cross_terms: bool = True
    # Validation KL of SmolLM2-135M at 70 %: 1.38 with one standard error, 1.18 with two.
    caution: float = 2.0
    restarts: int = 6
    # The polish lowers the KL on unseen text from 0.562 to 0.548 at 85 %, from 1.218 to 1.170 at 70 %, from 1.970 to
    # 1.905 at 55 % (tools/bench_search, means of three seeds).
    evaluations: int = 40
    seed: int = 0
    relaxation: RelaxationOptions = field(default_factory=RelaxationOptions)


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

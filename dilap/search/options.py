"""Settings of DiLAP's search and of its parts, apart from what carries them out, which imports torch for seconds."""

from dataclasses import dataclass, field
from typing import Literal

Order = Literal["wanda", "obs"]


@dataclass(frozen=True, kw_only=True)
class LibraryOptions:
    """Settings of `build_library`.

    The `order` `wanda` ranks units by weight times activation; `obs` (optimal brain surgery) removes first what costs
    the refitted output least. `ridge` is relative to the mean diagonal of the input covariance.
    """

    # KL of SmolLM2-135M on unseen text at 85 %, 70 % and 55 %: wanda 0.541, 1.331, 2.170, obs 0.591, 1.253, 1.963
    # (tools/bench_search --only "no swaps" --seeds 1).
    order: Order = "obs"
    ridge: float = 0.01
    batch_tokens: int = 2048


@dataclass(frozen=True, kw_only=True)
class RefitOptions:
    """Settings of the refit.

    A correction is the share of the error already in the residual stream that a sublayer is asked to undo. The
    `corrections` are tried in turn until one helps on validation text. `ridge` is the strength of the pull towards the
    library's projection, relative to the mean diagonal of the input covariance.
    """

    # KL of SmolLM2-135M at 70 % on unseen prose (two texts): without the refit 1.72 and 1.81; correction 0.5: 1.44 and
    # 1.57; correction 1: 1.38 and 1.55. Correction 0 is worse than no refit (1.16 against 0.97, another calibration).
    # Correction 1 ruins plans that lose whole early layers (1.22 to 3.17), which is why another one is tried.
    corrections: tuple[float, ...] = (1.0, 0.5)
    # A ridge of 0.1 fits 64 sequences too closely: at 85 % its KL is 0.617 on Python's documentation and 0.649 on
    # WikiText-2, with 0.3 it is 0.596 and 0.627.
    ridge: float = 0.3
    batch_tokens: int = 2048


@dataclass(frozen=True, kw_only=True)
class RelaxationOptions:
    """Settings of `relax`, which runs Adam on the logits of the levels.

    `penalty` and `temperature` go geometrically from the first to the second value. The multiplier of the constraint is
    updated after every `multiplier_every` steps.
    """

    steps: int = 400
    learning_rate: float = 0.05
    temperature: tuple[float, float] = (1.0, 0.1)
    penalty: tuple[float, float] = (10.0, 100.0)
    multiplier_every: int = 20


@dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """Settings of DiLAP's search.

    The limits of its rounds are `step` of the dense latency apart. `label_samples` is how often labels are drawn for a
    quadratic model. `cross_terms` keeps interactions between sublayers in it; `caution` is the number of standard
    errors by which its slopes are taken to be worse than measured. `restarts` is the number of starts of the
    relaxation, which is left out without any. `selection_seconds` is how long one exact selection may take, where pairs
    of choices have costs of their own. `evaluations` is how many configs are scored by the real KL while polishing.
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
    selection_seconds: float = 5.0
    # The polish lowers the KL on unseen text from 0.562 to 0.548 at 85 %, from 1.218 to 1.170 at 70 %, from 1.970 to
    # 1.905 at 55 % (tools/bench_search, means of three seeds).
    evaluations: int = 40
    seed: int = 0
    relaxation: RelaxationOptions = field(default_factory=RelaxationOptions)


@dataclass(frozen=True, kw_only=True)
class LevelOptions:
    """Settings of the methods that choose among measured levels."""

    library: LibraryOptions = field(default_factory=LibraryOptions)
    search: SearchOptions = field(default_factory=SearchOptions)
    refit: RefitOptions = field(default_factory=RefitOptions)

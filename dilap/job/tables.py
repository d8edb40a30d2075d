"""What a job says of a latency table, and when it trusts one."""

import math
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from dilap.core.errors import Mismatch
from dilap.core.printable import joined
from dilap.core.progress import Progress

_MAX_ERROR = 0.10  # the median relative error on held-out plans beyond which a table is refused


class Fitted(Protocol):
    """Costs that were fitted to a latency table."""

    @property
    def method(self) -> str: ...

    @property
    def caveats(self) -> tuple[str, ...]: ...

    def holdout_errors(self) -> list[float]: ...


def describe_errors(model: Fitted, *, more: str = "") -> str:
    """Say how well a table predicts plans that took no part in its fit, `more` of that, and its caveats."""
    errors = model.holdout_errors()
    said = f"latency table fitted by {model.method}"
    if errors:
        said += (
            f": on {len(errors)} held-out random plans the prediction is off by {statistics.median(errors):.1%} "
            f"(median), {max(errors):.1%} (worst){more}"
        )
    else:
        said += "; it has no held-out plans yet"
    return joined([said, *model.caveats])


def require_claimable(model: Fitted, *, advice: str) -> None:
    """Raise Mismatch for a table without held-out plans, with `advice`, or with too large an error on them."""
    errors = model.holdout_errors()
    if not errors:
        raise Mismatch(
            "the latency table has no held-out plans that count, so nothing shows how well it predicts: "
            f"measure what it lacks with {advice}"
        )
    if statistics.median(errors) > _MAX_ERROR:
        raise Mismatch(
            f"the latency table misses held-out plans by {statistics.median(errors):.0%} (allowed: {_MAX_ERROR:.0%}): "
            "no budget can be claimed on it; measure it again on a quiet machine"
        )


def prediction_error(model: Fitted) -> float:
    """Return the root of the mean square of the relative errors on held-out plans; infinite where there are none."""
    errors = model.holdout_errors()
    return math.sqrt(statistics.fmean(one**2 for one in errors)) if errors else math.inf


@contextmanager
def shown_probes(progress: Progress) -> Iterator[Callable[[int, int, str], None]]:
    """A context with the function that shows how many of all probes are measured, and what is done now."""
    with progress.bar("latency table", total=None, unit="probe") as bar:

        def show(done: int, total: int, text: str) -> None:
            bar.total, bar.n = total, done
            bar.set_postfix_str(text)

        yield show

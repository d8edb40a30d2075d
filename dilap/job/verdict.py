"""What may be said of a budget: no more than the interval of what was measured says."""

from collections.abc import Iterable
from typing import Literal

from dilap.core.measurement import Interval, Status

Verdict = Literal["kept", "uncertain", "missed", "estimated"]


def verdict(share: Interval, measurements: Iterable[Status]) -> Verdict:
    """Of a share of the budget, and how the measurements that it comes from went.

    A noisy measurement has a wide interval, which says enough. A contended one is off by more than its interval knows
    of (88.9 % and then 121.9 % of one budget were seen): nothing is claimed from it.
    """
    found = set(measurements)
    if "estimated" in found:
        return "estimated"
    if "contended" in found or share.low <= 1 < share.high:
        return "uncertain"
    return "kept" if share.high <= 1 else "missed"


def words(status: Verdict, share: Interval) -> str:
    """As people read it. `share` has the width 0 in results of earlier versions, which knew no interval."""
    if status == "uncertain":
        if share.low <= 1 < share.high:
            return f"{'kept' if share.value <= 1 else 'missed'}, within the noise"
        return "uncertain, other processes used the cores"
    return {"kept": "kept", "missed": "MISSED", "estimated": "ESTIMATED, measured on no device"}[status]


def percent(share: Interval) -> str:
    """The share, and its interval where it has one."""
    value = f"{share.value:.1%}"
    return value if share.low == share.high else f"{value} [{share.low:.1%}, {share.high:.1%}]"

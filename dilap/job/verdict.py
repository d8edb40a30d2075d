"""The verdict on a budget: kept or missed only where the whole measured interval says so."""

from collections.abc import Iterable
from typing import Literal

from dilap.core.measurement import Interval, Status

Verdict = Literal["kept", "uncertain", "missed", "estimated"]


def verdict(share: Interval, measurements: Iterable[Status]) -> Verdict:
    """Return the verdict on a budget of which `share` is used, given the status of the measurements behind it.

    Of a noisy measurement the interval decides, which is wide. From a contended one, which other load or a slower
    device spoiled, nothing is claimed.
    """
    found = set(measurements)
    if "estimated" in found:
        return "estimated"
    # Both change a latency by more than its interval shows: 88.9 % and then 121.9 % of one budget were seen.
    if "contended" in found or share.low <= 1 < share.high:
        return "uncertain"
    return "kept" if share.high <= 1 else "missed"


def words(status: Verdict, share: Interval) -> str:
    """Return the verdict in words for people. In results of earlier versions `share` has width 0."""
    if status == "uncertain":
        if share.low <= 1 < share.high:
            return f"{'kept' if share.value <= 1 else 'missed'}, within the noise"
        return "uncertain, the device was busy or slowed down"
    return {"kept": "kept", "missed": "MISSED", "estimated": "ESTIMATED, measured on no device"}[status]


def percent(share: Interval) -> str:
    """Format the share, with its interval where that has a width."""
    value = f"{share.value:.1%}"
    return value if share.low == share.high else f"{value} [{share.low:.1%}, {share.high:.1%}]"

"""What can be used on this machine, and why not the rest."""

from dataclasses import dataclass

from dilap import backends
from dilap.profilers.devices import DEVICES


@dataclass(frozen=True, kw_only=True)
class Check:
    """A runtime or a device; `reason` says why it cannot be used and what to do."""

    kind: str
    name: str
    usable: bool
    reason: str


def examine() -> list[Check]:
    """Every runtime and every device that DiLAP knows."""
    checks = []
    for name in backends.BACKENDS:
        backend = backends.get(name)
        reason = backend.unavailable()
        checks.append(Check(kind="runtime", name=name, usable=reason is None, reason=reason or backend.version()))
    for device in DEVICES.values():
        reason = device.unavailable()
        checks.append(
            Check(kind="device", name=device.name, usable=reason is None, reason=reason or device.description)
        )
    return checks


def report(checks: list[Check]) -> str:
    """One line a check."""
    width = max(len(check.name) for check in checks)
    return "\n".join(
        f"{'ok  ' if check.usable else 'no  '}{check.kind:8}{check.name.ljust(width)}  {check.reason}"
        for check in checks
    )

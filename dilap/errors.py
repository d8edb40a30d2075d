"""Every error a caller may act on.

DilapError              one line for the user; the commands print it and exit with 2
├── InvalidInput        the caller's words or files are wrong: a name, a budget, a damaged file
├── Unsupported         correct input that this architecture, layout or runtime cannot hold
├── Unavailable         a runtime, a device or a model is not here; the text says how to get it
│   └── LinkLost        a device went away while in use: the same command, given again, goes on
├── Unfit               a device is in no state to be measured: hot, busy, on battery
├── Mismatch            two things that must agree do not: a table and a device, a plan and a model
├── Infeasible          no plan can keep the budget
└── VerificationFailed  an artifact does not compute what its torch model computes
"""


class DilapError(Exception):
    """What was wrong, what was got, and what to do, in one line."""


class InvalidInput(DilapError):
    """The caller's words or files are wrong."""


class Unsupported(DilapError):
    """Correct input that this architecture, layout or runtime cannot hold."""


class Unavailable(DilapError):
    """A runtime, a device or a model is not here."""


class LinkLost(Unavailable):
    """A device, or the way to it, went away while in use; the same command, given again, goes on."""


class Unfit(DilapError):
    """A device is in no state to be measured."""


class Mismatch(DilapError):
    """Two things that must agree do not."""


class Infeasible(DilapError):
    """No plan can keep the budget."""


class VerificationFailed(DilapError):
    """An artifact does not compute what its torch model computes."""

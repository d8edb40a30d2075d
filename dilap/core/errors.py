"""Every error a caller may act on.

DilapError              one line for the user; the commands print it and exit with 2
├── InvalidInput        the caller's words or files are wrong: a name, a budget, a damaged file
├── Unsupported         correct input that this architecture, layout or runtime cannot hold
├── Unavailable         a runtime, a device or a model is not here; the text says how to get it
│   └── LinkLost        a device went away while in use; the same command, given again, continues the work
├── Crashed             a native runtime died in the process that ran it; the text says which, why and what to try
├── Unfit               a device is in no state to be measured: hot, busy, on battery
├── Mismatch            two things that must agree do not: a table and a device, a plan and a model
├── Infeasible          no plan can keep the budget
└── VerificationFailed  an artifact does not compute what its torch model computes
"""

TRACEBACK_KEPT = "the traceback is kept in "  # first words of a note on an error whose traceback is in a log already


class DilapError(Exception):
    """Base of all errors. Its text says in one line what was wrong, what was found and what to do."""


class InvalidInput(DilapError):
    """The caller's words or files are wrong."""


class Unsupported(DilapError):
    """Correct input that this architecture, layout or runtime cannot hold."""


class Unavailable(DilapError):
    """A runtime, a device or a model is not here."""


class LinkLost(Unavailable):
    """A device, or the connection to it, was lost while in use; the same command, given again, continues the work."""


class Crashed(DilapError):
    """A native runtime died in the process that ran it."""


class Unfit(DilapError):
    """A device is in no state to be measured."""


class Mismatch(DilapError):
    """Two things that must agree do not."""


class Infeasible(DilapError):
    """No plan can keep the budget."""


class VerificationFailed(DilapError):
    """An artifact does not compute what its torch model computes."""


_MAX_REASON = 400  # characters: some libraries print whole files


def reason_of(error: BaseException) -> str:
    """Return what an exception says, in one line; errors of libraries have their type in front.

    All lines of a text are joined, because the first one is often only a heading ("Validation error for field 'x':").
    The text of a KeyError is often only the key; a sentence is made of it.
    """
    text = " ".join(str(error).split())
    if isinstance(error, DilapError):
        return text
    if isinstance(error, KeyError) and len(error.args) == 1:  # its text is the repr of a key, or of a sentence
        words = " ".join(str(error.args[0]).split())
        text = words if " " in words else f"there is no {error.args[0]!r}"
    if len(text) > _MAX_REASON:
        text = f"{text[:_MAX_REASON]}..."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__

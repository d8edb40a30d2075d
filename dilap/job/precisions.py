"""The precisions that a model, or the parts of a decoder, may have in a job."""

from dilap.backends import Backend, require_network_precision
from dilap.core.errors import Unsupported
from dilap.core.shape import PRECISION_BITS, Architecture, by_quality

AUTO = "auto"
_FLOATS = ("f16", "bf16", "f32")


def asked_precisions(text: str | None, *, default: str) -> tuple[str, tuple[str, ...] | None]:
    """Return the artifact's own precision, and those that its parts may have, as `--precision` asks for them.

    The second value is None for `auto`, where the runtime's are tried, and empty where one is named alone. The
    artifact's own one is `default`, what ships on the device, unless others are named.
    """
    if text in (None, AUTO):
        return default, None
    named = tuple(dict.fromkeys(one.strip() for one in str(text).split(",")))
    if len(named) == 1:
        return named[0], ()
    return default if default in named else named[0], named


def offered_precisions(
    asked: tuple[str, ...] | None, backend: Backend, architecture: Architecture, *, own: str
) -> tuple[str, ...]:
    """Return the precisions that the parts of a model may have, the best first; the artifact's `own` is among them.

    `asked` is what `asked_precisions` returns. The first one is the reference, in which nothing of the quality is lost.
    Raises Unsupported where several are asked for by name and the runtime, or its files of this family, hold only one.
    """
    if asked == ():
        return (own,)
    mixes = backend.capabilities(architecture, precision=own).mixed_precisions
    if not mixes or architecture.experts is not None:
        if asked is None:
            return (own,)
        raise Unsupported(
            f"{backend.name} holds all parts of this model in one precision, got {', '.join(asked)}: name one alone"
        )
    wanted = {own, *(_tried(backend, architecture) if asked is None else asked)}
    return by_quality(wanted)


def offered_network_precisions(asked: tuple[str, ...] | None, backend: Backend, *, own: str) -> tuple[str, ...]:
    """Return the precisions that a network that is no decoder may have as a whole, the best first, `own` among them.

    `asked` is what `asked_precisions` returns. Raises Unsupported for one in which the runtime runs no such networks.
    """
    for precision in (own, *(asked or ())):
        require_network_precision(backend, precision)
    return by_quality({own, *(backend.network_precisions() if asked is None else asked)})


def _tried(backend: Backend, architecture: Architecture) -> tuple[str, ...]:
    """Return the precisions in which the runtime holds the model, and of the floating-point ones only the smallest."""
    limits = {one: backend.capabilities(architecture, precision=one) for one in backend.precisions()}
    held = [one for one, limit in limits.items() if limit.refusal(architecture) is None]
    floats = [one for one in held if one in _FLOATS]
    smallest = min(floats, key=PRECISION_BITS.__getitem__, default=None)
    return tuple(one for one in held if one not in _FLOATS or one == smallest)

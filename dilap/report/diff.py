"""Compare two results field by field: what was asked differently, and which numbers differ by how much."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dilap.core.codec import decode, encode, read_json
from dilap.core.errors import InvalidInput
from dilap.core.printable import joined
from dilap.evaluation.document import Evaluation
from dilap.job.result import PruneResult, read_result

# Raw data: what is computed from it is compared instead.
_RAW = ("samples_ns", "rounds", "dropped_ns", "layers", "stage_seconds", "choices")


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A field whose values differ; `change` is relative, for numbers."""

    field: str
    first: Any
    second: Any
    change: float | None


def compare(first: Path, second: Path) -> list[Difference]:
    """Return how two runs, or two evaluations, differ. Raises InvalidInput for anything else, or for one of each."""
    one, other = _read(first), _read(second)
    if type(one) is not type(other):
        kinds = [type(value).__name__ for value in (one, other)]
        raise InvalidInput(f"{first} is a {kinds[0]} and {second} a {kinds[1]}: nothing to compare")
    return list(_differences("", encode(one), encode(other)))


def _read(path: Path) -> PruneResult[Any] | Evaluation:
    result = path / "result.json"
    if result.is_file():
        return read_result(path)
    if path.is_file():
        return decode(Evaluation, read_json(path), source=str(path))
    raise InvalidInput(f"{path} is no run (result.json) or evaluation file")


def _differences(name: str, first: Any, second: Any) -> Iterator[Difference]:
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        for key in dict.fromkeys([*first, *second]):
            if key not in _RAW:
                yield from _differences(f"{name}.{key}".lstrip("."), first.get(key), second.get(key))
    elif first != second:
        yield Difference(field=name, first=first, second=second, change=_change(first, second))


def _change(first: Any, second: Any) -> float | None:
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in (first, second))
    if not numbers or first == 0 or not math.isfinite(first):
        return None
    return float(second / first - 1)


def text(differences: Sequence[Difference]) -> str:
    """Return the differences as text, one line for each field."""
    if not differences:
        return "no difference"
    width = max(len(one.field) for one in differences)
    return joined(
        f"{one.field.ljust(width)}  {_short(one.first)} -> {_short(one.second)}"
        + ("" if one.change is None else f"  ({one.change:+.2%})")
        for one in differences
    )


def _short(value: Any) -> str:
    written = f"{value:.6g}" if isinstance(value, float) else str(value)
    return written if len(written) <= 60 else f"{written[:57]}..."

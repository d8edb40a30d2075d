"""Keep the result of a method on disk, as one safetensors file, so that a killed run can go on from it."""

import json
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

from dilap.core.codec import decode, encode, written_aside
from dilap.core.documents import parse_object
from dilap.core.errors import InvalidInput, reason_of
from dilap.core.plan import Plan
from dilap.search.method import Pruned


def save_pruned(path: Path, pruned: Pruned) -> None:
    """Write `pruned`, whole or not at all."""
    metadata = {"plan": json.dumps(encode(pruned.plan)), "facts": json.dumps(dict(pruned.facts))}
    with written_aside(path) as temporary:
        save_file({name: value.contiguous() for name, value in pruned.parameters.items()}, temporary, metadata=metadata)


def load_pruned(path: Path) -> Pruned:
    """Read what `save_pruned` wrote. Raises InvalidInput for a damaged file."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            return Pruned(
                plan=decode(Plan, parse_object(metadata["plan"], source=str(path)), source=str(path)),
                parameters={name: file.get_tensor(name) for name in file.keys()},  # noqa: SIM118 (no mapping)
                facts=parse_object(metadata["facts"], source=str(path)),
            )
    except Exception as error:  # safetensors raises its own type for damaged files
        raise InvalidInput(
            f"{path}: damaged result of a method ({reason_of(error)}); remove the file and run again"
        ) from error

"""Keep the result of a method on disk, as one safetensors file, so that a killed run can go on from it."""

import json
from pathlib import Path
from typing import Any

from dilap.core.codec import decode, encode
from dilap.core.documents import parse_object
from dilap.core.plan import Plan
from dilap.models.tensor_file import opened_tensors, save_tensors
from dilap.search.method import Pruned


def save_pruned(path: Path, pruned: Pruned[Any]) -> None:
    """Write `pruned`, whole or not at all."""
    metadata = {"plan": json.dumps(encode(pruned.plan)), "facts": json.dumps(dict(pruned.facts))}
    save_tensors(path, pruned.parameters, metadata=metadata)


def load_pruned(path: Path) -> Pruned[Any]:
    """Read what `save_pruned` wrote. Raises InvalidInput for a damaged file."""
    with opened_tensors(path, what="result of a method") as file:
        metadata = file.metadata()
        return Pruned(
            plan=decode(Plan, parse_object(metadata["plan"], source=str(path)), source=str(path)),
            parameters={name: file.get_tensor(name) for name in file.keys()},  # noqa: SIM118 (no mapping)
            facts=parse_object(metadata["facts"], source=str(path)),
        )

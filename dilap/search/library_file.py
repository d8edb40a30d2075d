"""Keep a level library on disk, as one safetensors file with weights and columns by choice and level."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from dilap.core.codec import checked
from dilap.core.documents import parse_json
from dilap.models.tensor_file import opened_tensors, save_tensors
from dilap.search.library import LevelFit


def save_library(path: Path, library: Sequence[Sequence[LevelFit]]) -> None:
    """Write `library`, whole or not at all."""
    tensors: dict[str, torch.Tensor] = {}
    facts: list[list[dict[str, object]]] = []
    for choice, levels in enumerate(library):
        facts.append([{"units": fit.units, "error": fit.error} for fit in levels])
        for level, fit in enumerate(levels):
            tensors[f"{choice}.{level}.weight"] = fit.weight
            tensors[f"{choice}.{level}.columns"] = fit.columns
    save_tensors(path, tensors, metadata={"facts": json.dumps(facts)})


def load_library(path: Path) -> list[list[LevelFit]]:
    """Read what `save_library` wrote. Raises InvalidInput for a damaged file."""
    with opened_tensors(path, what="level library") as file:
        facts = parse_json(file.metadata()["facts"], source=str(path))
        return [
            [
                LevelFit(
                    units=checked(dict[str, tuple[int, ...]], fact["units"], source=str(path)),
                    columns=file.get_tensor(f"{choice}.{level}.columns"),
                    weight=file.get_tensor(f"{choice}.{level}.weight"),
                    error=fact["error"],
                )
                for level, fact in enumerate(levels)
            ]
            for choice, levels in enumerate(facts)
        ]

"""Keep a level library on disk, as one safetensors file with weights and columns by choice and level."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from dilap.core.codec import checked, written_aside
from dilap.core.documents import parse_json
from dilap.core.errors import InvalidInput, reason_of
from dilap.search.library import LevelFit


def save_library(path: Path, library: Sequence[Sequence[LevelFit]]) -> None:
    """Write `library`, whole or not at all."""
    tensors: dict[str, torch.Tensor] = {}
    facts: list[list[dict[str, object]]] = []
    for choice, levels in enumerate(library):
        facts.append([{"units": fit.units, "error": fit.error} for fit in levels])
        for level, fit in enumerate(levels):
            tensors[f"{choice}.{level}.weight"] = fit.weight.contiguous()
            tensors[f"{choice}.{level}.columns"] = fit.columns
    with written_aside(path) as temporary:
        save_file(tensors, temporary, metadata={"facts": json.dumps(facts)})


def load_library(path: Path) -> list[list[LevelFit]]:
    """Read what `save_library` wrote. Raises InvalidInput for a damaged file."""
    try:
        with safe_open(path, framework="pt") as file:
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
    except Exception as error:  # safetensors raises its own type for damaged files
        raise InvalidInput(
            f"{path}: damaged level library ({reason_of(error)}); remove the file and run again"
        ) from error

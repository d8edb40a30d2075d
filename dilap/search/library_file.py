"""Keep a level library on disk, one safetensors file for every choice, which is read only where it is needed.

The tensors of a file are memory-mapped: a library may be larger than the memory.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from dilap.core.codec import checked
from dilap.core.documents import parse_json
from dilap.core.space import Choice
from dilap.models.tensor_file import opened_tensors, save_tensors
from dilap.search.library import LevelFit

Library = Sequence[Sequence[LevelFit]]
Fits = Iterator[tuple[str, list[LevelFit]]]  # the name of a choice, and its levels
# A larger library is kept in bf16. Rounding to it changes an output by 0.1 %, and the levels change it by 10 % or more.
_MOST_F32_BYTES = 2 << 30


def kept_library(folder: Path, choices: Sequence[Choice], fit: Callable[[Sequence[Choice]], Fits]) -> Library:
    """Return the library of `choices` in `folder`, after `fit` has fitted those that are not there yet.

    Every choice is written, whole or not at all, as soon as it is fitted. Raises InvalidInput for a damaged file.
    """
    paths = {choice.name: folder / f"{choice.name}.safetensors" for choice in choices}
    missing = [choice for choice in choices if not paths[choice.name].exists()]
    if missing:
        for name, fits in fit(missing):
            save_fits(paths[name], fits, dtype=_dtype(fits, len(choices)))
    return load_library(folder, choices)


def load_library(folder: Path, choices: Sequence[Choice]) -> Library:
    """Return the library of `choices` in `folder`. Raises InvalidInput for a damaged or missing file."""
    return [load_fits(folder / f"{choice.name}.safetensors") for choice in choices]


def _dtype(fits: Sequence[LevelFit], num_choices: int) -> torch.dtype:
    """Return the type in which a choice is kept: bf16 where a library of such choices would be large."""
    num_bytes = 4 * num_choices * sum(fit.weight.numel() for fit in fits)
    return torch.bfloat16 if num_bytes > _MOST_F32_BYTES else torch.float32


def save_fits(path: Path, fits: Sequence[LevelFit], *, dtype: torch.dtype = torch.float32) -> None:
    """Write the levels of one choice, whole or not at all; the full width is kept exactly in any type."""
    tensors: dict[str, torch.Tensor] = {}
    for level, fit in enumerate(fits):
        narrow = fit.weight.to(dtype)
        tensors[f"{level}.weight"] = narrow if level or torch.equal(narrow.float(), fit.weight) else fit.weight
        tensors[f"{level}.columns"] = fit.columns
    facts = [{"units": fit.units, "error": fit.error} for fit in fits]
    save_tensors(path, tensors, metadata={"facts": json.dumps(facts)})


def load_fits(path: Path) -> list[LevelFit]:
    """Read what `save_fits` wrote. Raises InvalidInput for a damaged file."""
    with opened_tensors(path, what="level library") as file:
        facts = parse_json(file.metadata()["facts"], source=str(path))
        return [
            LevelFit(
                units=checked(dict[str, tuple[int, ...]], fact["units"], source=str(path)),
                columns=file.get_tensor(f"{level}.columns"),
                weight=file.get_tensor(f"{level}.weight"),
                error=fact["error"],
            )
            for level, fact in enumerate(facts)
        ]

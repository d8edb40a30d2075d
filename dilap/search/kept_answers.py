"""Keep the answers that a search gets on disk, so that each is computed only once.

A search depends on nothing but its answers, so a killed search that is started again reads those that it had, and ends
with the same plan.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from dilap.core.codec import checked, digest, write_json
from dilap.core.documents import parse_json, read_text
from dilap.core.errors import InvalidInput
from dilap.models.tensor_file import opened_tensors, save_tensors
from dilap.search.curvature import Curvature

_TENSORS = ("b", "b_error", "of_changes", "parts")  # of a quadratic model


@dataclass(frozen=True, kw_only=True)
class KeptAnswers:
    """The answers that are kept in a folder; without one, all are computed whenever they are asked for."""

    folder: Path | None = None

    def kls(self, config: Sequence[int], compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Return the distances from the dense model at `config`, one for every example."""
        path = self._entry("kl", [list(config)], suffix=".json")
        if path is not None and path.exists():
            return _read_kls(path)
        values = compute()
        if path is not None:
            write_json(path, values.tolist())
        return values

    def curvature(
        self, config: Sequence[int], *, samples: int, seed: int, compute: Callable[[], Curvature]
    ) -> Curvature:
        """Return the quadratic model around `config`, from so many samples for every example."""
        path = self._entry("curvature", [list(config), samples, seed], suffix=".safetensors")
        if path is not None and path.exists():
            return _read_curvature(path)
        curvature = compute()
        if path is not None:
            metadata = {"value": repr(curvature.value), "num_rows": str(curvature.num_rows)}
            save_tensors(path, {name: getattr(curvature, name) for name in _TENSORS}, metadata=metadata)
        return curvature

    def _entry(self, kind: str, key: list[object], *, suffix: str) -> Path | None:
        return None if self.folder is None else self.folder / f"{kind}-{digest(key)[:16]}{suffix}"


def _read_kls(path: Path) -> torch.Tensor:
    try:
        found = parse_json(read_text(path), source=str(path))
        return torch.tensor(checked(tuple[float, ...], found, source=str(path)))
    except InvalidInput as error:
        raise InvalidInput(f"damaged journal entry ({error}); remove the file and run again") from error


def _read_curvature(path: Path) -> Curvature:
    with opened_tensors(path, what="journal entry") as file:
        metadata = file.metadata()
        return Curvature(
            value=float(metadata["value"]),
            num_rows=int(metadata["num_rows"]),
            **{name: file.get_tensor(name) for name in _TENSORS},
        )

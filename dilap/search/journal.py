"""Answer what a search asks of the model: the real KL of a config, and the quadratic model of the KL around one.

With a `journal` folder every answer is kept on disk, and computed only once. A search depends on nothing but these
answers, so a killed search that is started again reads those it had, and ends with the same plan.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from dilap.core.codec import checked, digest, write_json
from dilap.core.documents import parse_json, read_text
from dilap.core.errors import InvalidInput
from dilap.models.reference import Teacher
from dilap.models.tensor_file import opened_tensors, save_tensors
from dilap.search.curvature import Curvature, linearise
from dilap.search.supernet import Supernet

_TENSORS = ("b", "b_error", "of_changes", "parts")  # of a quadratic model


@dataclass(frozen=True, kw_only=True)
class Evaluator:
    """Computes the answers for one model with its level library, on the teacher's text."""

    net: Supernet
    teacher: Teacher
    journal: Path | None = None

    @property
    def sizes(self) -> tuple[int, ...]:
        return self.net.sizes

    def kl(self, config: Sequence[int]) -> float:
        """Return the mean KL(dense || config) per position of the validation split, in nats."""
        return float(self.kls(config).double().mean())

    def kls(self, config: Sequence[int]) -> torch.Tensor:
        """Return the mean KL(dense || config) per position of every sequence of the validation split, in nats."""
        path = self._entry("kl", [list(config)], suffix=".json")
        if path is not None and path.exists():
            return _read_kls(path)
        values = self.net.kls(self.teacher, config)
        if path is not None:
            write_json(path, values.tolist())
        return values

    def curvature(self, config: Sequence[int], *, samples: int, seed: int) -> Curvature:
        """Return the quadratic model of the KL around `config`, from one pass of `linearise`."""
        path = self._entry("curvature", [list(config), samples, seed], suffix=".safetensors")
        if path is not None and path.exists():
            return _read_curvature(path)
        self.net.set(config)
        curvature = linearise(self.net, self.teacher, samples=samples, seed=seed)
        if path is not None:
            metadata = {"value": repr(curvature.value), "num_rows": str(curvature.num_rows)}
            tensors = {name: getattr(curvature, name) for name in _TENSORS}
            save_tensors(path, tensors, metadata=metadata)
        return curvature

    def _entry(self, kind: str, key: list[object], *, suffix: str) -> Path | None:
        return None if self.journal is None else self.journal / f"{kind}-{digest(key)[:16]}{suffix}"


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

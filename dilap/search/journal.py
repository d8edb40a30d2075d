"""Answer what a search asks of the model: the real KL of a config, and the quadratic model of the KL around one.

Where there are several processes, all of them compute every answer together, each on its share of the text.

With a `journal` folder every answer is kept on disk, and computed only once. A search depends on nothing but these
answers, so a killed search that is started again reads those it had, and ends with the same plan.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch

from dilap.core.codec import checked, digest, write_json
from dilap.core.documents import parse_json, read_text
from dilap.core.errors import InvalidInput
from dilap.models.processes import Processes, Team
from dilap.models.reference import Teacher
from dilap.models.tensor_file import opened_tensors, save_tensors
from dilap.search.allocation import Config
from dilap.search.curvature import Curvature, linearise
from dilap.search.options import RefitOptions
from dilap.search.refit import Refit, best_refit
from dilap.search.supernet import Supernet

_TENSORS = ("b", "b_error", "of_changes", "parts")  # of a quadratic model


@dataclass(frozen=True, kw_only=True)
class Part:
    """What one process has for the answers: the model with its levels, and the teacher on its share of the text."""

    net: Supernet
    teacher: Teacher
    processes: Processes

    @classmethod
    def of(cls, net: Supernet, teacher: Teacher, processes: Processes) -> "Part":
        """Return the part of one of the processes, given the teacher on the whole text."""
        return cls(net=net, teacher=teacher.share(processes), processes=processes)


@dataclass(frozen=True, kw_only=True)
class Evaluator:
    """Computes the answers for one model with its level library, on the teacher's text.

    The helpers of a `team` have kept their parts under the name "part".
    """

    net: Supernet
    teacher: Teacher
    journal: Path | None = None
    team: Team = field(default_factory=Team)

    @cached_property
    def _part(self) -> Part:
        return Part.of(self.net, self.teacher, self.team.processes)

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
        values = self.team.together(_kls, tuple(config), part=self._part)
        if path is not None:
            write_json(path, values.tolist())
        return values

    def curvature(self, config: Sequence[int], *, samples: int, seed: int) -> Curvature:
        """Return the quadratic model of the KL around `config`, from one pass of `linearise`."""
        path = self._entry("curvature", [list(config), samples, seed], suffix=".safetensors")
        if path is not None and path.exists():
            return _read_curvature(path)
        curvature = self.team.together(_curvature, tuple(config), samples, seed, part=self._part)
        if path is not None:
            metadata = {"value": repr(curvature.value), "num_rows": str(curvature.num_rows)}
            tensors = {name: getattr(curvature, name) for name in _TENSORS}
            save_tensors(path, tensors, metadata=metadata)
        return curvature

    def refit(
        self, config: Config, tokens: torch.Tensor, *, options: RefitOptions, progress: Callable[[int], None]
    ) -> Refit:
        """Return the best refit of a config on `tokens` (sequences x length); see `best_refit`."""
        return self.team.together(_refit, config, tokens, options, part=self._part, progress=progress)

    def _entry(self, kind: str, key: list[object], *, suffix: str) -> Path | None:
        return None if self.journal is None else self.journal / f"{kind}-{digest(key)[:16]}{suffix}"


def _kls(team: Team, config: Config, *, part: Part | None = None) -> torch.Tensor:
    own: Part = part or team.kept["part"]
    return own.processes.joined(own.net.kls(own.teacher, config))


def _curvature(team: Team, config: Config, samples: int, seed: int, *, part: Part | None = None) -> Curvature:
    own: Part = part or team.kept["part"]
    own.net.set(config)
    return linearise(own.net, own.teacher, samples=samples, seed=seed, processes=own.processes)


def _refit(
    team: Team,
    config: Config,
    tokens: torch.Tensor,
    options: RefitOptions,
    *,
    part: Part | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> Refit:
    own: Part = part or team.kept["part"]
    teacher, processes = own.teacher, own.processes
    return best_refit(own.net, config, tokens, teacher=teacher, options=options, processes=processes, progress=progress)


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

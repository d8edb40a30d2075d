"""Answer what a search asks of the model: the real KL of a config, and the quadratic model of the KL around one.

Where there are several processes, all of them compute every answer together, each on its share of the text.

With a `journal` folder every answer is kept on disk; see `dilap.search.kept_answers`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch

from dilap.models.processes import Processes, Team
from dilap.models.reference import Teacher
from dilap.search.allocation import Config
from dilap.search.curvature import Curvature, linearise
from dilap.search.kept_answers import KeptAnswers
from dilap.search.options import RefitOptions
from dilap.search.refit import Refit, best_refit
from dilap.search.supernet import Supernet


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
        return self._kept.kls(config, lambda: self.team.together(_kls, tuple(config), part=self._part))

    def curvature(self, config: Sequence[int], *, samples: int, seed: int) -> Curvature:
        """Return the quadratic model of the KL around `config`, from one pass of `linearise`."""

        def compute() -> Curvature:
            return self.team.together(_curvature, tuple(config), samples, seed, part=self._part)

        return self._kept.curvature(config, samples=samples, seed=seed, compute=compute)

    def refit(
        self, config: Config, tokens: torch.Tensor, *, options: RefitOptions, progress: Callable[[int], None]
    ) -> Refit:
        """Return the best refit of a config on `tokens` (sequences x length); see `best_refit`."""
        return self.team.together(_refit, config, tokens, options, part=self._part, progress=progress)

    @property
    def _kept(self) -> KeptAnswers:
        return KeptAnswers(folder=self.journal)


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

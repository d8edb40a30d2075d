"""Patterns of zeros inside weight matrices (outputs x inputs), and the check that a matrix has them."""

import re
from dataclasses import dataclass

import torch

from dilap.core.errors import InvalidInput, VerificationFailed


@dataclass(frozen=True, kw_only=True)
class Pattern:
    """A share of zeros, or at most N non-zeros in every M consecutive inputs of a row.

    The latter is written N:M, as for hardware: N weights are kept. N is `kept` and M is `group`.
    """

    sparsity: float
    kept: int | None = None
    group: int | None = None

    @classmethod
    def parse(cls, text: str) -> "Pattern":
        """Parse `0.5`, `2:4` or `4:8`. Raises InvalidInput."""
        if match := re.fullmatch(r"(\d+):(\d+)", text):
            kept, group = int(match[1]), int(match[2])
            if 0 < kept < group:
                return cls(sparsity=1 - kept / group, kept=kept, group=group)
        elif re.fullmatch(r"0?\.\d+", text) and float(text) > 0:
            return cls(sparsity=float(text))
        raise InvalidInput(f"pattern {text!r} is not understood; write 0.5 (share of zeros), 2:4 or 4:8 (N of M kept)")

    def __str__(self) -> str:
        return f"{self.kept}:{self.group}" if self.group else f"{self.sparsity:g}"

    def require_fit(self, num_inputs: int, *, name: str) -> None:
        """Raise InvalidInput where M does not divide the number of a matrix's inputs."""
        if self.group and num_inputs % self.group:
            raise InvalidInput(f"{name} has {num_inputs} inputs, which groups of {self.group} do not divide")

    def num_zeros(self, count: int) -> int:
        """Return how many of `count` weights that compete with one another become zero."""
        return int(count * self.sparsity)

    def keep(self, scores: torch.Tensor) -> torch.Tensor:
        """Return the mask of the weights kept (rows x inputs), the best of every row or of every group.

        Every row loses the same number of weights, or every group M - N. Of equal scores the later one is kept.
        """
        if self.group is None:
            return keep_best(scores, self.num_zeros(scores.shape[-1]))
        assert self.kept is not None
        groups = scores.reshape(*scores.shape[:-1], -1, self.group)
        return keep_best(groups, self.group - self.kept).reshape(scores.shape)

    def require(self, weight: torch.Tensor, *, name: str) -> None:
        """Raise VerificationFailed where a matrix has fewer zeros than the pattern asks for."""
        zeros = weight == 0
        if self.group:
            assert self.kept is not None
            most = int((~zeros).reshape(len(weight), -1, self.group).sum(-1).max())
            if most > self.kept:
                raise VerificationFailed(f"{name}: {most} non-zeros in a group of {self.group}, {self.kept} allowed")
        elif int(zeros.sum()) < len(weight) * self.num_zeros(weight.shape[1]):
            raise VerificationFailed(f"{name}: {float(zeros.float().mean()):.2%} zeros, {self.sparsity:.2%} asked")


def keep_best(scores: torch.Tensor, num_removed: int) -> torch.Tensor:
    """Return a mask that is false for the `num_removed` lowest scores of the last dimension.

    Of equal scores the first one is removed first.
    """
    order = scores.float().argsort(dim=-1, stable=True)
    mask = torch.ones_like(scores, dtype=torch.bool)
    return mask.scatter_(-1, order[..., :num_removed], value=False)

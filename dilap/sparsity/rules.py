"""Zeros inside matrices, layer by layer: magnitude, Wanda and SparseGPT, unstructured or N:M."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from transformers import PreTrainedModel

from dilap.core.errors import InvalidInput
from dilap.models.families import family_of
from dilap.models.modeling_dilap import linear_at
from dilap.models.statistics import InputStatistics, Propagate, Role, paths_of, walk
from dilap.sparsity.pattern import Pattern, keep_best

ROLES: tuple[Role, ...] = ("attention_in", "attention_out", "ffn_in", "ffn_out")


class Rule(Protocol):
    """How one matrix gets its zeros."""

    @property
    def needs_covariance(self) -> bool:
        """Whether X'X is collected for it."""

    def __call__(self, weight: torch.Tensor, statistics: InputStatistics, pattern: Pattern) -> torch.Tensor:
        """The matrix (outputs x inputs, f32) with its zeros, from the statistics of its inputs."""


@dataclass(frozen=True, kw_only=True)
class Magnitude:
    """The smallest weights of the whole matrix go, or of every group. `upstream_compatible`: all up to a threshold,
    which takes at least one more."""

    upstream_compatible: bool = False
    needs_covariance: ClassVar[bool] = False

    def __call__(self, weight: torch.Tensor, statistics: InputStatistics, pattern: Pattern) -> torch.Tensor:  # noqa: ARG002
        scores = weight.abs()
        if pattern.group:
            return weight * pattern.keep(scores)
        removed = pattern.num_zeros(weight.numel())
        if self.upstream_compatible:
            return weight * (scores > scores.flatten().sort().values[removed])
        return weight * keep_best(scores.flatten(), removed).reshape(weight.shape)


def wanda_scores(weight: torch.Tensor, statistics: InputStatistics) -> torch.Tensor:
    """|W_ij| * |x_j|; |W_ij| alone where no input was ever active."""
    norms = statistics.norms
    return weight.abs() * (norms if norms.any() else torch.ones_like(norms))


@dataclass(frozen=True, kw_only=True)
class Wanda:
    """Weight times activation norm, compared inside every output row. `use_variant`: every row drops the weights whose
    scores sum to one share of the row's, that share found by bisection."""

    use_variant: bool = False
    needs_covariance: ClassVar[bool] = False

    def __call__(self, weight: torch.Tensor, statistics: InputStatistics, pattern: Pattern) -> torch.Tensor:
        scores = wanda_scores(weight, statistics)
        if self.use_variant and pattern.group is None:
            return weight * self._variant(scores, pattern.sparsity)
        return weight * pattern.keep(scores)

    def _variant(self, scores: torch.Tensor, sparsity: float) -> torch.Tensor:
        ordered, order = scores.sort(dim=-1, stable=True)
        cumulative = ordered.cumsum(-1)
        low, high, share = 0.0, 0.8, 0.4
        while True:
            removed = cumulative <= share * cumulative[:, -1:]
            found = float(removed.float().mean())
            if abs(found - sparsity) <= 1e-3 or high - low < 1e-3:
                break
            low, high = (low, share) if found > sparsity else (share, high)
            share = (low + high) / 2
        return torch.ones_like(removed).scatter_(-1, order, ~removed)


@dataclass(frozen=True, kw_only=True)
class SparseGpt:
    """Optimal brain surgery column by column: what a removed weight gave is taken over by the columns to its right.

    Unstructured zeros compete inside `blocksize` columns over all rows; the dampening is relative to the mean diagonal
    and raised tenfold where the matrix is singular still. `upstream_compatible`: all up to a threshold go.
    """

    dampening: float = 0.01
    blocksize: int = 128
    upstream_compatible: bool = False
    needs_covariance: ClassVar[bool] = True

    def __call__(self, weight: torch.Tensor, statistics: InputStatistics, pattern: Pattern) -> torch.Tensor:
        covariance = statistics.covariance.clone()
        dead = covariance.diagonal() == 0
        covariance.diagonal()[dead] = 1.0
        weight = weight.clone()
        weight[:, dead] = 0
        return self.solve(weight, self.factor(covariance), pattern)

    def factor(self, covariance: torch.Tensor) -> torch.Tensor:
        """Upper U with U'U the inverse of the damped covariance; a diagonal one where that cannot be had."""
        identity = torch.eye(len(covariance), dtype=covariance.dtype)
        for times in (1, 10, 100):
            damped = covariance + times * self.dampening * covariance.diagonal().mean() * identity
            lower, failed = torch.linalg.cholesky_ex(damped)
            if not failed:
                upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed and torch.isfinite(upper).all():
                found: torch.Tensor = upper
                return found
        return torch.diag(covariance.diagonal().rsqrt())

    def solve(
        self, weight: torch.Tensor, upper: torch.Tensor, pattern: Pattern, *, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The sweep over columns; a given `mask` of kept weights (outputs x inputs) is used as it is."""
        if pattern.group and self.blocksize % pattern.group:
            raise InvalidInput(f"SparseGPT's blocksize {self.blocksize} is no multiple of {pattern.group}")
        weight = weight.clone()
        for start in range(0, weight.shape[1], self.blocksize):
            end = min(start + self.blocksize, weight.shape[1])
            block, u = weight[:, start:end], upper[start:end, start:end]
            kept = self._block_mask(block, u.diagonal(), pattern) if mask is None else mask[:, start:end]
            errors = torch.zeros_like(block)
            for j in range(end - start):
                if mask is None and pattern.group and j % pattern.group == 0:
                    columns = slice(j, j + pattern.group)
                    kept[:, columns] = pattern.keep((block[:, columns] / u.diagonal()[columns]).square())
                left = block[:, j] * kept[:, j]
                errors[:, j] = (block[:, j] - left) / u[j, j]
                block[:, j:] -= errors[:, j : j + 1] * u[j : j + 1, j:]
                block[:, j] = left
            weight[:, end:] -= errors @ upper[start:end, end:]
        return weight

    def _block_mask(self, block: torch.Tensor, diagonal: torch.Tensor, pattern: Pattern) -> torch.Tensor:
        """Kept weights of an unstructured block, chosen at once; N:M chooses column by column instead."""
        if pattern.group:
            return torch.ones_like(block, dtype=torch.bool)
        saliency = (block / diagonal).square()
        removed = min(pattern.num_zeros(block.numel()), block.numel() - 1)
        if self.upstream_compatible:
            return saliency > saliency.flatten().sort().values[removed]
        return keep_best(saliency.flatten(), removed).reshape(block.shape)


RULES = {
    "magnitude": "dilap.sparsity.rules:Magnitude",
    "wanda": "dilap.sparsity.rules:Wanda",
    "sparsegpt": "dilap.sparsity.rules:SparseGpt",
}


def sparsify_(
    model: PreTrainedModel,
    tokens: torch.Tensor,
    rule: Rule,
    pattern: Pattern,
    *,
    propagate: Propagate = "pruned",
    progress: Callable[[int], None] = lambda _: None,
) -> None:
    """Give the model's decoder layers matrices with zeros, each checked; the dense ones are not written over.

    `propagate`: the statistics of a layer are taken on what the pruned layers before it give, or the dense ones.
    Raises InvalidInput before anything is changed where the pattern does not divide a matrix.
    """
    family = family_of(model.config)
    require_matrices(model, pattern)
    steps = walk(
        model,
        tokens,
        roles=ROLES,
        covariance=getattr(rule, "needs_covariance", False),
        propagate=propagate,
        progress=progress,
    )
    for step in steps:
        for role, statistics in step.statistics.items():
            for path in paths_of(family, role):
                if (matrix := linear_at(step.layer, path)) is None:
                    continue
                sparse = rule(matrix.weight.detach().float(), statistics, pattern).to(matrix.weight.dtype)
                pattern.require(sparse, name=f"layer {step.index}, {path}")
                matrix.weight.data = sparse  # not written over: the dense one may be a file's, or needed again


def require_matrices(model: PreTrainedModel, pattern: Pattern) -> None:
    """Raises InvalidInput where there is no matrix to prune, or one that the pattern does not divide."""
    family = family_of(model.config)
    names = [path for role in ROLES for path in paths_of(family, role)]
    layers = model.get_submodule(family.layers)
    found = [(f"layer {i}, {path}", linear_at(layer, path)) for i, layer in enumerate(layers) for path in names]
    matrices = [(name, matrix) for name, matrix in found if matrix is not None]
    if not matrices:
        raise InvalidInput("the model has no linear matrices to prune; quantised or fused ones are not supported")
    for name, matrix in matrices:
        pattern.require_fit(matrix.in_features, name=name)

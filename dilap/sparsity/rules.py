"""Rules that put zeros inside matrices, layer by layer: magnitude, Wanda and SparseGPT, unstructured or N:M."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import nn
from transformers import PreTrainedModel

from dilap.core.errors import InvalidInput, Unsupported
from dilap.models.anatomy import architecture_of, decoder_layers
from dilap.models.families import family_of
from dilap.models.modeling_dilap import linear_at
from dilap.models.statistics import InputStatistics, Propagate, Role, layer_statistics, paths_of
from dilap.sparsity.pattern import Pattern, keep_best
from dilap.sparsity.pruner import Pruner, inputs_shown

ROLES: tuple[Role, ...] = ("attention_in", "attention_out", "ffn_in", "ffn_out")


class Rule(Protocol):
    """How one matrix gets its zeros."""

    @property
    def needs_covariance(self) -> bool:
        """Whether the rule needs X'X of the matrix's inputs X in its statistics."""

    def __call__(self, weight: torch.Tensor, statistics: InputStatistics, pattern: Pattern) -> torch.Tensor:
        """Return the matrix (outputs x inputs, f32) with its zeros, given the statistics of its inputs."""


@dataclass(frozen=True, kw_only=True)
class Magnitude:
    """Removes the smallest weights of the whole matrix, or of every N:M group.

    `upstream_compatible` removes all weights up to a threshold, which is at least one more.
    """

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
    """Return |W_ij| * |x_j| (outputs x inputs), with |x_j| the norm of input j; |W_ij| where no input was active."""
    norms = statistics.norms
    return weight.abs() * (norms if norms.any() else torch.ones_like(norms))


@dataclass(frozen=True, kw_only=True)
class Wanda:
    """Removes the weights of every output row whose size times activation norm is smallest.

    `use_variant` removes from every row the lowest-scored weights that have a certain share of the row's sum of scores;
    the share is the same for all rows and found by bisection.
    """

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
    """Optimal brain surgery column by column: the columns to the right make up for a weight that is removed.

    Without N:M groups, weights compete inside `blocksize` columns over all rows. The dampening is relative to the mean
    diagonal, and raised tenfold, up to twice, where the matrix is still singular. `upstream_compatible` removes all
    weights up to a threshold.
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
        """Return an upper triangular U with U'U the inverse of the damped covariance; a diagonal one if that fails."""
        identity = torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
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
        """Go through the columns, remove weights and update the columns to the right; return the matrix with its zeros.

        A `mask` of the weights to keep (outputs x inputs) is used instead of choosing them. Raises InvalidInput where
        the blocksize is no multiple of the pattern's group.
        """
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
        """Return the mask of kept weights of a block of columns, all true for N:M, where `solve` chooses later."""
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
    rule: Rule | Pruner,
    pattern: Pattern,
    *,
    propagate: Propagate = "pruned",
    device: torch.device | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> None:
    """Give the model's decoder layers new matrices with zeros, and check each; the dense ones are not written over.

    `propagate` says whether the inputs of a layer are the outputs of the pruned layers before it, or of the dense ones.
    With a `device` one layer at a time is on it, and everything else stays where it is.
    Raises InvalidInput, before anything is changed, where the pattern does not divide a matrix, and VerificationFailed
    where a matrix has too few zeros.
    """
    require_matrices(model, pattern)
    named = [dict(_matrices(model, index)) for index in range(len(decoder_layers(model)))]
    every = {name: matrix for layer in named for name, (matrix, _) in layer.items()}
    steps = layer_statistics(
        model,
        tokens,
        roles=() if isinstance(rule, Pruner) else ROLES,
        covariance=getattr(rule, "needs_covariance", False),
        propagate=propagate,
        device=device,
        progress=progress,
    )
    nothing = nullcontext(set[str]())
    with inputs_shown(rule, every, num_tokens=tokens.shape[1]) if isinstance(rule, Pruner) else nothing as shown:
        for step in steps:
            for name, (matrix, role) in named[step.index].items():
                shown.discard(name)  # of the next pass, through the pruned layer, it is shown nothing
                weight = matrix.weight.detach().float()
                if isinstance(rule, Pruner):
                    sparse = rule.pruned(name, weight, pattern)
                else:
                    sparse = rule(weight, step.statistics[role], pattern)
                sparse = sparse.to(matrix.weight.dtype)
                pattern.require(sparse, name=name)
                matrix.weight.data = sparse  # the dense matrix may be in a mapped file or needed again


def _matrices(model: PreTrainedModel, index: int) -> Iterator[tuple[str, tuple[nn.Linear, Role]]]:
    """Yield the matrices of a layer by name, each with the role of its input."""
    family, layer = family_of(model.config), decoder_layers(model)[index]
    for role in ROLES:
        for path in paths_of(family, role):
            if (matrix := linear_at(layer, path)) is not None:
                yield f"{family.layers}.{index}.{path}", (matrix, role)


def require_matrices(model: PreTrainedModel, pattern: Pattern) -> None:
    """Raise InvalidInput where there is no matrix to prune, or one that the pattern does not divide.

    Raises Unsupported for a model with experts, most of whose weights are in no matrix.
    """
    if architecture_of(model).experts is not None:
        raise Unsupported(
            "zeros inside matrices of experts are not supported yet: remove experts, with --budget or --ratio"
        )
    found = [one for index in range(len(decoder_layers(model))) for one in _matrices(model, index)]
    if not found:
        raise InvalidInput("the model has no linear matrices to prune; quantised ones are not supported")
    for name, (matrix, _) in found:
        pattern.require_fit(matrix.in_features, name=name)

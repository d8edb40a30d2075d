"""A quadratic model of a supernet's loss over all levels at once."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional

from dilap.models.compute import batches
from dilap.models.compute_device import HOST
from dilap.models.head_changes import head_products
from dilap.models.processes import ALONE, Processes
from dilap.models.reference import Teacher
from dilap.search.supernet import Supernet
from dilap.search.tap import Changes, Tap


@dataclass(frozen=True, kw_only=True)
class Curvature:
    """A quadratic model of KL(dense || config) near the current config: value + b'c + c'Qc/2.

    c is 1 for the chosen levels and 0 elsewhere. `b` (levels) and `Q` (levels x levels) are over the levels of all
    choices, one after the other; the entries of the current levels are zero. `b_error` is the standard error of `b`
    over sequences. `num_rows` is the number of rows from which Q was estimated. A level consists of several changes,
    such as one of width and one of precision; `of_changes` is Q over those (changes x changes), and `parts` has the
    indices of every level's, -1 for none (levels x changes of a level).
    """

    value: float
    b: torch.Tensor
    b_error: torch.Tensor
    of_changes: torch.Tensor
    parts: torch.Tensor
    num_rows: int

    @property
    def Q(self) -> torch.Tensor:  # noqa: N802 (the formula's name)
        return of_levels(of_levels(self.of_changes, self.parts).T, self.parts)

    @property
    def num_changes(self) -> int:
        return len(self.of_changes)


def of_levels(columns: torch.Tensor, parts: torch.Tensor) -> torch.Tensor:
    """Return the sum of the columns of every level's parts (... x levels), given those of changes (... x changes)."""
    padded = functional.pad(columns, (0, 1))  # -1 is a column of zeros
    return padded[:, parts].sum(-1)


def linearise(
    net: Supernet,
    teacher: Teacher,
    *,
    samples: int,
    seed: int,
    batch_tokens: int = 1024,
    processes: Processes = ALONE,
    progress: Callable[[int], None] = lambda _: None,
) -> Curvature:
    """Return the quadratic model of the KL around the current config, from one pass over the teacher's text.

    Both parts come from a matrix A with a row for every sequence r and a column for every change k of every sublayer s:
    A[r, (s, k)] is the sum over the positions t of <g_st, delta_skt>, with g the gradient at the sublayer's output,
    behind its norm if it has one there, and delta the change that is made there; the output of the head is the logits.
    A level's change is the sum of that of its width and that of its precision. For b the gradient is that of KL(dense
    || current). For Q, the mean of A'A / T over `samples` draws with T the number of positions, it is that of the
    log-likelihood of labels drawn from the current model itself. So Q is an unbiased estimate of the Fisher matrix,
    which at the dense model is the curvature of the KL. Rows are sequences, because rows of single positions would miss
    how the changes at several positions add up.

    Where several `processes` do this together, the teacher of each has its share of the text, and all get the model of
    the whole text.
    """
    net.forget()
    generator = torch.Generator().manual_seed(seed)
    lengths = processes.each(len(teacher.tokens))
    earlier = sum(lengths[: processes.rank]) * teacher.tokens.shape[1]
    torch.rand(earlier, samples, generator=generator)  # drawn by the processes before, so that labels stay the same
    teacher, current = net.facing(teacher, net.config), net.model.get_output_embeddings().weight
    head = net.head_of(current)
    changes = Changes.of(net)
    of_head = [net.head_of(net.matrix(net.head_name, one) - current).E for one in changes.head]
    device = net.model.device
    slopes = torch.zeros(len(teacher.tokens), changes.count, device=device)
    Q, value, start = torch.zeros(changes.count, changes.count, device=device), 0.0, 0
    with Tap(net, changes) as tap:
        for batch in batches(teacher.tokens, batch_tokens=tap.batch_tokens(batch_tokens), device=device):
            rows = slice(start, start + len(batch))
            start += len(batch)
            hidden = tap.forward(batch)
            at_head = teacher.at_head(hidden.detach(), head, rows=rows, samples=samples, generator=generator)
            value += float(at_head.kls.sum())
            slope, *scores = head_products(
                teacher, hidden.detach(), head, rows=rows, labels=at_head.labels, changes=of_head
            )
            if any(net.config):  # at the dense model the KL is least, so its gradient is zero
                slopes[rows] = tap.backward(hidden, at_head.slope, at_logits=slope) / batch.shape[1]
            for gradient, at_logits in zip(at_head.scores, scores, strict=True):
                products = tap.backward(hidden, gradient, at_logits=at_logits)
                Q += products.T @ products
            progress(batch.numel())
    num_rows, value_sum = sum(lengths), torch.tensor(value, dtype=torch.float64)
    total = num_rows * teacher.tokens.shape[1]
    processes.sum_(Q, value_sum)
    slopes = of_levels(processes.joined(slopes.to(HOST)), changes.parts)
    return Curvature(
        value=float(value_sum) / total,
        b=slopes.mean(0),
        b_error=slopes.std(0, correction=0) / len(slopes) ** 0.5,
        of_changes=Q.to(HOST) / (total * samples),
        parts=changes.parts,
        num_rows=num_rows * samples,
    )

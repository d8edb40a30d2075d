"""What changes of the head do to a loss, to first order: gradients at the logits times changes of the logits."""

from collections.abc import Iterator, Sequence

import torch
from torch.nn import functional

from dilap.models.reference import ROWS, Head, Teacher


@torch.no_grad()
def head_products(
    teacher: Teacher,
    hidden: torch.Tensor,
    head: Head,
    *,
    rows: slice,
    labels: torch.Tensor,
    changes: Sequence[torch.Tensor],
) -> Iterator[torch.Tensor]:
    """Yield inner products of gradients at the logits with what each of `changes` of the head makes of the logits.

    They are for every position (positions x changes): first those with the gradient of the KL, then those with the
    gradient of the log-likelihood of each row of `labels` (samples x positions). `hidden` are the final hidden states
    of the sequences `rows` (positions x hidden), and a change is a matrix that is added to the head (vocabulary x
    hidden). The changes are multiplied by themselves, because in bf16 the difference of two products would be lost.
    """
    if not changes:
        yield from (hidden.new_zeros(len(hidden), 0) for _ in range(1 + len(labels)))
        return
    assert teacher.states is not None
    dense_states = teacher.states[rows].to(hidden.device).reshape(hidden.shape).split(ROWS)
    dense_head = teacher.dense_head or head
    slopes: list[torch.Tensor] = []
    scores: list[list[torch.Tensor]] = []
    for part, dense, drawn in zip(hidden.split(ROWS), dense_states, labels.split(ROWS, 1), strict=True):
        logits = head.logits(part)
        moved = [head.through_cap(functional.linear(part.to(one.dtype), one).float(), logits) for one in changes]
        mean = _means(logits.softmax(-1), moved)
        slopes.append(mean - _means(dense_head.logits(dense).softmax(-1), moved))
        chosen = (torch.stack([one.gather(1, row[:, None])[:, 0] for one in moved], -1) for row in drawn)
        scores.append([one - mean for one in chosen])
    yield torch.cat(slopes)
    yield from (torch.cat(parts) for parts in zip(*scores, strict=True))


def _means(probabilities: torch.Tensor, changes: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the means of every change of the logits at every position (positions x changes)."""
    return torch.stack([(probabilities * one).sum(-1) for one in changes], -1)

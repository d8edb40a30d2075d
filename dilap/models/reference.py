"""The dense model as the reference of all quality: KL divergence to it, computed cheaply, and perplexity."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from transformers import PreTrainedModel

from dilap.models.compute import batches, compute_precision, product_type
from dilap.models.compute_device import HOST
from dilap.models.families import family_of
from dilap.models.processes import Processes
from dilap.models.tensor_file import Tensors, computed_once

ROWS = 128  # positions whose logits are held at once: 128 x 49152 in f32 is 25 MB, which malloc reuses


@dataclass(frozen=True, kw_only=True)
class Head:
    """The output embeddings E (vocabulary x hidden) and the soft cap c of the logits, None where they have none."""

    E: torch.Tensor
    softcap: float | None

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the logits, in f32, of final hidden states (positions x vocabulary)."""
        products = functional.linear(hidden.to(self.E.dtype), self.E).float()
        return products if self.softcap is None else products.div_(self.softcap).tanh_().mul_(self.softcap)

    def probabilities_(self, logits: torch.Tensor, normaliser: torch.Tensor) -> torch.Tensor:
        """Return the probabilities, without a soft cap in the place of the logits, which nothing needs any more."""
        return (logits.sub_(normaliser[:, None]) if self.softcap is None else logits - normaliser[:, None]).exp_()

    def through_cap(self, slopes: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Return gradients with respect to E h, given those with respect to the logits that the cap makes of it."""
        return slopes if self.softcap is None else slopes * (1 - (logits / self.softcap).square())

    def back(self, slopes: torch.Tensor) -> torch.Tensor:
        """Return gradients, in f32, with respect to hidden states, given those with respect to E h."""
        return (slopes.to(self.E.dtype) @ self.E).float()


@dataclass(frozen=True, kw_only=True)
class AtHead:
    """The KL of a model under test at every position, and gradients with respect to its final hidden states.

    `kls` is KL(dense || model) in nats (positions), `slope` its gradient (positions x hidden). `scores` has, for each
    sample of `labels` (samples x positions) drawn from the model's own distribution, the gradient of their
    log-likelihood (positions x hidden).
    """

    kls: torch.Tensor
    slope: torch.Tensor
    scores: list[torch.Tensor]
    labels: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Scores:
    """How well a model does on the teacher's text, for every sequence (sequences).

    `kls` is the mean KL(dense || model) per position, in nats; `losses` is the mean negative log-likelihood of all
    tokens but the first.
    """

    kls: torch.Tensor
    losses: torch.Tensor

    @property
    def kl(self) -> float:
        return float(self.kls.double().mean())

    @property
    def perplexity(self) -> float:
        return float(self.losses.double().mean().exp())


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """What the dense model predicts on `tokens` (sequences x length), kept without its logits.

    KL_t = logsumexp(E h_t) - <E' p_t, h_t> - constant_t, with p_t the dense model's probabilities at position t, h_t
    the final hidden state of the model under test, and E the head, which pruning leaves as it is. So one vector of the
    hidden size per position (`mean_embedding`, E' p_t) is all that has to be kept, instead of one of the vocabulary's
    size. `losses` are the dense model's own, as in `Scores` (sequences).

    An artifact gives logits and no hidden states, and logits with a soft cap are not linear in them. To compare with
    these the dense model's whole distributions are needed, which the head computes from the dense model's final states:
    `states` (sequences x length x hidden), kept only where they are asked for or there is a soft cap. `dense_head` is
    the dense model's head where models under test have another one; see `facing`.
    """

    tokens: torch.Tensor
    mean_embedding: torch.Tensor
    constant: torch.Tensor
    losses: torch.Tensor
    states: torch.Tensor | None = None
    dense_head: Head | None = None

    @property
    def perplexity(self) -> float:
        """Perplexity of the dense model."""
        return float(self.losses.double().mean().exp())

    def share(self, processes: Processes) -> "Teacher":
        """Return the answers on a process's share of the sequences; of one process, this object itself."""
        if processes.count == 1:
            return self
        of_sequences = {one.name: getattr(self, one.name) for one in fields(self) if one.name != "dense_head"}
        shares: dict[str, Any] = {name: processes.share(one) for name, one in of_sequences.items() if one is not None}
        return replace(self, **shares)

    @classmethod
    @torch.no_grad()
    def of(
        cls, model: PreTrainedModel, tokens: torch.Tensor, *, keep_states: bool = False, batch_tokens: int = 2048
    ) -> "Teacher":
        """Return the answers of `model` on `tokens` (sequences x length), with its final states if `keep_states`."""
        head = head_of(model)
        keep_states = keep_states or head.softcap is not None
        vectors, constants, losses, states = [], [], [], []
        for batch in batches(tokens, batch_tokens=batch_tokens, device=model.device):
            hidden = final_hidden(model, batch)
            if keep_states:
                states.append(hidden.reshape(*batch.shape, -1).to(HOST))
            for rows, labels in zip(hidden.split(ROWS), _next_tokens(batch).split(ROWS), strict=True):
                logits = head.logits(rows)
                normaliser = logits.logsumexp(-1)
                losses.append((normaliser - logits.gather(1, labels[:, None]).squeeze(1)).to(HOST))
                expected = None if head.softcap is None else (logits.softmax(-1) * logits).sum(-1)
                vector = head.back(logits.sub_(normaliser[:, None]).exp_())
                vectors.append(vector.to(HOST))
                constant = normaliser - ((vector * rows.float()).sum(-1) if expected is None else expected)
                constants.append(constant.to(HOST))
        shape = tokens.shape
        return cls(
            tokens=tokens.to(HOST),
            mean_embedding=torch.cat(vectors).reshape(*shape, -1),
            constant=torch.cat(constants).reshape(shape),
            losses=torch.cat(losses).reshape(shape)[:, :-1].mean(1),
            states=torch.cat(states) if keep_states else None,
        )

    @classmethod
    def once(
        cls, path: Path | None, model: PreTrainedModel, tokens: torch.Tensor, *, keep_states: bool = False
    ) -> "Teacher":
        """Return the teacher kept in `path`; make it, and keep it there, where it is missing."""

        def make() -> Tensors:
            made = cls.of(model, tokens, keep_states=keep_states)
            tensors = {one.name: getattr(made, one.name) for one in fields(cls)}
            return {name: tensor for name, tensor in tensors.items() if tensor is not None}

        found: dict[str, Any] = dict(computed_once(path, make))  # a head is never among them
        return cls(**found)

    @torch.no_grad()
    def facing(self, head: Head, *, dense_head: Head) -> "Teacher":
        """Return the same answers for models under test that have another `head` than the dense one. Needs `states`.

        Only the mean embedding is another one, E' p_t with E of that head and p_t the dense model's probabilities.
        """
        assert self.states is not None
        rows = self.states.reshape(-1, self.states.shape[-1]).split(ROWS)
        there = (one.to(dense_head.E.device) for one in rows if head.softcap is None)
        vectors = [head.back(dense_head.logits(one).softmax(-1)).to(HOST) for one in there]
        mean = torch.cat(vectors).reshape(self.mean_embedding.shape) if vectors else self.mean_embedding
        return replace(self, mean_embedding=mean, dense_head=dense_head)

    def log_probabilities(self, row: int, head: Head) -> torch.Tensor:
        """Return the dense model's log-probabilities for one sequence (length x vocabulary).

        `head` is the dense model's, or that of any model cut from it. Needs `states`.
        """
        assert self.states is not None
        return head.logits(self.states[row].to(head.E.device)).log_softmax(-1).to(HOST)

    @torch.no_grad()
    def at_head(
        self,
        hidden: torch.Tensor,
        head: Head,
        *,
        rows: slice | torch.Tensor,
        samples: int = 0,
        generator: torch.Generator | None = None,
        labels: torch.Tensor | None = None,
    ) -> AtHead:
        """Return losses and gradients for the sequences `rows`, given their final hidden states (positions x hidden).

        With `labels` (samples x positions) none are drawn.
        With p the model's probabilities, the gradient of the KL is E'p - E'p_dense, and that of the log-likelihood of a
        label is E[label] - E'p: one pass over the vocabulary gives both, and no logits are kept. Behind a soft cap all
        three are multiplied by its slope.
        """
        kls: list[torch.Tensor] = []
        slopes: list[torch.Tensor] = []
        scores: list[list[torch.Tensor]] = []
        drawn: list[torch.Tensor] = []
        given = None if labels is None else list(labels.split(ROWS, 1))
        for part, kept, constant in zip(*self._parts(hidden, head, rows), strict=True):
            logits = head.logits(part)
            normaliser = logits.logsumexp(-1)
            probabilities = head.probabilities_(logits, normaliser)
            mean = head.back(head.through_cap(probabilities, logits))
            expected, wanted = _expected(kept, part, logits, head, dense=self.dense_head or head)
            kls.append(normaliser - expected - constant)
            slopes.append(mean - wanted)
            if given is not None:
                own = given.pop(0)
            elif samples:
                own = draw(probabilities, num_samples=samples, generator=generator).T
            else:
                own = torch.zeros(0, len(part), dtype=torch.int64, device=part.device)
            scores.append([one - mean for one in _labelled(own, logits, head)])
            drawn.append(own)
        return AtHead(
            kls=torch.cat(kls),
            slope=torch.cat(slopes),
            scores=[torch.cat(parts) for parts in zip(*scores, strict=True)],
            labels=torch.cat(drawn, 1),
        )

    @torch.no_grad()
    def scores(self, model: PreTrainedModel, *, batch_tokens: int = 2048) -> Scores:
        """Return KL and loss on the same text of a model that has the dense model's head."""
        head, kls, losses, start = head_of(model), [], [], 0
        for batch in batches(self.tokens, batch_tokens=batch_tokens, device=model.device):
            rows = slice(start, start + len(batch))
            start += len(batch)
            hidden, labels = final_hidden(model, batch), _next_tokens(batch)
            divergences, surprises = [], []
            parts = zip(*self._parts(hidden, head, rows), labels.split(ROWS), strict=True)
            for part, kept, constant, wanted in parts:
                logits = head.logits(part)
                normaliser = logits.logsumexp(-1)
                expected, _ = _expected(kept, part, logits, head, dense=self.dense_head or head)
                divergences.append(normaliser - expected - constant)
                surprises.append(normaliser - logits.gather(1, wanted[:, None]).squeeze(1))
            kls.append(torch.cat(divergences).reshape(batch.shape).mean(1))
            losses.append(torch.cat(surprises).reshape(batch.shape)[:, :-1].mean(1))
        return Scores(kls=torch.cat(kls).to(HOST), losses=torch.cat(losses).to(HOST))

    def kls(self, model: PreTrainedModel) -> torch.Tensor:
        """Return the mean KL(dense || model) per position of every sequence, in nats (sequences)."""
        return self.scores(model).kls

    def _parts(
        self, hidden: torch.Tensor, head: Head, rows: slice | torch.Tensor
    ) -> tuple[Sequence[torch.Tensor], Sequence[torch.Tensor], Sequence[torch.Tensor]]:
        """Return, by `ROWS` positions, hidden states, what is kept of the dense model there, and the constants."""
        kept = self.mean_embedding if head.softcap is None else self.states
        assert kept is not None
        there = hidden.device
        kept, constants = kept[rows].to(there).reshape(hidden.shape), self.constant[rows].to(there).reshape(-1)
        return hidden.split(ROWS), kept.split(ROWS), constants.split(ROWS)

    def kl(self, model: PreTrainedModel) -> float:
        """Return the mean KL(dense || model) per position, in nats."""
        return float(self.kls(model).double().mean())


def _expected(
    kept: torch.Tensor, hidden: torch.Tensor, logits: torch.Tensor, head: Head, *, dense: Head
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the mean of the model's logits under the dense model, and its gradient with respect to `hidden`.

    `kept` is what is kept of the dense model: the mean embedding, or behind a soft cap the final hidden states, of
    which its head, `dense`, makes its logits.
    """
    if head.softcap is None:
        return (kept * hidden.float()).sum(-1), kept
    probabilities = dense.logits(kept).softmax(-1)
    return (probabilities * logits).sum(-1), head.back(head.through_cap(probabilities, logits))


def _labelled(labels: torch.Tensor, logits: torch.Tensor, head: Head) -> Iterator[torch.Tensor]:
    """Yield the gradient of the logit of every row of `labels` (... x positions) with respect to the hidden states."""
    for row in labels:
        slope = head.E[row].float()
        yield slope if head.softcap is None else head.through_cap(slope, logits.gather(1, row[:, None]))


def final_hidden(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    """Return the final hidden states, scaled so that the head makes the logits of them (positions x hidden)."""
    with compute_precision(model.device):
        hidden: torch.Tensor = model.model(input_ids=tokens.to(model.device), use_cache=False).last_hidden_state
    return before_head(model, hidden)


def before_head(model: PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor:
    """Return the last hidden states of a model with the scale of its logits (positions x hidden)."""
    return hidden.reshape(-1, hidden.shape[-1]) * family_of(model.config).logits_scale(model.config)


def _next_tokens(batch: torch.Tensor) -> torch.Tensor:
    """Return the label of every position (positions); the label at the end of a sequence is meaningless."""
    return batch.roll(-1, 1).reshape(-1)


def head_of(model: PreTrainedModel, *, weight: torch.Tensor | None = None) -> Head:
    """Return the head of a model, or one with another `weight`, in the type in which products with it are fastest."""
    E: torch.Tensor = model.get_output_embeddings().weight if weight is None else weight
    kind = product_type(E.dtype, E.device)
    return Head(E=E.detach().to(kind), softcap=family_of(model.config).logits_softcap(model.config))


class NextTokenLoss(torch.autograd.Function):
    """Mean cross entropy of labels (positions), given final hidden states (positions x hidden) and the head.

    The logits of only `ROWS` positions are held at a time. The head gets no gradient.
    """

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, head: Head, labels: torch.Tensor) -> torch.Tensor:
        total = torch.zeros((), device=hidden.device)
        slopes: list[torch.Tensor] = []
        for part, wanted in zip(hidden.split(ROWS), labels.split(ROWS), strict=True):
            logits = head.logits(part)
            total += functional.cross_entropy(logits, wanted, reduction="sum")
            mean = head.back(head.through_cap(logits.softmax(-1), logits))
            slopes.extend(mean - one for one in _labelled(wanted[None], logits, head))
        ctx.save_for_backward(torch.cat(slopes).div_(len(labels)).to(hidden.dtype))
        return total / len(labels)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (slope,) = ctx.saved_tensors
        return gradient * slope, None, None


def next_token_loss(model: PreTrainedModel, batch: torch.Tensor) -> torch.Tensor:
    """Return the mean cross entropy of the next token over a batch (sequences x length), for a backward pass.

    Gradients reach everything but the head.
    """
    batch = batch.to(model.device)
    hidden = final_hidden(model, batch).reshape(*batch.shape, -1)[:, :-1]
    arguments = hidden.flatten(0, 1), head_of(model), batch[:, 1:].flatten()
    loss: torch.Tensor = NextTokenLoss.apply(*arguments)  # type: ignore[no-untyped-call]
    return loss


def draw(probabilities: torch.Tensor, *, num_samples: int = 1, generator: torch.Generator | None) -> torch.Tensor:
    """Draw indices (rows x samples) from `probabilities` (rows x indices), by numbers that are drawn on the host."""
    # Inverting the distribution function takes a fifth of torch.multinomial's time.
    cumulative = probabilities.cumsum(-1)
    level = torch.rand(len(probabilities), num_samples, generator=generator).to(cumulative.device) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, level, right=True).clamp_max(probabilities.shape[1] - 1)


def perplexity(model: PreTrainedModel, tokens: torch.Tensor) -> float:
    """Return exp of the mean negative log-likelihood of `tokens` (sequences x length)."""
    return float(torch.tensor(negative_log_likelihood(model, tokens)).exp())


@torch.no_grad()
def negative_log_likelihood(model: PreTrainedModel, tokens: torch.Tensor) -> float:
    """Return the mean negative log-likelihood, in nats, of every token but the first of each sequence."""
    head = head_of(model)
    total, count = 0.0, 0
    for batch in batches(tokens, batch_tokens=2048, device=model.device):
        hidden = final_hidden(model, batch).reshape(*batch.shape, -1)[:, :-1].reshape(-1, head.E.shape[1])
        for rows, labels in zip(hidden.split(ROWS), batch[:, 1:].reshape(-1).split(ROWS), strict=True):
            total += float(functional.cross_entropy(head.logits(rows), labels, reduction="sum"))
            count += len(labels)
    return total / count

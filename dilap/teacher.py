"""The dense model as reference: KL divergence to it, cheaply, and perplexity."""

from dataclasses import dataclass

import torch
from torch.nn import functional
from transformers import PreTrainedModel

from dilap.compute import batches, compute_precision

ROWS = 128  # positions whose logits are held at once: 128 x 49152 in f32 is 25 MB, which malloc reuses


@dataclass(frozen=True, kw_only=True)
class AtHead:
    """Losses of a model under test at every position, as its final hidden states see them.

    `kls` is the KL (positions), `slope` its gradient and `scores` the gradients of the log-likelihood of labels drawn
    from the model's own distribution, one for each sample (positions x hidden).
    """

    kls: torch.Tensor
    slope: torch.Tensor
    scores: list[torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """What the dense model says about `tokens` (sequences x length), without its logits.

    KL_t = logsumexp(E h_t) - <E' p_t, h_t> - constant_t, with p_t the dense model's probabilities, h_t the final
    hidden state of the model under test and E the head, which pruning leaves alone. So a hidden-sized vector a
    position (`mean_embedding`, E' p_t) is all that has to be kept, not a vocabulary-sized one.
    """

    tokens: torch.Tensor
    mean_embedding: torch.Tensor
    constant: torch.Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, model: PreTrainedModel, tokens: torch.Tensor, *, batch_tokens: int = 2048) -> "Teacher":
        head = model.get_output_embeddings().weight
        vectors, constants = [], []
        for batch in batches(tokens, batch_tokens=batch_tokens):
            for rows in final_hidden(model, batch).split(ROWS):
                logits = logits_of(rows, head).float()
                normaliser = logits.logsumexp(-1)
                with compute_precision():
                    vector = ((logits - normaliser[:, None]).exp().to(head.dtype) @ head).float()
                vectors.append(vector)
                constants.append(normaliser - (vector * rows.float()).sum(-1))
        shape = tokens.shape
        return cls(
            tokens=tokens,
            mean_embedding=torch.cat(vectors).reshape(*shape, -1),
            constant=torch.cat(constants).reshape(shape),
        )

    @torch.no_grad()
    def at_head(
        self,
        hidden: torch.Tensor,
        head: torch.Tensor,
        *,
        rows: slice | torch.Tensor,
        samples: int = 0,
        generator: torch.Generator | None = None,
    ) -> AtHead:
        """Losses and gradients for the sequences `rows`, given their final hidden states (positions x hidden).

        With p the model's probabilities the gradient of the KL is E'p - E'p_dense and that of the log-likelihood of a
        label E[label] - E'p: one pass over the vocabulary serves them all, and no logits are kept.
        """
        normalisers, means, labels = [], [], []
        for part in hidden.split(ROWS):
            logits = logits_of(part, head).float()
            normalisers.append(logits.logsumexp(-1))
            probabilities = logits.sub_(normalisers[-1][:, None]).exp_()
            with compute_precision():
                means.append((probabilities.to(head.dtype) @ head).float())
            if samples:
                labels.append(draw(probabilities, num_samples=samples, generator=generator))
        mean = torch.cat(means)
        drawn = torch.cat(labels) if samples else torch.empty(len(hidden), 0, dtype=torch.long)
        scores = [head[labels].float() - mean for labels in drawn.T]
        slope = mean - self.mean_embedding[rows].reshape(hidden.shape)
        return AtHead(kls=self._kls(torch.cat(normalisers), hidden, rows), slope=slope, scores=scores)

    @torch.no_grad()
    def kls(self, model: PreTrainedModel, *, batch_tokens: int = 2048) -> torch.Tensor:
        """Mean KL(dense || model) per position of every sequence, in nats."""
        head = model.get_output_embeddings().weight
        found, start = [], 0
        for batch in batches(self.tokens, batch_tokens=batch_tokens):
            rows = slice(start, start + len(batch))
            start += len(batch)
            hidden = final_hidden(model, batch)
            normaliser = torch.cat([logits_of(part, head).float().logsumexp(-1) for part in hidden.split(ROWS)])
            found.append(self._kls(normaliser, hidden, rows).reshape(batch.shape).mean(1))
        return torch.cat(found)

    def _kls(self, normaliser: torch.Tensor, hidden: torch.Tensor, rows: slice | torch.Tensor) -> torch.Tensor:
        wanted = self.mean_embedding[rows].reshape(hidden.shape)
        return normaliser - (wanted * hidden.float()).sum(-1) - self.constant[rows].reshape(-1)

    def kl(self, model: PreTrainedModel) -> float:
        """Mean KL(dense || model) per position, in nats."""
        return float(self.kls(model).double().mean())


def final_hidden(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    """The states that the head reads, (positions x hidden)."""
    with compute_precision():
        hidden: torch.Tensor = model.model(input_ids=tokens, use_cache=False).last_hidden_state
    return hidden.reshape(-1, hidden.shape[-1])


def logits_of(hidden: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    with compute_precision():
        return functional.linear(hidden.to(head.dtype), head)


def draw(probabilities: torch.Tensor, *, num_samples: int = 1, generator: torch.Generator | None) -> torch.Tensor:
    """Indices (rows x samples) by inverting the distribution function: a fifth of torch.multinomial's time."""
    cumulative = probabilities.cumsum(-1)
    level = torch.rand(len(probabilities), num_samples, generator=generator) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, level, right=True).clamp_max(probabilities.shape[1] - 1)


def perplexity(model: PreTrainedModel, tokens: torch.Tensor) -> float:
    """exp of the mean negative log-likelihood."""
    return float(torch.tensor(negative_log_likelihood(model, tokens)).exp())


@torch.no_grad()
def negative_log_likelihood(model: PreTrainedModel, tokens: torch.Tensor) -> float:
    """Mean over every token but the first of each sequence, in nats."""
    head = model.get_output_embeddings().weight
    total, count = 0.0, 0
    for batch in batches(tokens, batch_tokens=2048):
        hidden = final_hidden(model, batch).reshape(*batch.shape, -1)[:, :-1].reshape(-1, head.shape[1])
        for rows, labels in zip(hidden.split(ROWS), batch[:, 1:].reshape(-1).split(ROWS), strict=True):
            total += float(functional.cross_entropy(logits_of(rows, head).float(), labels, reduction="sum"))
            count += len(labels)
    return total / count

"""What a reader says about tokens: the log-likelihood of a continuation, and of every token of a text."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from dilap.backends import MAX_READ_TOKENS, Reader
from dilap.core.errors import Unsupported
from dilap.models.reference import Head, Scores, Teacher


@dataclass(frozen=True, kw_only=True)
class Request:
    """A question in token ids: how likely is `continuation` after `context`? Neither is empty."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]

    def read(self, max_tokens: int) -> tuple[int, ...]:
        """Return what a model has to read to answer: at most `max_tokens`, of which the left end is dropped."""
        return (self.context + self.continuation)[-(max_tokens + 1) : -1]


@dataclass(frozen=True, kw_only=True)
class Score:
    """The continuation's log-likelihood in nats, and whether it is what greedy decoding would give."""

    log_likelihood: float
    is_greedy: bool


def score(
    reader: Reader,
    requests: Sequence[Request],
    *,
    max_tokens: int,
    progress: Callable[[int], None] = lambda _: None,
) -> list[Score]:
    """Return one score for each request, in the order of the requests.

    Requests are read sorted by their tokens, so that neighbours share the longest prefixes: the examples of a few-shot
    task are read once for a subject, and a question once for all its answers.
    """
    texts = [request.read(max_tokens) for request in requests]
    scores: list[Score | None] = [None] * len(requests)
    reader.reserve(max(map(len, texts), default=1))
    before: tuple[int, ...] = ()
    rows = torch.empty(0, reader.vocab_size)
    # On a CPU this is as fast as batches, which stream the weights once for 4 answers and take no padding for them, and
    # 5 times faster with 5 examples.
    for index in sorted(range(len(texts)), key=lambda one: texts[one]):
        text, continuation = texts[index], requests[index].continuation
        if text != before or len(rows) < len(continuation):
            start = min(_num_shared(before, text), len(text) - len(continuation))
            rows = torch.cat(list(log_probabilities(reader, text, start=start, num_rows=len(continuation))))
            before = text
        scores[index] = _score(rows[-len(continuation) :], continuation)
        progress(1)
    return [one for one in scores if one is not None]


def log_probabilities(reader: Reader, text: Sequence[int], *, start: int = 0, num_rows: int) -> Iterator[torch.Tensor]:
    """Yield log-probabilities (rows x vocabulary) of what follows each of the last `num_rows` tokens, in parts.

    The reader must have read the first `start` tokens of `text` already.
    """
    first_row = len(text) - num_rows
    for at in range(start, len(text), MAX_READ_TOKENS):
        tokens = text[at : at + MAX_READ_TOKENS]
        wanted = min(len(tokens), at + len(tokens) - first_row)
        logits = reader.read(tokens, start=at, num_rows=max(1, wanted))
        if wanted > 0:
            yield torch.from_numpy(logits).log_softmax(-1)


def beside_teacher(
    reader: Reader, teacher: Teacher, head: Head, *, progress: Callable[[int], None] = lambda _: None
) -> Scores:
    """Score an artifact on the teacher's text beside the dense model, with the very token ids that torch read.

    `head` is the dense model's. Raises Unsupported where the artifact cannot read the text.
    """
    length = teacher.tokens.shape[1]
    if reader.max_tokens < length:
        raise Unsupported(f"it reads {reader.max_tokens} tokens at once, and a sequence of the text has {length}")
    if reader.vocab_size != len(head.E):
        raise Unsupported(f"it knows {reader.vocab_size} tokens, and the model {len(head.E)}")
    reader.reserve(length)
    kls, losses = torch.zeros(len(teacher.tokens)), torch.zeros(len(teacher.tokens))
    for number, tokens in enumerate(teacher.tokens):
        rows = torch.cat(list(log_probabilities(reader, tokens.tolist(), num_rows=length)))
        dense = teacher.log_probabilities(number, head)
        kls[number] = (dense.exp() * (dense - rows)).sum(-1).double().mean()
        losses[number] = -rows[:-1].gather(1, tokens[1:, None]).double().mean()
        progress(length)
    return Scores(kls=kls, losses=losses)


def _num_shared(first: Sequence[int], second: Sequence[int]) -> int:
    """Return how many tokens two texts have in common at their beginning."""
    for count, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return count
    return min(len(first), len(second))


def _score(rows: torch.Tensor, continuation: Sequence[int]) -> Score:
    tokens = torch.tensor(continuation)
    chosen = rows[torch.arange(len(tokens)), tokens].double()
    return Score(log_likelihood=float(chosen.sum()), is_greedy=bool((rows.argmax(-1) == tokens).all()))

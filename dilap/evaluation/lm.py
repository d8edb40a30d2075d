"""A `Reader` in the form in which lm-eval takes a model; its scores are those of lm-eval's own `hf` model."""

from collections.abc import Callable, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from dilap.backends import Reader
from dilap.core.errors import InvalidInput, Unsupported
from dilap.evaluation.scoring import Request, score
from dilap.evaluation.tokenizers import TextTokenizer

Bar = Callable[..., Any]  # as `Progress.bar` is called


class ReaderLM(TemplateLM):  # type: ignore[misc]
    """A model for lm-eval that asks a `Reader`. Sequences of more than `max_tokens` lose their left end."""

    def __init__(self, reader: Reader, words: TextTokenizer, *, max_tokens: int, bar: Bar) -> None:
        super().__init__()
        self._reader, self._words, self._max_tokens, self._bar = reader, words, max_tokens, bar

    @property
    def eot_token_id(self) -> int:
        return self._words.prefix

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: object) -> list[int]:
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self._words.prefix_text)
        return self._words.encode(string, special=add_special_tokens)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        return found

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:  # noqa: ARG002
        windows = [self._windows(request.args[0]) for request in requests]
        scores = iter(self._scores([window for one in windows for window in one], title="documents"))
        return [sum(next(scores)[0] for _ in one) for one in windows]

    def _windows(self, text: str) -> list[Request]:
        """Cut a document into windows that do not overlap, each read after one token of context."""
        pairs = get_rolling_token_windows(
            self.tok_encode(text), prefix_token=self._words.prefix, max_seq_len=self._max_tokens, context_len=1
        )
        return [_request(*make_disjoint_window(pair)) for pair in pairs]

    def _loglikelihood_tokens(
        self, requests: list[tuple[object, list[int], list[int]]], **_: object
    ) -> list[tuple[float, bool]]:
        return self._scores([_request(context, continuation) for _, context, continuation in requests], title="answers")

    def _scores(self, requests: Sequence[Request], *, title: str) -> list[tuple[float, bool]]:
        longest = max((len(one.continuation) for one in requests), default=0)
        if longest > self._max_tokens:
            raise InvalidInput(f"an answer has {longest} tokens, and the model reads {self._max_tokens} at most")
        with self._bar(title, total=len(requests), unit="request") as bar:
            found = score(self._reader, requests, max_tokens=self._max_tokens, progress=bar.update)
        return [(one.log_likelihood, one.is_greedy) for one in found]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:  # noqa: ARG002
        raise Unsupported(f"task {requests[0].task_name} has the model write text; dilap-eval scores given text only")


def _request(context: list[int], continuation: list[int]) -> Request:
    return Request(context=tuple(context), continuation=tuple(continuation))

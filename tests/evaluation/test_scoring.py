"""Scores of texts: what is shared between them is read once, and every runtime gives what torch gives."""

from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from standins.models import VOCAB_SIZE, logits, pruned_model, random_tokens, tiny_model, tiny_tokenizer
from transformers import PreTrainedModel

from dilap import backends, export
from dilap.backends import MAX_READ_TOKENS, Reader, readers
from dilap.core.artifact import Artifact
from dilap.core.codec import decode, read_json
from dilap.core.errors import DilapError
from dilap.evaluation.scoring import Request, log_probabilities, score
from dilap.evaluation.torch_reader import TorchReader
from dilap.models.load import load

RUNTIMES = sorted(readers.READERS)


def request(context: list[int], continuation: list[int]) -> Request:
    return Request(context=tuple(context), continuation=tuple(continuation))


def questions(seed: int = 0) -> list[Request]:
    """Four answers to each of three questions, two of them one token long, as lm-eval asks."""
    rows = random_tokens(3, 20, seed=seed).tolist()
    answers = [[5], [6], [7, 8], [9, 10, 11]]
    return [request(row[: 12 + at], answer) for at, row in enumerate(rows) for answer in answers]


def expected(model: PreTrainedModel, one: Request) -> float:
    tokens = torch.tensor([[*one.context, *one.continuation]])
    rows = logits(model, tokens)[0, :-1].log_softmax(-1)[-len(one.continuation) :]
    return float(rows.gather(1, tokens[0, -len(one.continuation) :, None]).sum())


def test_scores_are_those_of_whole_passes() -> None:
    model = tiny_model("llama")
    found = score(TorchReader(model), questions(), max_tokens=128)
    np.testing.assert_allclose(
        [one.log_likelihood for one in found], [expected(model, one) for one in questions()], rtol=1e-5
    )


def test_greedy_continuation_is_noticed() -> None:
    model = tiny_model("llama")
    context = random_tokens(1, 12)
    best = int(logits(model, context)[0, -1].argmax())
    asked = [request(context[0].tolist(), [token]) for token in (best, (best + 1) % VOCAB_SIZE)]
    assert [one.is_greedy for one in score(TorchReader(model), asked, max_tokens=128)] == [True, False]


def test_too_long_texts_lose_their_left_end() -> None:
    model, tokens = tiny_model("llama"), random_tokens(1, 60)[0].tolist()
    whole, cut = request(tokens[:58], tokens[58:]), request(tokens[27:58], tokens[58:])
    both = score(TorchReader(model), [whole], max_tokens=32), score(TorchReader(model), [cut], max_tokens=128)
    assert both[0][0].log_likelihood == pytest.approx(both[1][0].log_likelihood, rel=1e-5)


class CountingReader(TorchReader):
    """Remembers how many tokens were read."""

    num_read = 0

    def read(self, token_ids: Sequence[int], *, start: int, num_rows: int) -> NDArray[np.float32]:
        self.num_read += len(token_ids)
        return super().read(token_ids, start=start, num_rows=num_rows)


def test_a_shared_context_is_read_once() -> None:
    reader = CountingReader(tiny_model("llama"))
    context = random_tokens(1, 30)[0].tolist()
    score(reader, [request(context, [token]) for token in range(4)], max_tokens=128)
    assert reader.num_read == 30


def test_long_texts_are_read_in_parts() -> None:
    model = tiny_model("llama", max_position_embeddings=2 * MAX_READ_TOKENS)
    tokens = random_tokens(1, MAX_READ_TOKENS + 40)
    parts = list(log_probabilities(TorchReader(model), tokens[0].tolist(), num_rows=60))
    assert [len(part) for part in parts] == [20, 40]
    torch.testing.assert_close(torch.cat(parts), logits(model, tokens)[0, -60:].log_softmax(-1), rtol=1e-4, atol=1e-4)


def test_attention_free_layers_are_read(tmp_path: Path) -> None:
    model = pruned_model("llama", {"layers.0.kv_groups": (), "layers.1.channels": tuple(range(32))})
    found = score(TorchReader(model), questions(), max_tokens=128)
    np.testing.assert_allclose(
        [one.log_likelihood for one in found], [expected(model, one) for one in questions()], rtol=1e-5
    )


@pytest.fixture(params=RUNTIMES)
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[PreTrainedModel, Reader]]:
    """A tiny llama, and its artifact in a runtime."""
    backend = request.param
    if reason := backends.get(backend).unavailable():
        pytest.skip(reason)
    if backend == "executorch":
        made: Path = request.getfixturevalue("in_executorch")
        model, folder = load(str(made / "checkpoint")).model, made / "artifact"
    else:
        model, folder = tiny_model("llama"), tmp_path / "out"
        tiny_tokenizer(tmp_path / "words")
        export.get(backend).export(model, tokenizer=tmp_path / "words", precision="f32", plan_digest="", out=folder)
    artifact = decode(Artifact, read_json(folder / "artifact.json"), source="artifact.json")
    with closing(readers.open_reader(backend, folder / artifact.path, threads=1)) as reader:
        yield model, reader


def test_an_artifact_scores_as_its_torch_model(opened: tuple[PreTrainedModel, Reader]) -> None:
    model, reader = opened
    found = [score(one, questions(), max_tokens=64) for one in (reader, TorchReader(model))]
    # llama.cpp keeps keys and values in f16
    for mine, theirs in zip(*found, strict=True):
        assert mine.log_likelihood == pytest.approx(theirs.log_likelihood, rel=2e-3)


def test_an_artifact_says_how_much_it_reads(opened: tuple[PreTrainedModel, Reader]) -> None:
    assert (opened[1].max_tokens, opened[1].vocab_size) == (128, VOCAB_SIZE)


def test_an_engine_for_another_machine_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DilapError) as raised:
        readers.open_reader("tensorrt", tmp_path / "model.onnx", threads=1)
    assert "\n" not in str(raised.value)

"""Streamed text: packed, mixed, endless, and resumed at the very next sequence."""

import gzip
import json
from pathlib import Path

import pytest
import torch
from standins.models import tiny_tokenizer

from dilap.core.errors import InvalidInput
from dilap.models.recovery import stream
from dilap.models.recovery.stream import Documents, PackedStream
from dilap.models.text_files import read_documents


@pytest.fixture(autouse=True)
def _few_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "MIXED", 4)


def records(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"id": n, "text": text}) + "\n" for n, text in enumerate(texts)))
    return path


def packed(paths: list[Path], folder: Path, *, seed: int = 0) -> PackedStream:
    return PackedStream([str(one) for one in paths], tiny_tokenizer(folder / "words"), length=16, seed=seed)


def test_documents_come_round_and_round(tmp_path: Path) -> None:
    first, second = records(tmp_path / "a.jsonl", ["one", "", "two"]), tmp_path / "b.txt"
    second.write_text("three\n\nfour")
    documents = Documents([str(first), str(second)])
    assert [next(documents).strip() for _ in range(6)] == ["one", "two", "three", "four", "one", "two"]


def test_packed_files_are_read(tmp_path: Path) -> None:
    path = tmp_path / "[a] *.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "one"}\n'))
    assert next(Documents([str(path)])) == "one"


def test_records_without_a_text_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"id": null, "text": null}\n{"id": null, "text": "one"}\n{"id": 3, "text": null}\n')
    documents = Documents([str(path)])
    documents.require_text()
    assert [next(documents) for _ in range(3)] == ["one"] * 3


def test_questions_and_answers_are_read_as_instructions(tmp_path: Path) -> None:
    rows = [
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        {"instruction": "Say.", "input": "", "output": None},
    ]
    path = tmp_path / "set.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    documents = Documents([str(path)])
    assert [next(documents)] == [next(documents)] == read_documents(str(path))


def test_every_token_is_seen_once_a_round(tmp_path: Path) -> None:
    words = tiny_tokenizer(tmp_path / "words")
    before = len(words("x")["input_ids"]) - 1
    texts = [f"{number:0{15 - before}}" for number in range(8)]  # a sequence each, with the end of text
    rows = packed([records(tmp_path / "a.jsonl", texts)], tmp_path).take(8)
    assert {words.decode(row[before:-1]) for row in rows} == set(texts)
    assert {int(row[-1]) for row in rows} == {words.eos_token_id}


def test_order_depends_on_the_seed_alone(tmp_path: Path) -> None:
    path = records(tmp_path / "a.jsonl", [f"text number {number}" for number in range(40)])
    first, same, other = (packed([path], tmp_path, seed=seed).take(8) for seed in (0, 0, 1))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("taken", [0, 3, 4, 9])
def test_another_stream_goes_on_with_the_next_sequence(taken: int, tmp_path: Path) -> None:
    paths = [records(tmp_path / name, [f"{name} {n} " * 5 for n in range(7)]) for name in ("a.jsonl", "b.jsonl")]
    whole, begun, resumed = (packed(paths, tmp_path) for _ in range(3))
    if taken:
        begun.take(taken)
    resumed.load_state_dict(json.loads(json.dumps(begun.state_dict())))
    assert torch.equal(resumed.take(11), whole.take(taken + 11)[taken:])


def test_text_that_cannot_be_read_is_refused_in_one_line(tmp_path: Path) -> None:
    numbers = tmp_path / "numbers.jsonl"
    numbers.write_text('{"a": 1, "b": 2}\n')
    blank = records(tmp_path / "blank.jsonl", ["", " "])
    with pytest.raises(InvalidInput, match=r"numbers\.jsonl: no column can be told to be the text"):
        Documents([str(numbers)]).require_text()
    with pytest.raises(InvalidInput, match=r"blank\.jsonl: it holds no text"):
        Documents([str(blank)]).require_text()
    with pytest.raises(InvalidInput, match=r"blank\.jsonl: no text in it"):
        next(Documents([str(blank)]))
    with pytest.raises(InvalidInput, match="is no file: give files or hub data sets"):
        Documents(["nothing.txt"])

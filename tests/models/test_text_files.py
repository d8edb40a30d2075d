"""Texts of all the files that people keep them in, and one line about every other."""

import csv
import gzip
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from dilap.core.errors import InvalidInput, Unavailable
from dilap.models.text_files import COLUMNS, read_documents, read_text

TEXTS = ("one, 'two'\nthree", "two\u2028lines\x85here", "vier äöü")
Record = dict[str, Any]


def needs_datasets() -> None:
    pytest.importorskip("datasets", reason="the datasets package is not installed")


def json_lines(records: Sequence[Record]) -> bytes:
    return "\n".join(json.dumps(record, ensure_ascii=False) for record in records).encode() + b"\n\n"


def json_list(records: Sequence[Record]) -> bytes:
    return json.dumps(records, indent=2).encode()


def comma_separated(records: Sequence[Record], *, delimiter: str = ",") -> bytes:
    file = io.StringIO()
    writer = csv.DictWriter(file, list(records[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(records)
    return file.getvalue().encode()


def tab_separated(records: Sequence[Record]) -> bytes:
    return comma_separated(records, delimiter="\t")


def parquet(records: Sequence[Record]) -> bytes:
    arrow, tables = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    file = io.BytesIO()
    tables.write_table(arrow.Table.from_pylist(list(records)), file)
    return file.getvalue()


FORMATS = {
    ".jsonl": json_lines,
    ".ndjson": json_lines,
    ".JSONL": json_lines,
    ".json": json_list,
    ".Json": json_lines,
    ".csv": comma_separated,
    ".tsv": tab_separated,
    ".TSV": tab_separated,
    ".parquet": parquet,
}


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(gzip.compress(content) if path.suffix.lower() == ".gz" else content)
    return path


@pytest.mark.parametrize("packed", ["", ".gz", ".GZ"])
@pytest.mark.parametrize("suffix", FORMATS)
def test_records_give_the_text_of_their_column_in_order(suffix: str, packed: str, tmp_path: Path) -> None:
    needs_datasets()
    records = [{"id": number, "text": text, "title": "t"} for number, text in enumerate(TEXTS)]
    path = write(tmp_path / f"corpus [1]*{suffix}{packed}", FORMATS[suffix](records))
    assert read_text(str(path)) == "\n\n".join(TEXTS)


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.md", "a.MD", "a.TXT.GZ"])
def test_plain_files_are_read_whole(name: str, tmp_path: Path) -> None:
    assert read_text(str(write(tmp_path / name, "\ufeffhéllo\r\nworld {}".encode()))) == "héllo\r\nworld {}"


@pytest.mark.parametrize("column", [*COLUMNS, "Text", "anything"])
def test_column_is_one_of_the_usual_names_or_the_only_one_of_strings(column: str, tmp_path: Path) -> None:
    needs_datasets()
    others = {"id": 1, "meta": {"k": 2}} if column == "anything" else {"id": 1, "label": "x"}
    path = write(tmp_path / "a.jsonl", json_lines([{**others, column: text} for text in TEXTS]))
    assert read_text(str(path)) == "\n\n".join(TEXTS)


def test_records_without_a_text_are_left_out(tmp_path: Path) -> None:
    needs_datasets()
    path = write(tmp_path / "a.jsonl", json_lines([{"text": "one"}, {"id": 2}, {"text": None}, {"text": "two"}]))
    assert read_text(str(path)) == "one\n\ntwo"


def test_list_of_strings_is_records(tmp_path: Path) -> None:
    needs_datasets()
    assert read_text(str(write(tmp_path / "a.json", b'["one", "two"]'))) == "one\n\ntwo"


def test_reading_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs_datasets()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    path = write(tmp_path / "a.csv", b"text\none\n")
    read_text(str(path))
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.pdf", b"%PDF-1.7", ".pdf is not read"),
        ("a.docx", b"PK\x03\x04", ".docx is not read"),
        ("a.zip", b"PK\x03\x04", ".zip is not read"),
        ("a.xml.gz", b"<a/>", ".xml is not read"),
        ("corpus", b"words", "a name without a suffix is not read"),
        (".gz", b"words", "a name without a suffix is not read"),
        ("a.txt", b"\xff\xfe\xfa", "not readable text (UnicodeDecodeError"),
        ("a.txt", b"words\0words", "not readable text (ValueError: it holds zero bytes"),
        ("a.txt", b" \n\t", "it holds no text"),
        ("a.txt.gz", b"", "it holds no text"),
        ("a.json", b"", "it is empty"),
        ("a.json", b"[]", "it has no records"),
        ("a.json", b" \n", "it has no records"),
        ("a.json", b'{"text": ', "not readable as .json (ArrowInvalid"),
        ("a.json", b'{"data": [{"text": "a"}]}', "no column can be told to be the text, it has data"),
        ("a.jsonl", b'{"text": "one"}\n{"text": ', "not readable as .jsonl"),
        ("a.jsonl", b'{"text": 3}\n', "no column can be told to be the text, it has text"),
        ("a.jsonl", b'{"text": ["a", "b"]}\n', "no column can be told to be the text, it has text"),
        ("a.jsonl", b'{"q": "a", "answer": "b"}\n', "it has q (strings), answer (strings)"),
        ("a.csv", b"q,answer\na,b\n", "it has q (strings), answer (strings)"),
        ("a.csv", b"id;title\n1;b\n", "it has id;title (strings)"),
        ("a.csv", b"id,n\n1,2\n", "it has id, n"),
        ("a.csv", b"text\nh\xe9\n", "not readable as .csv (UnicodeDecodeError"),
        ("a.csv", b"text\n", "it has no records"),
        ("a.csv", b"text,id\n,1\n", "no column can be told"),
        ("a.tsv", b'text\tid\n"open\t1\n', "not readable as .tsv (ParserError"),
        ("a.parquet", b"PAR1junk", "not readable as .parquet (ArrowInvalid"),
    ],
)
def test_anything_else_is_refused_in_one_line_that_says_what_is_read(
    name: str, content: bytes, words: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    needs_datasets()
    path = write(tmp_path / name, content)
    with pytest.raises(InvalidInput) as caught:
        read_text(str(path))
    text = str(caught.value)
    assert text.startswith(str(path))
    assert words in text
    assert "plain text (.txt .text .md) and records (.json .jsonl .ndjson .csv .tsv .parquet)" in text
    assert "text, content, page" in text
    assert "\n" not in text
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("damage", ["truncated", "not_gzip", "bad_block"])
@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.gz"])
def test_broken_gzip_is_invalid_input(damage: str, name: str, tmp_path: Path) -> None:
    whole = bytearray(gzip.compress(json_lines([{"text": f"word{number} the fox"} for number in range(400)])))
    if damage == "bad_block":
        whole[40:60] = bytes(20)
    path = tmp_path / name
    path.write_bytes({"truncated": bytes(whole[:50]), "not_gzip": b"plain", "bad_block": bytes(whole)}[damage])
    with pytest.raises(InvalidInput, match=r"a\.\w+\.gz: not readable text"):
        read_text(str(path))


def test_folder_is_invalid_input(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="is no file: give a file or a hub data set"):
        read_text(str(tmp_path))


@pytest.mark.parametrize("name", ["/nowhere/a.txt", "nowhere/a.txt", "", "a/b/c", "wikitext"])
def test_missing_file_is_invalid_input_that_says_what_would_do(name: str) -> None:
    with pytest.raises(InvalidInput, match="give a file or a hub data set"):
        read_text(name)


def test_records_without_the_library_are_one_line_with_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    path = write(tmp_path / "a.jsonl", b'{"text": "a"}')
    with pytest.raises(Unavailable, match=r"a\.jsonl: reading \.jsonl needs the datasets package; run: pip install"):
        read_text(str(path))


def test_plain_text_needs_no_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert read_text(str(write(tmp_path / "a.txt", b"words"))) == "words"


def test_instruction_sets_are_written_in_the_prompt_of_alpaca(tmp_path: Path) -> None:
    rows = [
        {"instruction": "Add.", "input": "1 and 2", "output": "3"},
        {"instruction": "Greet.", "input": "", "output": "Hello"},
    ]
    text = read_text(str(write(tmp_path / "a.jsonl", json_lines(rows))))
    assert text == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1 and 2\n\n"
        "### Response:\n3\n\n"
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nGreet.\n\n### Response:\nHello"
    )


def test_a_hub_set_is_asked_for_with_its_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets, asked = pytest.importorskip("datasets", reason="the datasets package is not installed"), []

    def load_dataset(*arguments: object, **options: object) -> Any:
        asked.append((arguments, options))
        return datasets.Dataset.from_list([{"text": "one"}, {"text": "two"}, {"text": "three"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read_documents("allenai/c4:en", most=2) == ["one", "two"]
    assert read_text("user/name") == "one\n\ntwo\n\nthree"
    assert [arguments for arguments, _ in asked] == [("allenai/c4", "en"), ("user/name", None)]

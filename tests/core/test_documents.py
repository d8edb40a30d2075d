"""JSON and TOML from elsewhere: what is taken, and that all else is refused in one line that names the file."""

from pathlib import Path

import pytest

from dilap.core.codec import read_json
from dilap.core.documents import MAX_DEPTH, int64, parse_json, read_text, read_toml
from dilap.core.errors import InvalidInput

BAD_JSON = {
    "cut off": b'{"a": ',
    "nothing": b"",
    "a list": b"[1]",
    "null": b"null",
    "two values of one key": b'{"a": 1, "a": 2}',
    "NaN": b'{"a": NaN}',
    "Infinity": b'{"a": -Infinity}',
    "a number beyond all": b'{"a": 1e999}',
    "an integer of 65 bits": b'{"a": 18446744073709551616}',
    "an integer of 5,000 digits": b'{"a": ' + b"9" * 5000 + b"}",
    "half a character": b'{"a": "\\ud800"}',
    "no UTF-8": b'{"a": "\xff"}',
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "nested deeper than the parser goes": b'{"a":' * 100_000,
    "nested deeper than is sensible": b'{"a":' + b"[" * MAX_DEPTH + b"]" * MAX_DEPTH + b"}",
    "a NUL": b"\0",
}


@pytest.mark.parametrize("what", BAD_JSON)
def test_a_bad_document_is_invalid_input_that_names_the_file(tmp_path: Path, what: str) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(BAD_JSON[what])
    with pytest.raises(InvalidInput, match=r"x\.json: .*") as caught:
        read_json(path)
    assert len(str(caught.value)) < len(str(path)) + 200


def test_a_document_is_read_as_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('\ufeff{"a": [1, -2.5, "\\ud83d\\ude00", null, 9223372036854775807]}', encoding="utf-8")
    assert read_json(path) == {"a": [1, -2.5, "😀", None, 2**63 - 1]}


def test_a_file_is_read_no_further_than_its_limit() -> None:
    with pytest.raises(InvalidInput, match="larger than 1 MB"):
        read_text(Path("/dev/zero"), max_bytes=1 << 20)


@pytest.mark.parametrize("content", [b"a = " + b"[" * 5000, b"a = 1\na = 2", b"a = " + b"9" * 5000, b"\xff", b"[["])
def test_bad_toml_is_invalid_input_that_names_the_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "devices.toml"
    path.write_bytes(content)
    with pytest.raises(InvalidInput, match=r"devices\.toml: "):
        read_toml(path)


def test_a_folder_is_no_document(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="not readable"):
        read_json(tmp_path)


@pytest.mark.parametrize("text", ["²", "1" * 20, "0x10", "", "1.0"])
def test_a_text_that_is_no_integer_of_64_bits_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="int"):
        int64(text)


def test_half_characters_are_joined_by_json() -> None:
    assert parse_json('"\\ud83d\\ude00"', source="x") == "😀"

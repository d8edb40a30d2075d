"""JSON documents, and files that are either whole or absent."""

import errno
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from dilap import registry
from dilap.codec import canonical, decode, digest, encode, file_sha256, read_json, write_json, written_aside
from dilap.errors import InvalidInput
from dilap.types import Budget, Fingerprint, LayerWidths, Workload

WORKLOAD = Workload(phase="prefill", prompt_tokens=7)


def test_value_survives_a_round_trip() -> None:
    assert decode(Workload, encode(WORKLOAD), source="x") == WORKLOAD


def test_document_names_its_type_and_version() -> None:
    document = encode(WORKLOAD)
    assert (document["type"], document["version"]) == ("Workload", 1)


def test_integer_in_a_float_field_is_read_as_float() -> None:
    found = decode(Budget, {**encode(Budget(seconds=1.0)), "seconds": 1}, source="x")
    assert type(found.seconds) is float


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"threads": "2"}, "threads"),
        ({"threads": True}, "threads"),
        ({"threads": 2.5}, "threads"),
        ({"phase": "train"}, "phase"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_damaged_document_names_the_file_and_the_field(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidInput, match=rf"^work\.json: damaged Workload: .*{field}"):
        decode(Workload, encode(WORKLOAD) | changes, source="work.json")


def test_missing_field_is_named() -> None:
    document = encode(LayerWidths(num_heads=1, num_kv_heads=1, num_channels=1))
    del document["num_heads"]
    with pytest.raises(InvalidInput, match=r"^x: damaged LayerWidths: .*num_heads"):
        decode(LayerWidths, document, source="x")


def test_values_are_validated_on_reading() -> None:
    with pytest.raises(InvalidInput, match="one positive number"):
        decode(Budget, encode(Budget(seconds=1.0)) | {"seconds": -1.0}, source="x")


def test_document_of_another_type_is_refused() -> None:
    with pytest.raises(InvalidInput, match=r"x: expected a Budget, got type 'Workload'"):
        decode(Budget, encode(WORKLOAD), source="x")


def test_document_of_a_newer_version_is_refused() -> None:
    with pytest.raises(InvalidInput, match="version 2, this DiLAP reads 1"):
        decode(Workload, encode(WORKLOAD) | {"version": 2}, source="x")


def test_nested_dictionaries_are_checked() -> None:
    fields: dict[str, Any] = dict.fromkeys(
        ["device", "machine", "processor", "power_mode", "runtime", "runtime_version", "runtime_build"], "x"
    )
    document = {"type": "Fingerprint", "version": 1, **fields, "num_cores": 1, "memory_bytes": 1}
    document |= {"last_level_cache_bytes": 1, "soft": {"governor": 3}}
    with pytest.raises(InvalidInput, match=r"soft: .*expected str, got 3"):
        decode(Fingerprint, document, source="x")


def test_digest_does_not_depend_on_the_order_of_keys() -> None:
    assert canonical({"b": 1, "a": 2}) == canonical({"a": 2, "b": 1})
    assert digest({"b": 1, "a": 2}) == digest({"a": 2, "b": 1})


def test_file_digest_is_sha256(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    assert file_sha256(tmp_path / "file").startswith("ba7816bf")


def test_json_survives_a_round_trip(tmp_path: Path) -> None:
    write_json(tmp_path / "new" / "x.json", {"ä": [1, 2.5, None]})
    assert read_json(tmp_path / "new" / "x.json") == {"ä": [1, 2.5, None]}


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"[1]"])
def test_unreadable_json_is_invalid_input_that_names_the_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(InvalidInput, match=r"x\.json: (not readable JSON|expected a JSON object)"):
        read_json(path)


def test_absent_json_is_invalid_input(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"x\.json: no such file"):
        read_json(tmp_path / "x.json")


def write_half(path: Path, error: Exception) -> None:
    with written_aside(path) as temporary:
        temporary.write_text("half", encoding="utf-8")
        raise error


def test_failed_write_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError):
        write_half(tmp_path / "x", RuntimeError("killed"))
    assert list(tmp_path.iterdir()) == []


def test_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("old", encoding="utf-8")
    with pytest.raises(RuntimeError):
        write_half(tmp_path / "x", RuntimeError("killed"))
    assert (tmp_path / "x").read_text(encoding="utf-8") == "old"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_full_disk_is_invalid_input_that_says_how_much_is_free(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(InvalidInput, match=r"no space left to write .*x \(\d+ MB free\)"):
        write_half(tmp_path / "x", error)
    assert list(tmp_path.iterdir()) == []


def test_other_io_errors_pass_through(tmp_path: Path) -> None:
    with pytest.raises(PermissionError):
        write_half(tmp_path / "x", PermissionError(errno.EACCES, "denied"))


def test_unknown_name_suggests_a_close_one() -> None:
    with pytest.raises(InvalidInput, match=r"unknown method 'unifrom'; did you mean 'uniform'\? Known: dilap, uniform"):
        registry.get({"uniform": "x:y", "dilap": "x:y"}, "unifrom", kind="method")


def test_registry_imports_what_it_names() -> None:
    assert registry.get({"budget": "dilap.types:Budget"}, "budget", kind="value") is Budget

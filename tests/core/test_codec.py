"""JSON documents, and files that are either whole or absent."""

import errno
import math
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from dilap.core import registry
from dilap.core.codec import canonical, decode, digest, encode, file_sha256, read_json, write_json, written_aside
from dilap.core.errors import InvalidInput
from dilap.core.measurement import Fingerprint
from dilap.core.shape import LayerWidths
from dilap.core.workload import Budget, Workload

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
    with pytest.raises(InvalidInput, match=r"x cannot be written: no space left \(\d+ MB free\)"):
        write_half(tmp_path / "x", error)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "error",
    [
        PermissionError(errno.EACCES, "Permission denied"),
        SafetensorError("Error while serializing: I/O error: Permission denied (os error 13)"),
    ],
)
def test_what_the_system_refuses_is_invalid_input_that_names_the_file(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(InvalidInput, match=r"x cannot be written: Permission denied; choose another --out"):
        write_half(tmp_path / "x", error)


def test_half_a_write_of_numpys_is_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="no space left"):
        write_half(tmp_path / "x", OSError("4096 requested and 1024 written"))


def test_a_file_in_the_way_of_a_folder_is_invalid_input(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InvalidInput, match=r"cannot be written: (Not a directory|File exists)"):
        write_json(tmp_path / "file" / "folder" / "x.json", {})


def test_a_name_that_is_too_long_is_invalid_input(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="cannot be written: File name too long"):
        write_json(tmp_path / ("x" * 300), {})


def test_an_error_about_another_file_passes_through(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_half(tmp_path / "out" / "x", FileNotFoundError(errno.ENOENT, "No such file", "/elsewhere"))


def test_infinity_is_written_as_the_largest_number(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"perplexity": math.inf, "beside": [-math.inf]})
    assert read_json(tmp_path / "x.json") == {"perplexity": sys.float_info.max, "beside": [-sys.float_info.max]}


def test_what_is_no_number_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="not a number"):
        write_json(tmp_path / "x.json", {"kl": math.nan})


def test_unknown_name_suggests_a_close_one() -> None:
    with pytest.raises(InvalidInput, match=r"unknown method 'unifrom'; did you mean 'uniform'; known: dilap, uniform"):
        registry.get({"uniform": "x:y", "dilap": "x:y"}, "unifrom", kind="method")


def test_registry_imports_what_it_names() -> None:
    assert registry.get({"budget": "dilap.core.workload:Budget"}, "budget", kind="value") is Budget

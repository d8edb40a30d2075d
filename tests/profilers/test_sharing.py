"""Tables that are shared say what was measured and on what, and not whose machine it was."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from standins import ROOT
from standins.fabricated import FINGERPRINT, TINY_LAYER, tiny_llama
from standins.fake_job import call, fabricated_table, last_line
from standins.network_tables import measured_table

from dilap.cli import profile
from dilap.core.errors import InvalidInput
from dilap.core.workload import Workload
from dilap.profilers.tables import sharing
from dilap.profilers.tables.record import partner_path
from dilap.profilers.tables.table import LatencyTable

PRIVATE = replace(
    FINGERPRINT,
    serial_sha256="0123456789abcdef",
    soft={"kernel": "Linux 6.1.0-anna", "build": "anna@laptop"},
    runtime_build=r"AVX2 | flags=-ffile-prefix-map=/home/anna/src=. | C:\Users\anna\x, ~/anna/y | git-branch=r1/2",
)
CONTRIBUTED = sorted((ROOT / "profilers" / "measured").glob("*.jsonl"))


@pytest.fixture(scope="module")
def table() -> LatencyTable:
    found = fabricated_table(tiny_llama(TINY_LAYER, TINY_LAYER), Workload(precision="f16", context=64))
    header = replace(found.header, fingerprint=PRIVATE, created="2026-01-02T03:04:05+00:00")
    return LatencyTable(header, found.entries)


@pytest.fixture
def path(table: LatencyTable, tmp_path: Path) -> Path:
    table.write(tmp_path / "mine.jsonl")
    return tmp_path / "mine.jsonl"


def test_a_shared_table_has_nothing_private(path: Path, tmp_path: Path) -> None:
    text = sharing.share(path, tmp_path / "shared.jsonl").read_text()
    assert not any(word in text for word in ("anna", "0123456789abcdef", "6.1.0", "03:04", "laptop"))
    assert "git-branch=r1/2" in text


def test_a_shared_table_has_all_samples_and_costs(table: LatencyTable, path: Path, tmp_path: Path) -> None:
    found = sharing.read(sharing.share(path, tmp_path / "shared.jsonl"))
    assert found.entries == table.entries
    assert found.model() == table.model()
    assert found.header.fingerprint.processor == "Test"


def test_the_tables_of_several_devices_are_shared_together(table: LatencyTable, tmp_path: Path) -> None:
    replace(table, partners=(table,)).write(tmp_path / "mine.jsonl")
    out = sharing.share(tmp_path / "mine.jsonl", tmp_path / "shared.jsonl")
    assert "anna" not in partner_path(out, 2).read_text()


def test_tables_of_networks_are_shared_too(tmp_path: Path) -> None:
    measured_table().write(tmp_path / "mine.jsonl")
    assert sharing.read(sharing.share(tmp_path / "mine.jsonl", tmp_path / "shared.jsonl")).entries


def test_the_command_says_where_the_file_is(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call(profile.main, "--share", path, "--json") == 0
    name = json.loads(capsys.readouterr().out)["shared"]
    assert name.startswith("host_cpu-llamacpp-decode-f16-llama-")
    assert (tmp_path / name).is_file()
    assert call(profile.main, "--share", path) == 2
    assert "is there already: name another file with --out" in last_line(capsys)


def test_what_is_no_table_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other.jsonl").write_text('{"type": "Plan"}\n')
    with pytest.raises(InvalidInput, match="not the header of a latency table"):
        sharing.share(tmp_path / "other.jsonl", None)
    with pytest.raises(InvalidInput, match="no such latency table"):
        sharing.share(tmp_path / "none.jsonl", None)


def test_there_are_contributed_tables() -> None:
    assert CONTRIBUTED


@pytest.mark.parametrize("contributed", CONTRIBUTED, ids=lambda one: one.name)
def test_a_contributed_table_is_as_it_may_be_shared_and_can_be_trusted(contributed: Path) -> None:
    found = sharing.read(contributed)
    assert sharing.shared(found) == found
    assert contributed.name == sharing.shared_name(found)
    errors = found.model().holdout_errors()
    assert sorted(errors)[len(errors) // 2] < 0.1

"""The comparison: every method on the same rails, resumable, and one failure loses nothing else."""

import csv
import json
from pathlib import Path

import pytest
from fake_job import FAST, call, last_line

from dilap.cli import compare
from dilap.cli.comparison import Row, markdown
from dilap.codec import read_json
from dilap.methods.method import Pruned, PruneTask

pytestmark = pytest.mark.usefixtures("fake_device")


def fail(task: PruneTask) -> Pruned:
    """A user's method with a mistake in it."""
    raise KeyError("no such layer")


def compare_tiny(checkpoint: Path, corpus: Path, out: Path, *extra: str) -> int:
    arguments = ["--target", "host_cpu", "--model", checkpoint, "--calib", corpus, "--eval-text", corpus, "--out", out]
    return call(compare.main, *arguments, *FAST, "--recover-steps", "2", *extra)


def rows(out: Path) -> list[dict[str, object]]:
    found: list[dict[str, object]] = read_json(out / "compare.json")["rows"]
    return found


def test_rows_hold_what_is_compared(checkpoint: Path, corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    names = ["dilap", "flap", "shortgpt"]
    assert compare_tiny(checkpoint, corpus, out, "--budget", "80%", "65%", "--methods", *names) == 0
    assert [(row["method"], row["budget"]) for row in rows(out)] == [
        (method, budget) for budget in ("80%", "65%") for method in names
    ]
    for row in rows(out):
        empty = {key for key, value in row.items() if value is None}
        assert empty == {"error"}
        assert row["budget_used"] <= 1.0  # type: ignore[operator]
        low, high = row["seconds_ci"]  # type: ignore[misc]
        assert low <= row["seconds"] <= high  # type: ignore[has-type]


def test_one_failed_method_does_not_lose_the_others(checkpoint: Path, corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    methods = ["test_compare:fail", "magnitude"]
    assert compare_tiny(checkpoint, corpus, out, "--budget", "80%", "--methods", *methods) == 0
    failed, done = rows(out)
    assert failed["error"] == "'no such layer'"
    assert done["error"] is None
    assert "test_compare:fail failed: 'no such layer'" in (out / "compare.md").read_text()


def test_killed_comparison_goes_on_where_it_stopped(
    checkpoint: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--budget", "80%", "--methods", "magnitude", "shortgpt", "--recover", "none")

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("dilap.methods.shortgpt.walk", interrupt)
        assert compare_tiny(checkpoint, corpus, tmp_path / "out", *arguments) == 130
    assert [row["method"] for row in rows(tmp_path / "out")] == ["magnitude"]
    capsys.readouterr()
    assert compare_tiny(checkpoint, corpus, tmp_path / "out", *arguments) == 0
    said = capsys.readouterr().err
    assert "=== 2 of 2: shortgpt" in said
    assert "=== 1 of 2" not in said
    assert [row["method"] for row in rows(tmp_path / "out")] == ["magnitude", "shortgpt"]


def test_models_are_dropped_unless_kept(checkpoint: Path, corpus: Path, tmp_path: Path) -> None:
    arguments = ("--budget", "80%", "--methods", "magnitude", "--recover", "none")
    compare_tiny(checkpoint, corpus, tmp_path / "dropped", *arguments)
    compare_tiny(checkpoint, corpus, tmp_path / "kept", *arguments, "--keep-models")
    dropped, kept = ({p.name for p in (tmp_path / n / "runs/80pct/magnitude").iterdir()} for n in ("dropped", "kept"))
    assert kept - dropped == {"checkpoint", "artifact"}


def test_other_options_do_not_mix(
    checkpoint: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--budget", "80%", "--methods", "magnitude", "--recover", "none")
    compare_tiny(checkpoint, corpus, tmp_path / "out", *arguments)
    assert compare_tiny(checkpoint, corpus, tmp_path / "out", *arguments, "--seed", "1") == 2
    assert "a comparison with other options" in last_line(capsys)


def test_unknown_method_is_found_before_any_work(
    checkpoint: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare_tiny(checkpoint, corpus, tmp_path / "out", "--budget", "80%", "--methods", "dilap", "magic") == 2
    assert "unknown method 'magic'" in last_line(capsys)
    assert not (tmp_path / "out").exists()


def test_csv_and_json_say_the_same(checkpoint: Path, corpus: Path, tmp_path: Path) -> None:
    compare_tiny(checkpoint, corpus, tmp_path / "out", "--budget", "80%", "--methods", "magnitude", "--recover", "none")
    (line,) = csv.DictReader((tmp_path / "out" / "compare.csv").read_text().splitlines())
    (row,) = rows(tmp_path / "out")
    assert (line["method"], float(line["kl"]), line["kl_recovered"]) == (row["method"], row["kl"], "")


def test_best_method_comes_first() -> None:
    made = [Row(method=name, budget="70%", kl=kl, status="kept") for name, kl in (("a", 2.0), ("b", 1.0))]
    lines = [line.split("|")[1].strip() for line in markdown(made).splitlines() if line.startswith("|")]
    assert lines == ["method", "---", "b", "a"]


def test_json_on_standard_output_is_json_alone(
    checkpoint: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--budget", "80%", "--methods", "magnitude", "--recover", "none", "--json")
    compare_tiny(checkpoint, corpus, tmp_path / "out", *arguments)
    assert json.loads(capsys.readouterr().out)["rows"][0]["method"] == "magnitude"


@pytest.mark.parametrize(("status", "remark"), [("kept", ""), ("missed", " MISSED"), ("estimated", " ESTIMATED")])
def test_a_budget_that_was_not_shown_to_be_kept_says_so(status: str, remark: str) -> None:
    line = markdown([Row(method="a", budget="70%", budget_used=0.9, status=status)]).splitlines()[4]
    assert line.split("|")[4].strip() == f"90.0%{remark}"

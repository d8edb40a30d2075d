"""The comparison: every method on the same rails, resumable, and one failure loses nothing else."""

import csv
import json
from pathlib import Path

import pytest
from standins.fake_job import FAST, call, last_line

from dilap.cli import compare
from dilap.core.codec import read_json
from dilap.job.comparison import Row, markdown, read_row
from dilap.job.run_folder import held
from dilap.job.verdict import Verdict
from dilap.methods import METHODS
from dilap.search.method import Pruned, PruneTask

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


def test_ratios_stand_beside_budgets(checkpoint: Path, corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    asked = ("--budget", "80%", "--ratio", "0.3", "0.5", "--methods", "magnitude", "--keep-models", "--recover", "none")
    assert compare_tiny(checkpoint, corpus, out, *asked) == 0
    found = rows(out)
    assert [row["budget"] for row in found] == ["80%", "ratio 0.3", "ratio 0.5"]
    assert found[2]["parameters"] < found[1]["parameters"]  # type: ignore[operator]
    assert (out / "runs" / "ratio-0.3" / "magnitude" / "checkpoint").is_dir()


def test_nothing_to_compare_at_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(compare.main, "--target", "host_cpu") == 2
    assert "name a --budget or a --ratio" in last_line(capsys)


def test_one_failed_method_does_not_lose_the_others(checkpoint: Path, corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    methods = [f"{__name__}:fail", "magnitude"]
    assert compare_tiny(checkpoint, corpus, out, "--budget", "80%", "--methods", *methods) == 0
    failed, done = rows(out)
    assert failed["error"] == "KeyError: no such layer"
    assert done["error"] is None
    assert f"{__name__}:fail failed: KeyError: no such layer" in (out / "compare.md").read_text()


def test_a_comparison_that_another_process_is_at_is_left_to_it(
    checkpoint: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with held(tmp_path / "out" / "shared"):
        assert compare_tiny(checkpoint, corpus, tmp_path / "out", "--budget", "80%", "--methods", "magnitude") == 2
    assert "another process is at work" in last_line(capsys)


def test_killed_comparison_goes_on_where_it_stopped(
    checkpoint: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--budget", "80%", "--methods", "magnitude", "shortgpt", "--recover", "none")

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("dilap.methods.shortgpt.layer_statistics", interrupt)
        assert compare_tiny(checkpoint, corpus, tmp_path / "out", *arguments) == 130
    assert [row["method"] for row in rows(tmp_path / "out")] == ["magnitude"]
    capsys.readouterr()
    assert compare_tiny(checkpoint, corpus, tmp_path / "out", *arguments) == 0
    said = capsys.readouterr().err
    assert "=== 2 of 2: shortgpt" in said
    assert "=== 1 of 2" not in said
    assert [row["method"] for row in rows(tmp_path / "out")] == ["magnitude", "shortgpt"]


def test_budgets_share_what_does_not_depend_on_them(checkpoint: Path, corpus: Path, tmp_path: Path) -> None:
    names = ["dilap", "ziplm", "puzzle", "sleb", "sprint", "shortgpt", "flap", "llm_pruner"]
    fewer = ("--recover", "none", "--set", "ziplm.starts=2", "--set", "failures=1")
    both, second = tmp_path / "both", tmp_path / "second"
    assert compare_tiny(checkpoint, corpus, both, "--budget", "90%", "78%", "--methods", *names, *fewer) == 0
    assert compare_tiny(checkpoint, corpus, second, "--budget", "78%", "--methods", *names, *fewer) == 0
    for name in names:
        plans = [read_json(out / "runs" / "78pct" / name / "plan.json") for out in (both, second)]
        assert plans[0] == plans[1], name


def test_what_methods_share_is_dropped_when_all_are_done(checkpoint: Path, corpus: Path, tmp_path: Path) -> None:
    out, arguments = tmp_path / "out", ("--budget", "80%", "--recover", "none", "--methods", "uniform")
    compare_tiny(checkpoint, corpus, out, *arguments, f"{__name__}:fail")
    assert list((out / "shared" / "methods").glob("library-*.safetensors"))
    compare_tiny(checkpoint, corpus, out, *arguments)
    assert not (out / "shared" / "methods").exists()


def test_settings_go_to_the_methods_that_have_them(checkpoint: Path, corpus: Path, tmp_path: Path) -> None:
    settings = ("--set", "flap.metric=IFV", "--set", "steps=1")
    arguments = ("--budget", "80%", "--recover", "none", "--methods", "flap", "llm_streamline", *settings)
    assert compare_tiny(checkpoint, corpus, tmp_path / "out", *arguments) == 0
    found = {
        name: read_json(tmp_path / "out" / "runs" / "80pct" / name / "result.json")["options"]["settings"]
        for name in ("flap", "llm_streamline")
    }
    assert found == {"flap": {"metric": "IFV"}, "llm_streamline": {"steps": "1"}}


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ("flap.metrik=IFV", "method flap has no setting 'metrik'"),
        ("flap.metric=none", "metric is IFV or WIFV or WIFN"),
        ("nothing=1", "--set takes METHOD.NAME=VALUE"),
        ("sleb.num_tokens=1", "--set takes METHOD.NAME=VALUE"),
    ],
)
def test_wrong_settings_are_found_before_any_work(
    pair: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--target", "host_cpu", "--budget", "80%", "--methods", "flap", "--out", tmp_path / "out")
    assert call(compare.main, *arguments, "--set", pair) == 2
    assert message in last_line(capsys)
    assert not (tmp_path / "out").exists()


def test_methods_are_listed_with_their_sources(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(compare.main, "--list-methods") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(METHODS)
    assert all("arXiv" in line or "this project" in line for line in lines)


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
    assert (line["method"], float(line["artifact_kl"]), line["error"]) == (row["method"], row["artifact_kl"], "")


def test_best_method_comes_first() -> None:
    made = [Row(method=name, budget="70%", artifact_kl=kl, status="kept") for name, kl in (("a", 2.0), ("b", 1.0))]
    lines = [line.split("|")[1].strip() for line in markdown(made).splitlines() if line.startswith("|")]
    assert lines == ["method", "---", "b", "a"]


def test_the_quality_of_a_row_is_the_artifacts_and_torchs_has_its_own_columns() -> None:
    row = Row(method="a", budget="70%", torch_kl_before=1.0, torch_kl=0.5, artifact_kl=0.75, artifact_reader="llamacpp")
    heading, _, line = (one.split("|") for one in markdown([row]).splitlines() if one.startswith("|"))
    cells = dict(zip((one.strip() for one in heading), (one.strip() for one in line), strict=True))
    assert (cells["KL"], cells["torch KL"], cells["torch KL before recovery"]) == ("0.750", "0.500", "1.000")


def test_a_row_without_the_artifacts_quality_says_that_it_is_torchs() -> None:
    text = markdown([Row(method="a", budget="70%", torch_kl=0.5, torch_perplexity=20.0)])
    assert "| 0.500 (torch) | 20.00 (torch) |" in text
    assert "of the torch models in floats, not of the artifacts" in text


def test_rows_of_earlier_versions_are_torchs() -> None:
    old = {"type": "Row", "version": 1, "method": "a", "budget": "70%", "kl": 2.0, "perplexity": 9.0}
    row = read_row({**old, "kl_recovered": 1.0, "perplexity_recovered": 8.0}, source="row.json")
    assert (row.torch_kl_before, row.torch_kl, row.artifact_kl) == (2.0, 1.0, None)
    assert read_row({**old, "kl_recovered": None}, source="row.json").torch_kl == 2.0


def test_less_text_than_published_is_named() -> None:
    made = [Row(method=name, budget="70%", calibration_tokens=16_384) for name in ("flap", "wanda_sp", "loraprune")]
    *_, note = markdown(made).splitlines()
    assert "the same 16,384 tokens; published with more: flap (131,072); trained on them" in note
    assert "wanda_sp" not in note


def test_json_on_standard_output_is_json_alone(
    checkpoint: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--budget", "80%", "--methods", "magnitude", "--recover", "none", "--json")
    compare_tiny(checkpoint, corpus, tmp_path / "out", *arguments)
    assert json.loads(capsys.readouterr().out)["rows"][0]["method"] == "magnitude"


@pytest.mark.parametrize(("status", "remark"), [("kept", ""), ("missed", " MISSED"), ("estimated", " ESTIMATED")])
def test_a_budget_that_was_not_shown_to_be_kept_says_so(status: Verdict, remark: str) -> None:
    line = markdown([Row(method="a", budget="70%", budget_used=0.9, status=status)]).splitlines()[4]
    assert line.split("|")[4].strip() == f"90.0%{remark}"


@pytest.mark.parametrize(
    ("used", "ends", "cell"),
    [
        (0.995, (0.985, 1.005), "99.5% [98.5%, 100.5%] (kept, within the noise)"),
        (1.005, (0.995, 1.015), "100.5% [99.5%, 101.5%] (missed, within the noise)"),
        (0.9, (0.89, 0.91), "90.0% [89.0%, 91.0%] (uncertain, other processes used the cores)"),
    ],
)
def test_a_budget_that_is_not_certain_says_why(used: float, ends: tuple[float, float], cell: str) -> None:
    row = Row(method="a", budget="70%", budget_used=used, budget_used_ci=ends, status="uncertain")
    assert markdown([row]).splitlines()[4].split("|")[4].strip() == cell

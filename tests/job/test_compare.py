"""The comparison: every method on the same rails, resumable, and one failure loses nothing else."""

import csv
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from standins.fake_job import compare_tiny

from dilap.core.codec import read_json
from dilap.core.errors import InvalidInput
from dilap.job import api
from dilap.job.comparison import Row, markdown, read_row, read_rows
from dilap.job.run_folder import held
from dilap.job.verdict import Verdict
from dilap.methods import shortgpt
from dilap.search.method import Pruned, PruneTask

pytestmark = pytest.mark.usefixtures("fake_device")
_OF_NETWORKS = ("agreement", "top1", "top5", "images", "sentences", "cosine", "cosine_before", "same_nearest")


def fail(task: PruneTask) -> Pruned:
    """A user's method with a mistake in it."""
    raise KeyError("no such layer")


FAIL = f"{__name__}:{fail.__name__}"


def rows(out: Path) -> list[Row]:
    """The rows that a comparison has written."""
    return read_rows(read_json(out / "compare.json")["rows"], source="compare.json")


def test_rows_hold_what_is_compared(checkpoint: Path, corpus: Path, tmp_path: Path) -> None:
    out, names = tmp_path / "out", ["dilap", "flap", "shortgpt"]
    found = compare_tiny(checkpoint, corpus, out, *names, budgets=["80%", "65%"], recover_steps=2)
    assert [(row.method, row.budget) for row in found] == [
        (method, budget) for budget in ("80%", "65%") for method in names
    ]
    assert rows(out) == found
    for row in found:
        absent = {name for name, value in asdict(row).items() if value is None}
        assert absent - {name for name in absent if name.endswith(_OF_NETWORKS)} == {"error"}
        assert row.budget_used is not None
        assert row.budget_used <= 1.0
        assert row.seconds_ci is not None
        assert row.seconds is not None
        low, high = row.seconds_ci
        assert low <= row.seconds <= high


def test_ratios_stand_beside_budgets(checkpoint: Path, corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    asked = {"budgets": ["80%"], "ratios": [0.3, 0.5]}
    compare_tiny(checkpoint, corpus, out, "magnitude", **asked, keep_models=True, recover="none")
    found = rows(out)
    assert [row.budget for row in found] == ["80%", "ratio 0.3", "ratio 0.5"]
    left = [row.parameters or 0 for row in found]
    assert 0 < left[2] < left[1]
    assert (out / "runs" / "ratio-0.3" / "magnitude" / "checkpoint").is_dir()


def test_nothing_to_compare_at_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="name budgets or ratios"):
        api.compare(out=tmp_path / "out")


def test_one_failed_method_does_not_lose_the_others(checkpoint: Path, corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    compare_tiny(checkpoint, corpus, out, FAIL, "magnitude", budgets=["80%"], recover_steps=2)
    failed, done = rows(out)
    assert failed.error == "KeyError: no such layer"
    assert done.error is None
    assert f"{FAIL} failed: KeyError: no such layer" in (out / "compare.md").read_text()


def test_a_comparison_that_another_process_is_at_is_left_to_it(checkpoint: Path, corpus: Path, tmp_path: Path) -> None:
    with held(tmp_path / "out" / "shared"), pytest.raises(InvalidInput, match="another process is at work"):
        compare_tiny(checkpoint, corpus, tmp_path / "out", "magnitude", budgets=["80%"])


def test_killed_comparison_goes_on_where_it_stopped(
    checkpoint: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, names, lines = tmp_path / "out", ("magnitude", "shortgpt"), list[str]()

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shortgpt, "layer_statistics", interrupt)
        with pytest.raises(KeyboardInterrupt):
            compare_tiny(checkpoint, corpus, out, *names, budgets=["80%"], recover="none")
    assert [row.method for row in rows(out)] == ["magnitude"]
    compare_tiny(checkpoint, corpus, out, *names, budgets=["80%"], recover="none", progress=lines.append)
    assert any("=== 2 of 2: shortgpt" in line for line in lines)
    assert not any("=== 1 of 2" in line for line in lines)
    assert [row.method for row in rows(out)] == ["magnitude", "shortgpt"]


def test_budgets_share_what_does_not_depend_on_them(checkpoint: Path, corpus: Path, tmp_path: Path) -> None:
    names = ["dilap", "ziplm", "puzzle", "sleb", "sprint", "shortgpt", "flap", "llm_pruner"]
    fewer = {"recover": "none", "settings": {"ziplm": {"starts": "2", "failures": "1"}}}
    both, second = tmp_path / "both", tmp_path / "second"
    compare_tiny(checkpoint, corpus, both, *names, budgets=["90%", "78%"], **fewer)
    compare_tiny(checkpoint, corpus, second, *names, budgets=["78%"], **fewer)
    for name in names:
        plans = [read_json(out / "runs" / "78pct" / name / "plan.json") for out in (both, second)]
        assert plans[0] == plans[1], name


def test_what_methods_share_is_dropped_when_all_are_done(checkpoint: Path, corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    compare_tiny(checkpoint, corpus, out, "uniform", FAIL, budgets=["80%"], recover="none")
    assert list((out / "shared" / "methods").glob("library-*/*.safetensors"))
    compare_tiny(checkpoint, corpus, out, "uniform", budgets=["80%"], recover="none")
    assert not (out / "shared" / "methods").exists()


def test_settings_go_to_the_methods_that_have_them(checkpoint: Path, corpus: Path, tmp_path: Path) -> None:
    settings = {"flap": {"metric": "IFV"}, "llm_streamline": {"steps": "1"}}
    compare_tiny(checkpoint, corpus, tmp_path / "out", *settings, budgets=["80%"], recover="none", settings=settings)
    found = {
        name: read_json(tmp_path / "out" / "runs" / "80pct" / name / "result.json")["options"]["settings"]
        for name in settings
    }
    assert found == settings


def test_models_are_dropped_unless_kept(checkpoint: Path, corpus: Path, tmp_path: Path) -> None:
    asked = {"budgets": ["80%"], "recover": "none"}
    compare_tiny(checkpoint, corpus, tmp_path / "dropped", "magnitude", **asked)
    compare_tiny(checkpoint, corpus, tmp_path / "kept", "magnitude", **asked, keep_models=True)
    dropped, kept = ({p.name for p in (tmp_path / n / "runs/80pct/magnitude").iterdir()} for n in ("dropped", "kept"))
    assert kept - dropped == {"checkpoint", "artifact"}


def test_other_options_do_not_mix(checkpoint: Path, corpus: Path, tmp_path: Path) -> None:
    asked = {"budgets": ["80%"], "recover": "none"}
    compare_tiny(checkpoint, corpus, tmp_path / "out", "magnitude", **asked)
    with pytest.raises(InvalidInput, match="a comparison with other options"):
        compare_tiny(checkpoint, corpus, tmp_path / "out", "magnitude", **asked, seed=1)


def test_csv_and_json_say_the_same(checkpoint: Path, corpus: Path, tmp_path: Path) -> None:
    compare_tiny(checkpoint, corpus, tmp_path / "out", "magnitude", budgets=["80%"], recover="none")
    (line,) = csv.DictReader((tmp_path / "out" / "compare.csv").read_text().splitlines())
    (row,) = read_json(tmp_path / "out" / "compare.json")["rows"]
    assert (line["method"], float(line["artifact_kl"]), line["error"]) == (row["method"], row["artifact_kl"], "")


def test_best_method_comes_first() -> None:
    made = [Row(method=name, budget="70%", artifact_kl=kl, status="kept") for name, kl in (("a", 2.0), ("b", 1.0))]
    lines = [line.split("|")[1].strip() for line in markdown(made).splitlines() if line.startswith("|")]
    assert lines == ["method", "---", "b", "a"]


def test_the_quality_of_a_row_is_the_artifacts_and_torchs_has_its_own_columns() -> None:
    row = Row(
        method="a",
        budget="70%",
        torch_kl_cut=3.0,
        torch_kl_refit=2.0,
        torch_kl_before=1.0,
        torch_kl=0.5,
        artifact_kl=0.75,
        artifact_reader="llamacpp",
    )
    heading, _, line = (one.split("|") for one in markdown([row]).splitlines() if one.startswith("|"))
    cells = dict(zip((one.strip() for one in heading), (one.strip() for one in line), strict=True))
    assert (cells["KL"], cells["torch KL"], cells["torch KL before recovery"]) == ("0.750", "0.500", "1.000")
    assert (cells["torch KL of the units alone"], cells["refitted"]) == ("3.000", "2.000")


def test_a_table_says_to_what_all_widths_are_rounded() -> None:
    rows_ = [Row(method=name, budget="70%", artifact_kl=1.0, ffn_multiple=32) for name in "ab"]
    assert "FFN widths of all methods are rounded to multiples of 32, which the runtime needs." in markdown(rows_)
    assert "are rounded to" not in markdown([replace(row, ffn_multiple=1) for row in rows_])


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


@pytest.mark.parametrize(("status", "remark"), [("kept", ""), ("missed", " MISSED"), ("estimated", " ESTIMATED")])
def test_a_budget_that_was_not_shown_to_be_kept_says_so(status: Verdict, remark: str) -> None:
    line = markdown([Row(method="a", budget="70%", budget_used=0.9, status=status)]).splitlines()[4]
    assert line.split("|")[4].strip() == f"90.0%{remark}"


@pytest.mark.parametrize(
    ("used", "ends", "cell"),
    [
        (0.995, (0.985, 1.005), "99.5% [98.5%, 100.5%] (kept, within the noise)"),
        (1.005, (0.995, 1.015), "100.5% [99.5%, 101.5%] (missed, within the noise)"),
        (0.9, (0.89, 0.91), "90.0% [89.0%, 91.0%] (uncertain, the device was busy or slowed down)"),
    ],
)
def test_a_budget_that_is_not_certain_says_why(used: float, ends: tuple[float, float], cell: str) -> None:
    row = Row(method="a", budget="70%", budget_used=used, budget_used_ci=ends, status="uncertain")
    assert markdown([row]).splitlines()[4].split("|")[4].strip() == cell

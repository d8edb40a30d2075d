"""What has to be said of a measurement is said wherever its number stands: tables, JSON, rows, pages, CSV."""

import csv
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from standins.fabricated import costs, evaluation
from standins.fake_job import FakeBench, compare_tiny, prune_tiny

from dilap.cli import costs as table_costs
from dilap.cli import eval as evaluate
from dilap.core.codec import read_json, write_json
from dilap.core.measurement import Measurement
from dilap.core.shape import Architecture
from dilap.job import result
from dilap.job.bench import describe_table
from dilap.job.command import command_line
from dilap.job.result import read_result
from dilap.job.verdict import Verdict
from dilap.profilers import intervals
from dilap.profilers.profiler import Case, Profiler
from dilap.report import inputs, summary, tables
from dilap.report.figures import figures
from dilap.report.report import Report

STATES: dict[str, tuple[dict[str, Any], str, str]] = {
    "forced": ({"forced": ("it runs on battery",)}, "forced", "it runs on battery"),
    "noisy": ({"status": "noisy", "note": "9% of the samples are outliers"}, "noisy", "9% of the samples"),
    "contended": ({"status": "contended", "note": "other processes"}, "contended", "other processes"),
    "both": (
        {"status": "noisy", "note": "9% of the samples are outliers", "forced": ("it is 91 °C warm",)},
        "noisy, forced",
        "it is 91 °C warm",
    ),
}
ESTIMATE: dict[str, Any] = {"target": "jetson_cpu", "backend": "llamacpp", "precision": "f32", "estimate": True}


def in_state(monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]) -> None:
    measure = FakeBench.measure_cases

    def changed(self: FakeBench, cases: Sequence[Case], *, final: bool = False) -> list[Measurement]:
        return [replace(one, **changes) for one in measure(self, cases, final=final)]

    monkeypatch.setattr(FakeBench, "measure_cases", changed)


Prune = Callable[..., Path]


@pytest.fixture
def pruned(fake_device: None, no_starts: None, checkpoint: Path, corpus: Path, tmp_path: Path) -> Prune:
    """Runs a quick job that ends with `status`; returns its folder."""

    def made(*, status: Verdict = "kept", **options: Any) -> Path:
        assert prune_tiny(checkpoint, corpus, tmp_path / "run", **options).status == status
        return tmp_path / "run"

    return made


@pytest.mark.parametrize("state", STATES)
def test_a_run_says_it_in_every_format(state: str, pruned: Prune, monkeypatch: pytest.MonkeyPatch) -> None:
    changes, word, reason = STATES[state]
    in_state(monkeypatch, changes)
    lines: list[str] = []
    run = pruned(status="uncertain" if state == "contended" else "kept", progress=lines.append)
    assert any(f" ms ({word})" in line for line in lines)  # the dense model's, before the search
    report = Report.of([run])
    for shown in (result.table(read_result(run)), report.markdown()):
        assert f"({word})" in shown
        assert reason in shown
    assert any(reason in note for note in read_result(run).notes)
    rows = list(csv.DictReader(report.csv().splitlines()))
    assert [(row["measurement"], reason in row["notes"]) for row in rows] == [(word, True)] * 2
    assert any(reason in note for note in report.document()["notes"])


def test_the_page_says_it(pruned: Prune, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("vl_convert", reason="vl-convert-python is not installed")
    changes, word, reason = STATES["forced"]
    in_state(monkeypatch, changes)
    page = Report.of([pruned()]).html().split("<script")[0]
    assert page.count(reason) > 1
    assert f"({word})" in page


def test_a_comparison_says_it(
    fake_device: None, checkpoint: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes, word, reason = STATES["both"]
    in_state(monkeypatch, changes)
    compare_tiny(checkpoint, corpus, tmp_path / "out", "magnitude", budgets=["80%"], recover="none")
    (row,) = read_json(tmp_path / "out" / "compare.json")["rows"]
    (line,) = csv.DictReader((tmp_path / "out" / "compare.csv").read_text().splitlines())
    assert row["measurement"] == line["measurement"] == word
    assert reason in line["notes"]
    markdown = (tmp_path / "out" / "compare.md").read_text()
    assert f"({word}) |" in markdown
    assert reason in markdown


def test_what_an_earlier_result_stored_and_did_not_show_is_shown(pruned: Prune) -> None:
    run = pruned()
    document = read_json(run / "result.json")
    document["pruned"]["measurement"]["forced"] = ["it runs on battery"]
    write_json(run / "result.json", document)
    assert "it runs on battery" in result.table(read_result(run))
    assert "it runs on battery" in Report.of([run]).markdown()


def test_measured_costs_of_an_evaluation_say_it(tmp_path: Path) -> None:
    measured = costs()
    assert measured.decode.measurement is not None
    changes, word, reason = STATES["both"]
    decode_ = replace(measured.decode, measurement=replace(measured.decode.measurement, **changes))
    found = replace(evaluation("seventy", 0.5), costs=replace(measured, decode=decode_))
    assert f"({word})" in evaluate.report(found)
    assert reason in evaluate.report(found)
    *_, spent = tables.evaluation_tables([("seventy", found)])
    assert spent.rows[0][-1].startswith(f"{word}; ")
    assert reason in spent.rows[0][-1]


def test_a_table_says_it_to_whoever_uses_it(pruned: Prune, monkeypatch: pytest.MonkeyPatch) -> None:
    build = FakeBench.build_table

    def forced(self: FakeBench, architecture: Architecture, path: Path) -> Any:
        table = build(self, architecture, path)
        return table.with_entries([replace(table.entries[-1], forced=("it runs on battery",))])

    monkeypatch.setattr(FakeBench, "build_table", forced)
    run = pruned()
    reason = "measured in an unfit state (--force): it runs on battery"
    assert reason in result.table(read_result(run))
    assert any(reason in note for note in read_result(run).notes)
    table = inputs.read([run]).runs[0].table
    assert table is not None
    assert reason in describe_table(table)
    assert reason in table_costs.text(table.model())
    assert reason in table_costs.document(table.model())["caveats"][0]


def test_load_that_comes_while_an_unfit_device_is_measured_is_forced_too() -> None:
    measured = costs().decode.measurement
    assert measured is not None
    busy = Profiler._overridden(replace(measured, status="contended", forced=("it runs on battery",)))
    assert busy.forced == ("it runs on battery", "other processes kept using the cores")


def test_an_estimate_claims_nothing_that_was_not_measured(pruned: Prune) -> None:
    lines: list[str] = []
    run = pruned(**ESTIMATE, budget="80%", status="estimated", progress=lines.append)
    found = read_result(run)
    assert (found.speedup, found.dense.interval, found.pruned.interval) == (None, None, None)
    assert (found.pruned.measurement.peak_memory_bytes, found.is_estimate) == (None, True)
    for word in ("paired", "95 %", "speed-up", "0.0 MB"):
        assert word not in result.table(found)
    assert any("this plan, estimated" in line for line in lines)
    assert not any("measured:" in line for line in lines)
    row = list(csv.DictReader(Report.of([run]).csv().splitlines()))[1]
    empty = ("seconds_low", "seconds_high", "of_dense_low", "of_dense_high", "peak_memory_bytes")
    assert {row[name] for name in empty} == {""}
    assert "--estimate" in command_line(found)


def test_a_report_of_estimates_calls_nothing_measured(pruned: Prune) -> None:
    run = pruned(**ESTIMATE, budget="80%", status="estimated")
    contents = inputs.read([run])
    drawn = {one.name: one for one in figures(contents, summary.rows(contents))}
    assert "prediction" not in drawn
    assert "estimated from published numbers: nothing was measured" in drawn["tradeoff-kl"].caption
    assert drawn["tradeoff-kl"].spec["layer"][0]["data"]["values"] == []  # no front
    text = Report.of([run]).markdown()
    for claim in ("paired", "median measured", "95 % interval", "| measured |"):
        assert claim not in text
    assert [row.peak_memory_bytes for row in summary.rows(contents)] == [None, None]
    assert "(estimated)" in text
    assert "estimated, no such device was asked" in text


def test_the_page_of_an_estimate_has_no_speed_up(pruned: Prune) -> None:
    pytest.importorskip("vl_convert", reason="vl-convert-python is not installed")
    run = pruned(**ESTIMATE, budget="80%", status="estimated")
    page = Report.of([run]).html().split("<script")[0]
    assert "faster" not in page
    assert '<span class="number">estimated</span>' in page
    assert re.search(r"<span>\S+ to \S+ ms, measured on no device; KL", page)


def test_estimates_of_earlier_versions_claim_no_more(pruned: Prune) -> None:
    run = pruned(**ESTIMATE, budget="80%", status="estimated")
    document = read_json(run / "result.json")
    document["speedup"] = {"value": 1.3, "low": 1.3, "high": 1.3}
    for side in ("dense", "pruned"):
        document[side]["interval"] = {"value": 1.0, "low": 1.0, "high": 1.0}
        document[side]["measurement"]["peak_memory_bytes"] = 0
    write_json(run / "result.json", document)
    text = result.table(read_result(run))
    assert not any(claim in text for claim in ("paired", "95 %", "speed-up", "0.0 MB"))


def test_weights_are_counted_where_seconds_are_estimated(pruned: Prune) -> None:
    run = pruned(**ESTIMATE, budget=None, ratio=0.3, status="estimated")
    text = result.table(read_result(run))
    assert "pruning ratio 0.3: kept" in text
    assert "latency ESTIMATED, measured on no device" in text


def test_a_p90_has_an_interval_of_its_own(pruned: Prune) -> None:
    found = read_result(pruned(stat="p90"))
    text = result.table(found)
    assert "paired" not in text
    assert "95 % interval  " in text
    assert found.pruned.interval == intervals.latency(found.pruned.measurement, "p90")
    assert "95 % interval of p50" in result.table(replace(found, budget_interval=None))  # earlier versions


def test_a_figure_of_measured_and_estimated_runs_names_the_estimates(pruned: Prune) -> None:
    contents = inputs.read([pruned()])
    dense, one = summary.rows(contents)
    guess = replace(one, run="guess", measurement="estimated", seconds=1e-9, kl=0.0, seconds_low=None)
    drawn = figures(contents, [dense, one, guess])[0]
    assert "Estimated and measured on no device: guess." in drawn.caption
    assert "guess" not in [row["run"] for row in drawn.spec["layer"][0]["data"]["values"]]


def test_a_table_that_can_no_longer_be_fitted_leaves_the_report_whole(pruned: Prune) -> None:
    run = pruned()
    contents = inputs.read([run])
    table = contents.runs[0].table
    assert table is not None
    busy = replace(table, entries=tuple(replace(one, status="contended") for one in table.entries))
    contents = replace(contents, runs=(replace(contents.runs[0], table=busy),))
    assert "cost-heads" not in [one.name for one in figures(contents, summary.rows(contents))]
    assert any("left out, because other processes used the cores" in note for note in tables.notes(contents))

"""dilap-report: every number of a run, in four formats."""

import csv
import json
import re
import shlex
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from standins.fabricated import TEXT_QUALITY, costs, evaluation
from standins.fake_job import FinishedJob, call, last_line

from dilap.cli import prune, report
from dilap.core.codec import decode, encode, read_json, write_json
from dilap.job.command import command_line
from dilap.job.options import JobOptions
from dilap.job.result import PruneResult
from dilap.profilers.devices import device as devices
from dilap.report import inputs, summary, tables
from dilap.report.figures import figures


def drawn(*paths: Path) -> dict[str, Any]:
    contents = inputs.read(paths)
    return {one.name: one for one in figures(contents, summary.rows(contents))}


def test_every_figure_has_data(evaluated: Path) -> None:
    assert list(drawn(evaluated)) == [
        "tradeoff-kl",
        "tradeoff-perplexity",
        "tradeoff-mean-accuracy",
        "accuracy",
        "kept-heads",
        "kept-channels",
        "cost-channels",
        "cost-heads",
        "prediction",
        "recovery",
    ]


def test_rows_have_every_column(evaluated: Path) -> None:
    for figure in drawn(evaluated).values():
        assert all(set(figure.columns) <= set(row) for row in figure.rows)


def test_specs_are_vega_lite(evaluated: Path) -> None:
    vega = pytest.importorskip("vl_convert", reason="vl-convert-python is not installed")
    for figure in drawn(evaluated).values():
        spec = {**figure.spec, "width": 600, "data": {"values": list(figure.rows)}}
        assert "<svg" in vega.vegalite_to_svg(spec)


def test_legends_have_the_colours_of_their_points(evaluated: Path) -> None:
    vega = pytest.importorskip("vl_convert", reason="vl-convert-python is not installed")
    figure = drawn(evaluated)["tradeoff-kl"]
    svg = vega.vegalite_to_svg({**figure.spec, "width": 600, "data": {"values": list(figure.rows)}})
    colours = re.findall(r'role-legend-symbol"[^>]*><path[^>]* fill="(#\w+)"', svg)
    assert len(set(colours)) == svg.count("role-legend-symbol") == 2  # dense and pruned
    assert all(svg.count(f'fill="{colour}"') > 1 for colour in colours)


def test_the_front_holds_what_nothing_beats(run: Path) -> None:
    contents = inputs.read([run])
    (dense, pruned) = summary.rows(contents)
    worse = replace(pruned, run="worse", seconds=pruned.seconds * 1.1, kl=(pruned.kl or 0.0) + 1)
    (figure, *_) = figures(contents, [dense, pruned, worse])
    front = figure.spec["layer"][0]["data"]["values"]
    assert [row["run"] for row in front] == ["seventy", "dense"]


def test_the_dense_model_has_the_accuracy_of_the_evaluation_of_its_file(evaluated: Path, tmp_path: Path) -> None:
    digest = read_json(evaluated / "result.json")["dense"]["artifact"]["sha256"]
    for name, accuracy, sha256 in (("dense", 0.75, digest), ("another", 0.25, "0")):
        write_json(tmp_path / f"{name}.json", encode(replace(evaluation(name, accuracy), digest=sha256)))
    rows = drawn(evaluated, tmp_path / "another.json", tmp_path / "dense.json")["tradeoff-mean-accuracy"].rows
    assert [row["value"] for row in rows if row["run"] == "dense"] == [0.75]


def test_removed_layers_are_shown_as_empty(run: Path) -> None:
    plan = read_json(run / "plan.json")
    plan["kept"] |= {"layers.1.kv_groups": [], "layers.1.channels": []}
    write_json(run / "plan.json", plan)
    shares = [row["share"] for row in drawn(run)["kept-channels"].rows]
    assert len(shares) == 3
    assert shares[1] == 0


def test_recovery_is_drawn_step_by_step(run: Path) -> None:
    rows = drawn(run)["recovery"].rows
    assert [row["step"] for row in rows if row["text"] == "each step's own"] == [1, 2, 3]
    assert [row["step"] for row in rows if row["text"] == "validation split"] == [0, 3]


def test_csv_has_the_measured_numbers(run: Path, tmp_path: Path) -> None:
    assert call(report.main, run, "--csv", tmp_path / "r.csv") == 0
    dense, pruned = csv.DictReader((tmp_path / "r.csv").read_text().splitlines())
    result = read_json(run / "result.json")
    assert float(pruned["seconds"]) == result["pruned"]["seconds"]
    assert float(dense["seconds"]) == result["dense"]["seconds"]
    assert float(pruned["of_dense"]) == pytest.approx(1 / result["speedup"]["value"])


def test_markdown_has_every_table(evaluated: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert call(report.main, evaluated, "--markdown", "-") == 0
    text = capsys.readouterr().out
    for figure in drawn(evaluated).values():
        assert f"**{figure.title}**" in text


def test_scores_quality_and_costs_of_evaluations_are_tables() -> None:
    whole = replace(evaluation("seventy", 0.5), text=TEXT_QUALITY, costs=costs())
    scores, beside, spent = tables.evaluation_tables([("seventy", whole)])
    assert list(scores.rows[0])[:5] == ["seventy", "piqa", "10", "0", "50.0% [23.7%, 76.3%]"]
    assert list(beside.rows[0])[2:] == ["0.2500", "30.00 (20.00)", "40.0% (50.0%)", "70.0%"]
    decode, prefill = (dict(zip(spent.headings, row, strict=True)) for row in spent.rows)
    assert (decode["File"], decode["FLOPs"], decode["Bytes moved"]) == ("25 MB", "2.00 G", "40 MB")
    assert (decode["Average memory"], decode["Peak memory"]) == ("70 MB", "90 MB")
    assert decode["Latency, 95 %"] == "1.15 ms [1.02, 1.27]"
    assert prefill["Measurement"] == "not measured"


def test_an_evaluation_without_costs_has_no_table_of_them() -> None:
    assert len(tables.evaluation_tables([("seventy", evaluation("seventy", 0.5))])) == 1


def test_json_on_standard_output_is_json_alone(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert call(report.main, run, "--json") == 0
    assert [row["run"] for row in json.loads(capsys.readouterr().out)["rows"]] == ["dense", "seventy"]


def test_the_command_asks_for_the_same_job(finished: FinishedJob) -> None:
    result = decode(PruneResult, read_json(finished.run / "result.json"), source="result.json")
    words = command_line(result).split()
    model, text = str(finished.checkpoint), str(finished.corpus)
    wanted = {"--budget": "70%", "--model": model, "--calib": text, "--recover-steps": "3"}
    assert {flag: words[words.index(flag) + 1] for flag in wanted} == wanted


def options_of(arguments: Sequence[str]) -> JobOptions:
    """What dilap-prune makes of its arguments."""
    given = prune._parser().parse_args(arguments)
    found = prune.options_of(given, device=devices.get(given.target))
    assert isinstance(found, JobOptions)
    return found


def test_every_option_of_a_job_is_in_its_command(finished: FinishedJob) -> None:
    job = "--target host_cpu --model m --budget 70% --stat p90 --force --estimate --method flap --set metric=IFV"
    timed = "--backend onnxruntime --precision f32 --phase prefill --context 64 --prompt-tokens 32 --threads 1"
    search = "--configuration plain --layout portable --table t --importance wanda --step 0.3 --evaluations 7 --seed 5"
    text = "--calib c.txt --calib-length 64 --eval-text e.txt --recover lora --recover-steps 9"
    loss = "--recover-rate 0.002 --recover-next-token 0.1 --recover-hidden 0.2 --recover-evaluate 3 --tracker wandb"
    stream = "--recover-data a.txt b.txt --recover-tokens 1M --recover-length 64 --recover-batch 128"
    where = "--compute cpu --recover-checkpoint-activations --recover-8bit-states"
    options = options_of(f"{job} {timed} {search} {text} {loss} {stream} {where}".split())
    result = decode(PruneResult, read_json(finished.run / "result.json"), source="result.json")
    result = replace(result, target=options.target, budget=options.budget, options=asdict(options))
    assert options_of(shlex.split(command_line(result))[1:]) == options


def test_the_command_asks_for_the_same_precisions(finished: FinishedJob) -> None:
    options = options_of(["--target", "host_cpu", "--budget", "70%", "--precision", "q8_0,q4_0"])
    result = decode(PruneResult, read_json(finished.run / "result.json"), source="result.json")
    words = shlex.split(command_line(replace(result, options=asdict(options))))[1:]
    assert options_of(words).precisions == ("q8_0", "q4_0")


def test_the_command_of_a_job_of_defaults_asks_for_it_too(finished: FinishedJob) -> None:
    options = options_of(["--target", "host_cpu", "--budget", "70%"])
    result = decode(PruneResult, read_json(finished.run / "result.json"), source="result.json")
    words = shlex.split(command_line(replace(result, options=asdict(options))))[1:]
    assert options_of(words) == options
    assert {word for word in words if word.startswith("--")} == {
        "--target",
        "--budget",
        "--backend",
        "--precision",
        *(["--threads"] if len(options.threads_tried) == 1 else []),
    }  # so that what it leaves out really has the defaults


def test_runs_of_a_comparison_are_told_apart(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "comparison"
    for budget in ("70pct", "60pct"):
        (folder / "runs" / budget).mkdir(parents=True)
        (folder / "runs" / budget / "magnitude").symlink_to(run)
    write_json(folder / "compare.json", {"rows": [{"method": "flap", "budget": "70%", "error": "it failed"}]})
    contents = inputs.read([folder])
    assert len({one.name for one in contents.runs}) == 2
    assert contents.failures == ("flap at 70% failed: it failed",)


def test_a_name_cannot_become_markup(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("vl_convert", reason="vl-convert-python is not installed")
    evil = run.with_name("<script>alert(1)<")
    run.rename(evil)
    assert call(report.main, evil, "-o", tmp_path / "r.html") == 0
    assert "<script>alert" not in (tmp_path / "r.html").read_text()


def test_without_vega_there_is_one_line(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "vl_convert", None)
    assert call(report.main, run) == 2
    assert "pip install 'dilap[report]'" in last_line(capsys)


def test_what_is_no_run_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(report.main, tmp_path) == 2
    assert "is no run" in last_line(capsys)


def test_equal_runs_do_not_differ(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert call(report.main, "--diff", run, run) == 0
    assert capsys.readouterr().out == "no difference\n"


def test_differences_are_named_with_their_size(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, accuracy in (("a.json", 0.5), ("b.json", 0.6)):
        write_json(tmp_path / name, encode(evaluation("m", accuracy)))
    capsys.readouterr()
    assert call(report.main, "--diff", tmp_path / "a.json", tmp_path / "b.json", "--json") == 0
    (found,) = json.loads(capsys.readouterr().out)["differences"]
    assert (found["field"], found["change"]) == ("tasks.piqa.acc", pytest.approx(0.2))


def test_a_run_and_an_evaluation_are_not_compared(evaluated: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(report.main, "--diff", evaluated, evaluated / "evaluation.json") == 2
    assert "nothing to compare" in last_line(capsys)


def test_the_page_asks_no_network(evaluated: Path, tmp_path: Path) -> None:
    pytest.importorskip("vl_convert", reason="vl-convert-python is not installed")
    assert call(report.main, evaluated, "-o", tmp_path / "r.html") == 0
    page = (tmp_path / "r.html").read_text().split("<script>")[0]
    assert re.findall(r'(?:src|href)="(?!#|data:)', page) == []

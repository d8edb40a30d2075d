"""The commands that run jobs: how their words become a job's options, what they print, and their exit codes."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from standins.fake_job import FAST, FakeBench, call, last_line

from dilap.cli import compare, export, profile, prune
from dilap.cli import eval as evaluation
from dilap.cli.export import _beside
from dilap.core.codec import read_json
from dilap.core.measurement import Measurement
from dilap.methods import METHODS, NETWORK_METHODS
from dilap.profilers.devices import device as devices
from dilap.profilers.profiler import Case

pytestmark = pytest.mark.usefixtures("fake_device")


def prune_tiny(checkpoint: Path, corpus: Path, out: Path, *extra: str) -> int:
    text = ["--calib", corpus, "--eval-text", corpus, "--method", "magnitude"]
    arguments = ["--target", "host_cpu", "--budget", "70%", "--model", checkpoint, *text, "--out", out]
    return call(prune.main, *arguments, *FAST, *extra)


def compare_tiny(checkpoint: Path, corpus: Path, out: Path, *extra: str) -> int:
    arguments = ["--target", "host_cpu", "--model", checkpoint, "--calib", corpus, "--eval-text", corpus, "--out", out]
    return call(compare.main, *arguments, *FAST, "--recover", "none", *extra)


def test_a_budget_that_is_not_shown_to_be_kept_exits_with_1(
    checkpoint: Path,
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    measure = FakeBench.measure_cases

    def busy(self: FakeBench, cases: Sequence[Case], *, final: bool = False) -> list[Measurement]:
        return [replace(one, status="contended") for one in measure(self, cases, final=final)]

    monkeypatch.setattr(FakeBench, "measure_cases", busy)
    assert prune_tiny(checkpoint, corpus, tmp_path / "run", "--json") == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["status"], found["verdict"]) == ("uncertain", "uncertain, the device was busy or slowed down")


def test_json_has_both_qualities(
    checkpoint: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prune_tiny(checkpoint, corpus, tmp_path / "run", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["quality_through"] == "llamacpp"
    assert {"kl", "dense_kl", "torch_kl", "torch_kl_without_recovery"} <= set(found)


def test_a_budget_is_about_the_statistic_that_is_asked_for() -> None:
    given = prune._parser().parse_args(["--target", "host_cpu", "--budget", "70%", "--stat", "p90"])
    assert prune.options_of(given, device=devices.get("host_cpu")).budget.statistic == "p90"


def test_a_comparison_of_budgets_and_ratios_is_printed_and_keeps_its_models(
    checkpoint: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    asked = ("--budget", "80%", "--ratio", "0.3", "--methods", "magnitude", "--keep-models")
    assert compare_tiny(checkpoint, corpus, out, *asked) == 0
    assert f"{(out / 'compare.md').read_text()}\neverything is in {out}\n" == capsys.readouterr().out
    assert [row["budget"] for row in read_json(out / "compare.json")["rows"]] == ["80%", "ratio 0.3"]
    assert (out / "runs" / "ratio-0.3" / "magnitude" / "checkpoint").is_dir()


def test_json_on_standard_output_is_json_alone(
    checkpoint: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    compare_tiny(checkpoint, corpus, tmp_path / "out", "--budget", "80%", "--methods", "magnitude", "--json")
    assert json.loads(capsys.readouterr().out)["rows"][0]["method"] == "magnitude"


def test_nothing_to_compare_at_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(compare.main, "--target", "host_cpu") == 2
    assert "name a --budget or a --ratio" in last_line(capsys)


def test_unknown_method_is_found_before_any_work(
    checkpoint: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare_tiny(checkpoint, corpus, tmp_path / "out", "--budget", "80%", "--methods", "dilap", "magic") == 2
    assert "unknown method 'magic'" in last_line(capsys)
    assert not (tmp_path / "out").exists()


def test_settings_go_to_the_methods_that_have_them(checkpoint: Path, corpus: Path, tmp_path: Path) -> None:
    settings = ("--set", "flap.metric=IFV", "--set", "steps=1")
    arguments = ("--budget", "80%", "--methods", "flap", "llm_streamline", *settings)
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
    named = [line for line in lines if line and not line.startswith("of image networks")]
    assert [line.split()[0] for line in named] == [*METHODS, *NETWORK_METHODS]
    assert all("arXiv" in line or "this project" in line for line in named)


@pytest.mark.parametrize(
    ("cwd", "given"), [("llama", "."), ("llama", "./"), ("llama/sub", ".."), ("", "llama/"), ("", "llama/sub/..")]
)
def test_an_export_lies_beside_the_checkpoint_by_default(
    cwd: str, given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "llama" / "sub").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / cwd)
    assert _beside(given, "llamacpp-f16").resolve() == tmp_path / "llama-llamacpp-f16"


EVERY_COMMAND = pytest.mark.parametrize(
    ("main", "arguments"),
    [
        (prune.main, ["--target", "host_cpu", "--budget", "70%", "--model"]),
        (prune.main, ["--pattern", "2:4", "--model"]),
        (compare.main, ["--target", "host_cpu", "--budget", "70%", "--methods", "magnitude", "--model"]),
        (profile.main, ["--device", "host_cpu", "--estimate", "--model"]),
        (evaluation.main, ["--costs"]),
        (export.main, ["--backend", "llamacpp"]),
    ],
    ids=["prune", "prune-pattern", "compare", "profile", "eval", "export"],
)


@EVERY_COMMAND
@pytest.mark.parametrize(
    "change",
    [
        ("--merge-adapter", "nowhere", "no adapter in 'nowhere': there is no adapter_config.json"),
        ("--vocabulary", "nowhere.txt", "text 'nowhere.txt' does not exist"),
    ],
)
def test_every_command_that_loads_a_model_can_change_it_first(
    *,
    main: Callable[[], None],
    arguments: list[str],
    change: tuple[str, str, str],
    checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(checkpoint.parent)
    option, value, words = change
    assert call(main, *arguments, checkpoint, option, value) == 2
    assert words in last_line(capsys)

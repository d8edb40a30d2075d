"""Lists are given one way everywhere: their items stand apart by spaces or by commas."""

import sys
from pathlib import Path

import pytest

from dilap.cli import compare
from dilap.cli import eval as evaluation


@pytest.mark.parametrize("words", [["dilap", "flap"], ["dilap,flap"], ["dilap,", "flap"], ["dilap, flap,dilap"]])
def test_methods_are_parted_by_spaces_or_commas(words: list[str]) -> None:
    given = compare._parser().parse_args(["--target", "host_cpu", "--methods", *words])
    assert given.methods == ["dilap", "flap"]


@pytest.mark.parametrize("words", [["85%", "70%"], ["85%,70%"]])
def test_budgets_are_parted_by_spaces_or_commas(words: list[str]) -> None:
    assert compare._parser().parse_args(["--target", "host_cpu", "--budget", *words]).budget == ["85%", "70%"]


@pytest.mark.parametrize("words", [["0.3", "0.5"], ["0.3,0.5"]])
def test_ratios_are_parted_by_spaces_or_commas(words: list[str]) -> None:
    assert compare._parser().parse_args(["--target", "host_cpu", "--ratio", *words]).ratio == [0.3, 0.5]


def test_an_option_that_is_given_again_adds_to_its_list() -> None:
    given = compare._parser().parse_args(["--target", "host_cpu", "--budget", "85%", "--budget", "70%,85%"])
    assert given.budget == ["85%", "70%"]


def test_a_list_has_its_defaults_only_where_it_is_not_given() -> None:
    assert compare._parser().parse_args(["--target", "host_cpu", "--methods", "flap"]).methods == ["flap"]
    assert compare._parser().parse_args(["--target", "host_cpu"]).methods == ["all"]


def test_a_ratio_that_is_no_number_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        compare._parser().parse_args(["--target", "host_cpu", "--ratio", "0.3,half"])
    assert stopped.value.code == 2
    assert "argument --ratio: a share between 0 and 1, got 'half'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["runs/one", "--tasks", "piqa", "arc_easy"],
        ["runs/one", "--tasks", "piqa,arc_easy"],
        ["--tasks", "piqa,arc_easy", "runs/one"],
        ["--tasks", "piqa", "arc_easy", "--limit", "3", "runs/one"],
    ],
)
def test_tasks_stand_before_or_behind_what_is_scored(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["dilap-eval", *words])
    given = evaluation._given()
    assert (given.subject, given.tasks) == ("runs/one", ["piqa", "arc_easy"])


def test_tasks_alone_are_told_that_a_model_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["dilap-eval", "--tasks", "piqa"])
    with pytest.raises(SystemExit):
        evaluation._given()
    assert "name what is scored" in capsys.readouterr().err


def test_costs_are_measured_on_a_device_of_the_users_list(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    toml = tmp_path / "devices.toml"
    toml.write_text('[jetson_cpu]\nssh = "me@board"\n')
    words = ["dilap-eval", "x", "--costs", "--device", "jetson_cpu", "--devices", str(toml), "--force"]
    monkeypatch.setattr(sys, "argv", words)
    given = evaluation._given()
    device = evaluation._device(given)
    assert device.location is not None
    assert device.location.ssh is not None
    assert device.location.ssh.destination == "me@board"
    assert given.force

"""Several processes at one job: two give what one gives, only the main one speaks, and none waits for ever."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from standins import ROOT
from standins.fake_job import prune_tiny
from standins.launcher import Ended
from standins.models import tiny_model
from standins.process_scenarios import STEPS, STOPPED
from torch.testing import assert_close

from dilap.core.errors import InvalidInput, Unsupported
from dilap.models.processes import Processes, Team, with_helpers


class Scenarios:
    """What came of the scenarios in `standins.process_scenarios`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ended: dict[str, list[Ended]] = torch.load(folder / "ended.pt", weights_only=False)

    def of(self, name: str) -> Any:
        codes = [one.code for one in self.ended[name]]
        assert set(codes) == {0}, "\n".join(one.printed for one in self.ended[name])
        return torch.load(self.folder / f"{name}.pt", weights_only=False)


@pytest.fixture(scope="module")
def scenarios(tmp_path_factory: pytest.TempPathFactory) -> Scenarios:
    folder = tmp_path_factory.mktemp("processes")
    places = {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "TORCH_CPP_LOG_LEVEL": "ERROR"}  # as commands set it
    asked = [sys.executable, "-m", "standins.process_scenarios", str(folder)]
    done = subprocess.run(asked, env=os.environ | places, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return Scenarios(folder)


@pytest.mark.parametrize("name", ["floats", "mixed"])
def test_two_processes_give_the_plan_of_one(scenarios: Scenarios, name: str) -> None:
    assert scenarios.of(f"{name}-2")["plan"] == scenarios.of(f"{name}-1")["plan"]


def test_two_processes_give_the_weights_of_one(scenarios: Scenarios) -> None:
    one, two = (scenarios.of(f"floats-{count}")["weights"] for count in (1, 2))
    assert_close(two, one, rtol=1e-3, atol=1e-4)  # Adam divides by small numbers, which makes rounding errors larger


# Where matrices are rounded to few values, an error in the last digit may lead to another value.
@pytest.mark.parametrize(("name", "rtol"), [("floats", 1e-4), ("mixed", 0.02)])
def test_two_processes_have_the_losses_of_one(scenarios: Scenarios, name: str, rtol: float) -> None:
    one, two = (scenarios.of(f"{name}-{count}") for count in (1, 2))
    assert len(one["recovery_kls"]) >= 3
    assert_close(two["recovery_kls"], one["recovery_kls"], rtol=rtol, atol=0)
    assert_close(two["recovery_validation_kls"], one["recovery_validation_kls"], rtol=rtol, atol=0)


def test_statistics_of_uneven_shares_are_those_of_the_whole_text(scenarios: Scenarios) -> None:
    one, two = (scenarios.of(f"statistics-{count}") for count in (1, 2))
    assert_close(two, one, rtol=1e-5, atol=1e-4)


def test_a_killed_recovery_of_two_processes_goes_on_with_the_very_next_step(scenarios: Scenarios) -> None:
    assert scenarios.ended["killed"][0].code == 9
    whole, resumed = scenarios.of("whole-2"), scenarios.of("resumed")
    assert len(whole) == STEPS > STOPPED
    assert resumed == whole


def test_batches_may_have_fewer_sequences_than_there_are_processes(scenarios: Scenarios) -> None:
    assert_close(scenarios.of("whole-2"), scenarios.of("whole-1"), rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", ["main fails", "main fails within", "helper fails", "helper dies", "other versions"])
def test_a_failure_is_one_line_of_the_main_process_and_none_hangs(scenarios: Scenarios, name: str) -> None:
    main, helper = scenarios.ended[name]
    assert main.code == 2
    assert main.printed.startswith("error: ")
    assert main.printed.count("\n") == 1
    assert helper.code is not None
    assert helper.printed == ""


def test_models_that_are_split_among_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(Unsupported, match="launch them without FSDP"):
        with_helpers(lambda: None)


def test_an_accelerator_of_another_process_is_refused() -> None:
    with torch.device("meta", 1):
        model = tiny_model("llama")
    with pytest.raises(InvalidInput, match="leave --compute at auto"):
        Team(processes=Processes(count=2)).share_model("dense", model)


def test_more_processes_than_sequences_are_refused(
    checkpoint: Path, corpus: Path, tmp_path: Path, fake_device: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dilap.job.prune.team", lambda: Team(processes=Processes(count=17)))
    with pytest.raises(InvalidInput, match="start at most 16 processes"):
        prune_tiny(checkpoint, corpus, tmp_path / "out")


def test_the_main_process_says_what_failed_in_another_one(scenarios: Scenarios) -> None:
    assert scenarios.ended["helper fails"][0].printed == "error: process 1 of 2 failed: the disk is full\n"
    assert "another process of this job was killed" in scenarios.ended["helper dies"][0].printed
    assert "process 0 runs DiLAP 0.0" in scenarios.ended["other versions"][0].printed

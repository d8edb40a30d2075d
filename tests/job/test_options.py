"""The options of a job: one seed, one set of defaults."""

from typing import Any

import pytest

from dilap import methods
from dilap.cli import prune
from dilap.core.errors import InvalidInput
from dilap.core.workload import Budget
from dilap.job.options import JobOptions, job_options
from dilap.profilers.devices import device as devices

BUDGET = Budget.parse("70%")


def test_one_seed_is_that_of_text_search_and_recovery() -> None:
    options = JobOptions(budget=BUDGET, seed=3)
    assert (options.calibration.seed, options.levels.search.seed, options.recovery.seed) == (3, 3, 3)


def test_the_command_line_has_the_defaults_of_the_python_interface() -> None:
    device = devices.get("host_cpu")
    given = prune._parser().parse_args(["--target", "host_cpu", "--budget", "70%"])
    assert prune.options_of(given, device=device) == job_options(device=device, budget=BUDGET)


def test_a_folder_of_data_that_nothing_is_read_from_is_refused() -> None:
    device = devices.get("host_cpu")
    with pytest.raises(InvalidInput, match="has the files of --calib c4, wikitext2, ptb; --calib self reads none"):
        job_options(device=device, budget=BUDGET, data_dir="data")
    found = job_options(device=device, budget=BUDGET, calib="ptb", data_dir="data", calib_sequences=7).calibration
    assert (found.source, found.data_dir, found.train_sequences) == ("ptb", "data", 7)


def test_steps_of_training_are_a_default_of_the_methods_that_train() -> None:
    assert methods.trained_for("loraprune", {}, steps=7) == {"steps": "7"}
    assert methods.trained_for("loraprune", {"steps": "3"}, steps=7) == {"steps": "3"}
    assert methods.trained_for("puzzle", {}, steps=7) == methods.trained_for("loraprune", {}, steps=None) == {}


@pytest.mark.parametrize("step", [0.0, -0.1, 1.5, float("nan")])
def test_a_step_is_a_share(step: float) -> None:
    with pytest.raises(InvalidInput, match="--step"):
        job_options(device=devices.get("host_cpu"), budget=BUDGET, step=step)


@pytest.mark.parametrize(
    "given",
    [{"recover_tokens": 1000}, {"recover_data": ["a.txt"]}, {"recover_hidden": 0.5}, {"tracker": "tensorboard"}],
)
def test_an_option_of_a_recovery_asks_for_one(given: dict[str, Any]) -> None:
    device, name = devices.get("host_cpu"), next(iter(given)).replace("_", "-")
    with pytest.raises(InvalidInput, match=f"--{name} is for a recovery: give --recover lora or --recover full, too"):
        job_options(device=device, budget=BUDGET, **given)
    assert job_options(device=device, budget=BUDGET, recover="lora", **given).recovery.mode == "lora"

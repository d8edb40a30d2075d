"""The options of a job: one seed, one set of defaults."""

import pytest

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


@pytest.mark.parametrize("step", [0.0, -0.1, 1.5, float("nan")])
def test_a_step_is_a_share(step: float) -> None:
    with pytest.raises(InvalidInput, match="--step"):
        job_options(device=devices.get("host_cpu"), budget=BUDGET, step=step)

"""What is tried with several processes, in a Python of its own: `python -m standins.process_scenarios FOLDER`.

Everything runs from here, because importing torch takes longer than all of it. What came of a scenario is written into
`FOLDER/NAME.pt`, and how its processes ended into `FOLDER/ended.pt`.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import use_fake_device, use_single_precision, write_checkpoint, write_corpus

from dilap.cli import console
from dilap.core.codec import read_json
from dilap.core.errors import InvalidInput
from dilap.models.cut import shrink_
from dilap.models.load import load
from dilap.models.processes import Team, team, with_helpers
from dilap.models.recovery.lessons import KeptLessons
from dilap.models.recovery.options import RecoveryOptions
from dilap.models.recovery.train import Told, recover_
from dilap.models.reference import Teacher
from dilap.models.statistics import layer_statistics
from standins.fake_job import prune_tiny
from standins.launcher import Ended, launched
from standins.models import plan_for, random_tokens, tiny_model

STEPS, STOPPED = 6, 4  # of a recovery, and behind which of them it is killed
TOKENS = random_tokens(8, 16)  # every other batch is one sequence, of which only one process gets something


def job(folder: Path, out: Path, **options: Any) -> int:
    """Prune a tiny model on a made-up device, and keep plan and weights."""
    if prune_tiny_here(folder, out, **options):
        found = read_json(out / "result.json")
        weights = load(str(out / "checkpoint"), compute="cpu").model.state_dict()
        kept = {name: found[name] for name in ("recovery_kls", "recovery_validation_kls")}
        torch.save({"plan": read_json(out / "plan.json"), "weights": weights, **kept}, out.with_suffix(".pt"))
    return 0


def prune_tiny_here(folder: Path, out: Path, **options: Any) -> bool:
    """Whether this is the main process, when the job is done."""
    try:
        prune_tiny(folder / "tiny", folder / "corpus.txt", out, **options)
    except AssertionError:  # a helper gets None
        return False
    return True


def train(ours: Team, folder: Path, *, stop_behind: int = STEPS) -> list[float]:
    """Recover a tiny model; the KLs of all steps."""

    def stop(told: Told) -> None:
        if told.step == stop_behind != STEPS:
            os._exit(9)

    dense = tiny_model("llama")
    teacher = Teacher.of(dense, TOKENS)
    model = shrink_(dense, plan_for(dense, {"layers.0.channels": tuple(range(48)), "layers.2.channels": ()}))
    options = RecoveryOptions(mode="full", steps=STEPS, batch_tokens=112, full_rate=0.03, checkpoint_seconds=0.0)
    lessons = KeptLessons(teacher, batch_tokens=112, seed=0)
    return recover_(
        model,
        lessons,
        options,
        validation=teacher,
        folder=folder,
        processes=ours.processes,
        progress=stop if ours.processes.is_main else lambda _: None,
    ).kls


def training(folder: Path, name: str, *, stop_behind: int = STEPS) -> int:
    def run() -> None:
        kls = team().together(train, folder, stop_behind=stop_behind)
        torch.save(kls, folder.with_name(f"{name}.pt"))

    with_helpers(run)
    return 0


def statistics(ours: Team) -> list[dict[str, Any]]:
    steps = layer_statistics(tiny_model("llama"), TOKENS[:7], covariance=True, processes=ours.processes)
    return [{role: vars(one) for role, one in step.statistics.items()} for step in steps]


def collecting(path: Path) -> int:
    with_helpers(lambda: torch.save(team().together(statistics), path))
    return 0


def fail_in_helper(ours: Team) -> None:
    if not ours.processes.is_main:
        raise InvalidInput("the disk is full")
    ours.processes.sum_(torch.zeros(2))


def die_in_helper(ours: Team) -> None:
    if not ours.processes.is_main:
        os._exit(9)
    ours.processes.sum_(torch.zeros(2))


def sum_ranks(ours: Team) -> torch.Tensor:
    total = torch.tensor([ours.processes.rank])
    ours.processes.sum_(total)
    return total


def fail_between() -> int:
    assert int(team().together(sum_ranks)) == 1
    raise InvalidInput("there is no such device")


def fail_within() -> int:
    with team().helped(sum_ranks):
        raise InvalidInput("there is no such device")


def other_versions() -> int:
    pytest.MonkeyPatch().setattr("dilap.models.processes.__version__", f"0.{os.environ['RANK']}")
    return command(fail_between)


def command(body: Callable[[], int]) -> int:
    console.run(body)
    return 0


def main(folder: Path) -> None:
    write_checkpoint(folder)
    write_corpus(folder)
    torch.set_num_threads(1)
    use_single_precision(patch := pytest.MonkeyPatch())
    use_fake_device(patch)
    floats = {"method": "dilap", "recover": "full", "recover_steps": 4, "recover_evaluate": 2}
    mixed: dict[str, Any] = {"method": "dilap", "precision": "auto", "recover": "lora", "recover_length": 32}
    mixed |= {"recover_data": [str(folder / "corpus.txt")], "recover_tokens": 3 * 128, "recover_batch": 128}
    ended: dict[str, list[Ended]] = {}
    for name, options in {"floats": floats, "mixed": mixed}.items():
        for count in (1, 2):
            out = folder / f"{name}-{count}"
            ended[out.name] = launched(lambda: job(folder, out, **options), folder=folder / "printed", count=count)  # noqa: B023
    for count in (1, 2):
        path = folder / f"statistics-{count}.pt"
        ended[path.stem] = launched(lambda: collecting(path), folder=folder / "printed", count=count)  # noqa: B023
    for count in (1, 2):
        whole = folder / f"whole-{count}"
        ended[whole.name] = launched(lambda: training(whole, whole.name), folder=whole, count=count)  # noqa: B023
    resumed = folder / "resumed"
    ended["killed"] = launched(lambda: training(resumed, "killed", stop_behind=STOPPED), folder=resumed)
    ended["resumed"] = launched(lambda: training(resumed, "resumed"), folder=resumed)
    failures: dict[str, Callable[[], int]] = {
        "main fails": lambda: command(fail_between),
        "main fails within": lambda: command(fail_within),
        "helper fails": lambda: command(lambda: team().together(fail_in_helper) or 0),
        "helper dies": lambda: command(lambda: team().together(die_in_helper) or 0),
        "other versions": other_versions,
    }
    for name, body in failures.items():
        ended[name] = launched(body, folder=folder / "failures")
    torch.save(ended, folder / "ended.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

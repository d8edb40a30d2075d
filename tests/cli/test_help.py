"""Help and version come at once, say what every option takes, and names mean the same in all commands."""

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from standins.fake_job import call, last_line

from dilap import __version__, backends
from dilap.cli import compare, export, profile, prune, report
from dilap.cli import eval as evaluation
from dilap.profilers.devices import device as devices

COMMANDS: dict[str, Any] = {
    "prune": prune,
    "profile": profile,
    "export": export,
    "compare": compare,
    "eval": evaluation,
    "report": report,
}
HEAVY = ("torch", "transformers", "scipy", "peft", "lm_eval", "tqdm")


def test_help_and_version_of_no_command_import_what_takes_seconds() -> None:
    program = (
        "import importlib, sys\n"
        f"for name in {[*COMMANDS]}:\n"
        "    made = importlib.import_module(f'dilap.cli.{name}')._parser()\n"
        "    assert 'exit codes' in made.format_help()\n"
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("[]\n", "")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_runs_as_a_module(command: str) -> None:
    """Launchers of several processes start modules, and a module that does nothing would end as if all was done."""
    asked = [sys.executable, "-m", f"dilap.cli.{command}", "--version"]
    done = subprocess.run(asked, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr, done.returncode) == (f"dilap {__version__}\n", "", 0)


def options() -> list[tuple[str, argparse.Action]]:
    return [(name, action) for name, module in COMMANDS.items() for action in module._parser()._actions]


@pytest.mark.parametrize(("command", "action"), options(), ids=lambda one: getattr(one, "dest", one))
def test_every_option_has_words(command: str, action: argparse.Action) -> None:
    assert len(action.help or "") > 8
    is_named = action.metavar or action.choices or action.nargs == 0
    assert is_named, "its value has no better name than that of the option"


@pytest.mark.parametrize("command", ["prune", "profile", "export", "compare", "eval"])
def test_help_lists_the_precisions_of_every_runtime(command: str) -> None:
    said = " ".join(COMMANDS[command]._parser().format_help().split())
    assert all(f"{name} {' '.join(backends.get(name).precisions())}" in said for name in backends.BACKENDS)


NEEDED = {
    "prune": ["--budget", "70%"],
    "profile": [],
    "export": ["--backend", "llamacpp"],
    "compare": ["--budget", "70%", "--target", "host_cpu"],
    "eval": [],
}


@pytest.mark.parametrize("command", NEEDED)
def test_a_model_stands_alone_or_behind_its_name(command: str) -> None:
    parser = COMMANDS[command]._parser()
    alone, named, last = (
        parser.parse_args(words)
        for words in (
            ["./mine", *NEEDED[command]],
            ["--model", "./mine", *NEEDED[command]],
            [*NEEDED[command], "./mine"],
        )
    )
    assert alone == named == last
    assert "./mine" in vars(alone).values()


@pytest.mark.parametrize("command", NEEDED)
def test_two_models_are_refused(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        COMMANDS[command]._parser().parse_args(["./mine", "--model", "./other", *NEEDED[command]])
    assert "not allowed with argument" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["prune", "profile", "compare", "eval"])
def test_a_device_is_named_by_either_word(command: str) -> None:
    parser = COMMANDS[command]._parser()
    found = [parser.parse_args([*NEEDED[command], word, "s23"]) for word in ("--target", "--device")]
    assert found[0] == found[1]
    assert found[0].target == "s23"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--budget", "150%", "--precision", "q4_0"], "budget 150% is more than the dense model takes in q4_0"),
        (["--budget", "0.5x", "--method", "flap"], "budget 200% is more than the dense model takes in q4_0"),
        (["--budget", "70%", "--method", "wanda_ps"], "unknown method 'wanda_ps'; did you mean 'wanda_sp'"),
    ],
)
def test_what_can_never_work_is_refused_before_a_model_is_looked_for(
    options: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(prune.main, "--target", "host_cpu", tmp_path / "no such model", *options) == 2
    assert words in last_line(capsys)


IN_VAIN = {
    "a dry run": (["--pattern", "2:4", "--dry-run"], "--dry-run does not apply to zeros inside matrices (--pattern)"),
    "recovery": (["--pattern", "2:4", "--recover", "full"], "--recover does not apply to zeros inside matrices"),
    "a device": (["--pattern", "2:4", "--device", "host_cpu"], "--target does not apply to zeros inside matrices"),
    "a rebuild": (["--target", "host_cpu", "--ratio", "0.3", "--rebuild", "barber"], "--rebuild is for zeros inside"),
    "tasks": (["--target", "host_cpu", "--budget", "70%", "--tasks", "piqa"], "--tasks is for zeros inside matrices"),
}


@pytest.mark.parametrize("name", IN_VAIN)
def test_an_option_that_another_one_makes_useless_is_refused(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options, words = IN_VAIN[name]
    assert call(prune.main, tmp_path / "no such model", *options) == 2
    assert words in last_line(capsys)


def test_more_than_the_dense_model_takes_may_buy_better_precisions() -> None:
    given = prune._parser().parse_args(["--budget", "150%"])
    assert prune.options_of(given, device=devices.get("host_cpu")).budget.fraction == 1.5


@pytest.mark.parametrize("command", ["prune", "profile"])
def test_a_runtime_that_the_device_has_not_got_is_refused(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--target", "jetson_gpu", "--estimate", "--backend", "llamacpp", "no/model"]
    assert call(COMMANDS[command].main, *asked, *(["--budget", "70%"] if command == "prune" else [])) == 2
    assert "jetson_gpu has no llamacpp; it runs tensorrt" in last_line(capsys)


def test_a_folder_that_is_not_there_is_called_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert call(export.main, "--backend", "llamacpp", "runs/mine") == 2
    assert "there is no folder 'runs/mine' here" in last_line(capsys)

"""Progress where no terminal is: few lines instead of bars, and a log that says when."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from standins.fake_job import FinishedJob
from tqdm import tqdm

from dilap.cli.console import Console
from dilap.job import ending
from dilap.job.api import Bars
from dilap.job.lines import LineBar
from dilap.job.log import Log
from dilap.job.result import read_result

TIME = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d "


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A clock that stands at `now`."""
    found = SimpleNamespace(now=0.0)
    monkeypatch.setattr("dilap.job.lines.time", SimpleNamespace(monotonic=lambda: found.now))
    return found


def test_a_bar_is_a_line_every_thirty_seconds(clock: SimpleNamespace) -> None:
    lines: list[str] = []
    with LineBar(lines.append, "refit", total=100, unit="tok") as bar:
        for clock.now in range(100):
            bar.update(1)
    assert [line.split("%")[0] for line in lines] == ["refit:  31", "refit:  61", "refit:  91"]


def test_a_bar_without_a_total_says_what_it_is_at(clock: SimpleNamespace) -> None:
    lines: list[str] = []
    with LineBar(lines.append, "measure", total=None, unit="probe") as bar:
        clock.now = 31.0
        bar.set_postfix_str("round 2")
        bar.set_postfix(kl="0.1")
    (line,) = lines
    assert line.startswith("measure: 0.00probe")
    assert line.endswith("round 2]")


@pytest.mark.parametrize("progress", [Console(), Bars()])
def test_a_file_gets_no_bar(progress: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with progress.bar("library", total=10, unit="tok") as bar:
        bar.update(10)
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dilap.cli.console._is_terminal", lambda: True)
    with Console().bar("library", total=10, unit="tok") as bar:
        assert isinstance(bar, tqdm)


def test_a_line_of_the_log_begins_with_the_time(tmp_path: Path) -> None:
    log = Log(Console())
    log.write_to(tmp_path / "log.txt")
    log.say("exporting")
    assert re.fullmatch(TIME + r"exporting\n", (tmp_path / "log.txt").read_text(encoding="utf-8"))


def test_the_log_of_a_run_ends_with_its_table(finished: FinishedJob) -> None:
    lines = (finished.run / "log.txt").read_text(encoding="utf-8").splitlines()
    shown = ending.text(read_result(finished.run)).splitlines()
    assert [re.sub(TIME, "", line) for line in lines[-len(shown) :]] == shown

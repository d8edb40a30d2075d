"""How a command ends: whatever happens, one line and a code of its own, and nothing of another's moves the cursor."""

import errno
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dilap.cli import console
from dilap.core.errors import InvalidInput
from dilap.core.printable import MAX_LINE, csv_cell, markdown, printable, printable_lines
from dilap.job.log import Log

HOSTILE = "\x1b[2J\rok   device \x9b1m\u202e\ud800\n"


def ends(command: Callable[[], int], capsys: pytest.CaptureFixture[str]) -> tuple[object, str]:
    """The exit code and the one line that was printed."""
    with pytest.raises(SystemExit) as caught:
        console.run(command)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    return caught.value.code, lines[0]


def raising(error: BaseException) -> Callable[[], int]:
    def command() -> int:
        raise error

    return command


class PanicException(BaseException):
    """What a library in Rust raises."""


@pytest.mark.parametrize("error", [TypeError("no"), RecursionError("deep"), KeyError("x"), PanicException("rust")])
def test_an_error_of_our_own_is_one_line_that_names_its_traceback(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    code, line = ends(raising(error), capsys)
    assert code == 70
    assert line.startswith(f"internal error: {type(error).__name__}: ")
    (path,) = tmp_path.iterdir()
    assert line.endswith(str(path))
    assert "test_console.py" in path.read_text(encoding="utf-8")


def test_the_traceback_is_in_the_runs_log_where_there_is_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log, error = Log(console.Console()), ZeroDivisionError("no")
    log.write_to(tmp_path / "log.txt")
    log.keep_traceback(error)
    assert ends(raising(error), capsys)[1].endswith(str(tmp_path / "log.txt"))
    assert "ZeroDivisionError" in (tmp_path / "log.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "/x"), "/x cannot be used: Permission denied"),
        (OSError(errno.ENOSPC, "No space left on device"), "the system refuses: No space left on device"),
        (MemoryError(), "there is not enough memory"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: tried 9 bytes"),
            "not enough memory",
        ),
        (InvalidInput(f"device says {HOSTILE}"), "device says \\x1b[2J ok device \\x9b1m\\u202e\\ud800"),
    ],
)
def test_what_a_user_can_mend_is_one_line_and_bad_input(
    error: Exception, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, line = ends(raising(error), capsys)
    assert code == 2
    assert line.startswith("error: ")
    assert words in line


PRINTS = "from dilap.cli import console; console.run(lambda: console.show_json([1] * 100000) or 0)"


def run_python(script: str, redirection: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sh", "-c", f'exec "$0" -c "$1" {redirection}', sys.executable, script],
        capture_output=True, encoding="utf-8", check=False, timeout=60,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("redirection", "code", "words"),
    [
        (">/dev/full", 2, "No space left on device"),
        (">&-", 2, "standard output is closed"),
        ("2>&- >/dev/null", 0, ""),
    ],
)
def test_an_output_that_takes_nothing_is_one_line(redirection: str, code: int, words: str) -> None:
    done = run_python(PRINTS, redirection)
    assert (done.returncode, len(done.stderr.splitlines())) == (code, int(code != 0))
    assert words in done.stderr


def test_a_reader_that_is_gone_is_no_error() -> None:
    done = subprocess.run(
        ["bash", "-c", '"$0" -c "$1" | true; exit ${PIPESTATUS[0]}', sys.executable, PRINTS],
        capture_output=True, encoding="utf-8", check=False, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (141, "")


def test_an_output_without_our_characters_gets_their_numbers() -> None:
    script = "from dilap.cli import console; console.run(lambda: console.show('20 \u00b0C') or 0)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, check=True, timeout=60,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert done.stdout == b"20 \\xb0C\n"


def test_no_text_can_move_the_cursor_or_begin_a_line() -> None:
    shown = printable(HOSTILE)
    assert shown.isprintable()
    assert printable(shown) == shown


def test_a_long_line_is_cut() -> None:
    assert len(printable("x" * 100_000)) < MAX_LINE + 50
    assert re.search(r"\(98000 more characters\)$", printable("x" * 100_000))


def test_lines_of_ours_stay_lines() -> None:
    assert printable_lines("a\tb\nc\x07") == "a\tb\nc\\x07"


def test_what_is_said_is_one_line_on_the_screen_and_in_the_log(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = Log(console.Console())
    log.write_to(tmp_path / "log.txt")
    log.say(f"device{HOSTILE}")
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert (tmp_path / "log.txt").read_text(encoding="utf-8").count("\n") == 1


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("<script>alert(1)</script>", "&lt;script&gt;alert(1)&lt;/script&gt;"),
        ("a | b\n| c", r"a \| b\\n\| c"),
        ("`code` *loud* ~~gone~~", r"\`code\` \*loud\* \~\~gone\~\~"),
        ("[text](https://x) ![](https://x)", r"[text\](https://x) \![\](https://x)"),
        ("12.0 ms [11.9, 12.1], wanda_sp", "12.0 ms [11.9, 12.1], wanda_sp"),
    ],
)
def test_text_in_markdown_is_only_text(text: str, shown: str) -> None:
    assert markdown(text) == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("=cmd|' /C calc'!A0", "'=cmd|' /C calc'!A0"),
        ("+1+cmd", "'+1+cmd"),
        ("@SUM(1)", "'@SUM(1)"),
        ("-x", "'-x"),
        ("\t=1", "'\t=1"),
        ("-0.5", "-0.5"),
        ("+1e-3", "+1e-3"),
        (-0.5, -0.5),
        (None, None),
        ("wanda_sp", "wanda_sp"),
    ],
)
def test_no_cell_is_a_formula(value: object, shown: object) -> None:
    assert csv_cell(value) == shown

"""Command lines for devices' shells, run by the real sh of this machine."""

import base64
import subprocess
import time
from collections.abc import Sequence

import pytest
from standins.device_lab import HOSTILE

from dilap.core.errors import InvalidInput, LinkLost
from dilap.profilers.links.shells import posix, powershell
from dilap.profilers.links.transports import Completed, PipedProcess, run_marked


def run(argv: Sequence[str], *, seconds: float = 20) -> Completed:
    return run_marked(
        lambda mark: ["sh", "-c", posix(argv, seconds=seconds, mark=mark)],
        seconds=seconds,
        device="sh",
        explain=lambda words: words,
    )


@pytest.mark.parametrize("word", HOSTILE)
def test_any_word_arrives_as_it_is(word: str) -> None:
    assert run(["printf", "%s|", word, "end"]).stdout == f"{word}|end|"


def test_status_and_standard_error_come_back() -> None:
    assert run(["sh", "-c", "echo out; echo err >&2; exit 7"]) == Completed(status=7, stdout="out\n", stderr="err\n")


def test_what_a_login_shell_prints_is_not_the_programs() -> None:
    done = run_marked(
        lambda mark: ["sh", "-c", "echo Welcome; " + posix(["echo", "hi"], seconds=20, mark=mark)],
        seconds=20,
        device="sh",
        explain=lambda words: words,
    )
    assert done.stdout == "hi\n"


def test_output_that_stops_half_way_is_a_lost_link() -> None:
    with pytest.raises(LinkLost, match="the link to sh broke"):
        run_marked(
            lambda mark: ["sh", "-c", f"echo '{mark} begin'; echo half"],
            seconds=20,
            device="sh",
            explain=lambda words: words,
        )


def test_a_program_has_a_time_limit_on_the_device() -> None:
    assert run(["sleep", "30"], seconds=1).status == 124


def test_a_program_ends_with_the_pulse_and_takes_its_children_along(tmp_path: object) -> None:
    marker = f"{time.monotonic_ns()}"
    child = subprocess.Popen(
        ["sh", "-c", posix(["sh", "-c", f"sleep 300.{marker} & sleep 300.{marker}"], seconds=300)],
        stdin=subprocess.PIPE,
    )
    assert child.stdin is not None
    wait_for(f"sleep 300.{marker}", there=True)
    child.stdin.close()
    wait_for(f"sleep 300.{marker}", there=False)
    child.wait(timeout=10)


def test_a_program_that_ignores_terminate_is_killed() -> None:
    marker = f"{time.monotonic_ns()}"
    child = subprocess.Popen(
        ["sh", "-c", posix(["sh", "-c", f"trap '' TERM; sleep 300.{marker}"], seconds=300)], stdin=subprocess.PIPE
    )
    assert child.stdin is not None
    wait_for(f"sleep 300.{marker}", there=True)
    child.stdin.close()
    wait_for(f"sleep 300.{marker}", there=False)
    child.wait(timeout=10)


def test_input_is_handed_on_to_a_program_that_reads_it() -> None:
    child = PipedProcess(["sh", "-c", posix(["cat"], seconds=20, passes_input=True)], name="cat")
    child.write("hello\n")
    assert child.read_line(timeout=10) == "hello\n"
    child.close()


def test_a_nul_is_refused() -> None:
    with pytest.raises(InvalidInput, match="NUL"):
        posix(["a\0b"], seconds=1)


def decoded(command: str) -> str:
    return base64.b64decode(command.rsplit(maxsplit=1)[-1]).decode("utf-16-le")


def test_powershell_gets_every_word_as_a_literal() -> None:
    assert decoded(powershell(["py thon", "it's", "$(x)"], seconds=1)) == "& 'py thon' 'it''s' '$(x)'"


def words_in(script: str) -> list[str]:
    """The texts in single quotes, by the rule of PowerShell's tokenizer (`ScanStringLiteral`): any of the quotes ends a
    text, unless another of them follows, which then stands for itself."""
    quotes, words, at = set("'\u2018\u2019\u201a\u201b"), [], 0
    while at < len(script):
        at += 1
        if script[at - 1] not in quotes:
            continue
        word = ""
        while True:
            if script[at] in quotes:
                at += 1
                if at == len(script) or script[at] not in quotes:
                    break
            word, at = word + script[at], at + 1
        words.append(word)
    return words


def test_no_kind_of_quote_ends_a_word_of_powershells() -> None:
    argv = ["py", "it's", "\u2019; calc; \u2018", "\u201a\u201b'", "\u2018\u2019", "“fine”", "`$(x)`;|&"]
    assert words_in(decoded(powershell(argv, seconds=1))) == argv


def test_powershell_prints_the_marks() -> None:
    script = decoded(powershell(["whoami"], seconds=1, mark="M"))
    assert script == "'M begin'; & 'whoami'; ''; \"M end $LASTEXITCODE\""


def test_a_powershell_command_fits_into_cmds_line() -> None:
    store = powershell(["python", "-c", "x" * 1500], seconds=1, mark="M" * 22)
    assert len(store) < 8191


@pytest.mark.parametrize("word", ['say "hi"', "", "C:\\my models\\"])
def test_a_word_that_powershell_changes_is_refused(word: str) -> None:
    with pytest.raises(InvalidInput, match="cannot be passed to a program on Windows"):
        powershell(["python", word], seconds=1)


def wait_for(command: str, *, there: bool) -> None:
    """Until a process with that command line is there, or is gone."""
    for _ in range(100):
        found = subprocess.run(["pgrep", "-fx", command], capture_output=True, check=False).stdout
        if bool(found) is there:
            return
        time.sleep(0.1)
    raise AssertionError(f"{command!r} is {'not' if there else 'still'} there")

"""Command lines for the shell on a device: every command is an argv here, and is quoted for that shell.

A command runs under a *lease*, so that it does not outlive the link to it. The lease is a shell script that kills the
command's process group when our end of its standard input closes (a lost link closes it too), and in any case after a
time limit. That standard input is called the *pulse*.
"""

import base64
import re
import shlex
from collections.abc import Sequence
from typing import Protocol

from dilap.core.errors import InvalidInput

# $1: seconds; $2: a mark to print around the output, or nothing; $3: `pass` where the command reads our standard input,
# which is the pulse in any case. A command that reads it gets 3 s to end by itself. setsid and timeout are in coreutils
# and util-linux, in busybox and in Android's toybox.
_LEASE = """\
limit=$1 mark=$2 input=$3; shift 3
trap "" HUP
exec 3<&0
[ -z "$mark" ] || echo "$mark begin"
if [ "$input" = pass ]; then
  fifo=${TMPDIR:-/tmp}; [ -w "$fifo" ] || fifo=/data/local/tmp
  fifo=$fifo/dilap-lease.$$
  mkfifo "$fifo" || exit 1
  setsid timeout -k 2 "$limit" "$@" <"$fifo" 3<&- & group=$!
  exec 4>"$fifo"; rm -f "$fifo"
else
  setsid timeout -k 2 "$limit" "$@" </dev/null 3<&- & group=$!
  exec 4>/dev/null
fi
( if [ "$input" = pass ]; then cat <&3 >&4; exec 4>&-; sleep 3; else while read -r _ <&3; do :; done; fi
  kill -TERM -$group || kill -TERM $group
  sleep 2
  kill -KILL -$group || kill -KILL $group
) >/dev/null 2>&1 & pulse=$!
exec 3<&- 4>&-
wait $group; status=$?
kill -KILL $pulse 2>/dev/null
kill -KILL -$group 2>/dev/null
[ -z "$mark" ] || { echo; echo "$mark end $status"; }
exit $status
"""


# PowerShell takes each of these for the end of a text in single quotes, and two of them for one: the straight one, and
# those that word processors put in its place.
_QUOTE = re.compile("['\u2018\u2019\u201a\u201b]")


class Shell(Protocol):
    """Writes a command as a line for one kind of shell."""

    def __call__(self, argv: Sequence[str], *, seconds: float, mark: str = "", passes_input: bool = False) -> str:
        """Return a command line that runs `argv` while we hold its standard input open, and `seconds` at most.

        With a `mark` the output stands between the lines `MARK begin` and `MARK end STATUS`, apart from what a login
        shell prints.
        """


def posix(argv: Sequence[str], *, seconds: float, mark: str = "", passes_input: bool = False) -> str:
    """Return a command line for sh on Linux and Android, under a lease."""
    _require_no_nul(argv)
    words = [str(max(1, round(seconds))), mark, "pass" if passes_input else "none", *argv]
    return shlex.join(["sh", "-c", _LEASE, "dilap-lease", *words])


def powershell(argv: Sequence[str], *, seconds: float, mark: str = "", passes_input: bool = False) -> str:  # noqa: ARG001
    """Return a command line for Windows, for cmd and PowerShell alike.

    Windows has no process groups, so that there is no lease: the agent there ends by itself. Raises InvalidInput for
    words that Windows PowerShell would change on their way to a program.
    """
    _require_no_nul(argv)
    for word in argv:
        if reason := _lost_on_windows(word):
            raise InvalidInput(f"{reason} cannot be passed to a program on Windows: {word!r:.80}")
    call = "& " + " ".join("'" + _QUOTE.sub(r"\g<0>\g<0>", word) + "'" for word in argv)
    script = f"'{mark} begin'; {call}; ''; \"{mark} end $LASTEXITCODE\"" if mark else call
    encoded = base64.b64encode(script.encode("utf-16-le")).decode("ascii")
    return f"powershell -NoProfile -NonInteractive -EncodedCommand {encoded}"


def _require_no_nul(argv: Sequence[str]) -> None:
    if bad := next((word for word in argv if "\0" in word), None):
        raise InvalidInput(f"no command line can hold a NUL: {bad!r}")


def _lost_on_windows(word: str) -> str:
    """Return what Windows PowerShell 5 would change in a word; empty where it passes the word on as it is.

    It puts words with spaces into double quotes, and escapes nothing.
    """
    if '"' in word:
        return "a double quote"
    if not word:
        return "an empty word"
    return "a backslash at the end of words" if word.endswith("\\") and re.search(r"\s", word) else ""

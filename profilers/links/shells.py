"""Command lines for the shell at a device's end: every command is an argv here and is quoted for there.

A leased command does not outlive the link to it: the device kills its process group when our end of the pipe closes,
which a lost link does too, and in any case after a time limit of its own.
"""

import base64
import re
import shlex
from collections.abc import Sequence
from typing import Protocol

from dilap.core.errors import InvalidInput

# $1: seconds; $2: a mark to print around the output, or nothing; $3: `pass` where the command reads our stdin, which is
# the pulse either way. A command that reads it gets 3 s to end by itself. setsid and timeout are in coreutils and
# util-linux, in busybox and in Android's toybox.
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
    """How to say a command to one kind of shell."""

    def __call__(self, argv: Sequence[str], *, seconds: float, mark: str = "", passes_input: bool = False) -> str:
        """A command line that runs `argv` for as long as our end holds its stdin open, and `seconds` at most.

        With a `mark` the output stands between the lines `MARK begin` and `MARK end STATUS`, apart from what a login
        shell prints.
        """


def posix(argv: Sequence[str], *, seconds: float, mark: str = "", passes_input: bool = False) -> str:
    """For sh on Linux and Android."""
    _require_no_nul(argv)
    words = [str(max(1, round(seconds))), mark, "pass" if passes_input else "none", *argv]
    return shlex.join(["sh", "-c", _LEASE, "dilap-lease", *words])


def powershell(argv: Sequence[str], *, seconds: float, mark: str = "", passes_input: bool = False) -> str:  # noqa: ARG001
    """For Windows, under cmd and PowerShell alike. It has no process groups: the agent there ends by itself.

    Words that Windows PowerShell changes on their way to a program are refused.
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
    """What Windows PowerShell 5 does not hand on as it is: it quotes words with spaces, and escapes nothing."""
    if '"' in word:
        return "a double quote"
    if not word:
        return "an empty word"
    return "a backslash at the end of words" if word.endswith("\\") and re.search(r"\s", word) else ""

"""The memory of a program on a device without Python: what its kernel says of it, every 20 ms while it runs.

Looking takes the cores' time, so runs are watched or timed, never both.
"""

import re
import statistics
from collections.abc import Sequence

END = "end\n"  # the line after a process's last look
_LOOKS = 50
_LOOK = 'grep -E "^Vm(HWM|RSS):" /proc/{}/status'
_START = f"""\
"$@" & program=$!
while kill -0 $program; do {_LOOK.format("$program")} >&3; sleep 0.02; done 3>&2 2>/dev/null
wait $program
"""
_PROCESS = f"""\
for look in $(seq {_LOOKS}); do {_LOOK.format("$1")}; sleep 0.02; done
echo {END}"""


def watched_start(argv: Sequence[str]) -> list[str]:
    """Return a command that runs a program and prints, on standard error, what is said of it until its end."""
    return ["sh", "-c", _START, "dilap-watch", *argv]


def watched_process(number: str) -> list[str]:
    """Return a command that prints what is said of a running process in the next second or so, and then `END`."""
    return ["sh", "-c", _PROCESS, "dilap-watch", number]


def other_words(said: str) -> str:
    """Return a program's own words on standard error."""
    return "".join(line for line in said.splitlines(keepends=True) if not re.match("Vm(HWM|RSS):", line))


def peak_bytes(said: str) -> int:
    """Return the most resident memory; 0 where nothing was said."""
    return max(_bytes("VmHWM", said), default=0)


def average_bytes(said: str) -> int | None:
    """Return the mean of the resident memory; None where nothing was said."""
    found = _bytes("VmRSS", said)
    return round(statistics.fmean(found)) if found else None


def _bytes(name: str, said: str) -> list[int]:
    """Return the bytes of every line `NAME: 123 kB`."""
    return [int(one) * 1024 for one in re.findall(rf"^{name}:\s*([0-9]{{1,12}}) kB", said, re.MULTILINE)]

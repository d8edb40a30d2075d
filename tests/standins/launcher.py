"""Starts functions in several processes, as `torchrun` starts a command, and says how each of them ended."""

import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

_DEADLINE = 240.0  # seconds after which a process counts as hanging: the machine may be slow


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit code, None where it hung, and what it printed."""

    code: int | None
    printed: str


def launched(job: Callable[[], int], *, folder: Path, count: int = 2) -> list[Ended]:
    """Run `job` in `count` processes that fork from this one, which must not have computed anything yet."""
    folder.mkdir(parents=True, exist_ok=True)
    port = _free_port()
    children = [_forked(job, rank, count, port, folder) for rank in range(count)]
    codes = _codes(children)
    return [Ended(code, (folder / f"{rank}.txt").read_text()) for rank, code in enumerate(codes)]


def _forked(job: Callable[[], int], rank: int, count: int, port: int, folder: Path) -> int:
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    printed = os.open(folder / f"{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(printed, 1)
    os.dup2(printed, 2)
    code = 99
    try:
        code = job()
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _codes(children: Sequence[int]) -> list[int | None]:
    """Wait for the processes, which are ended where they take too long."""
    deadline, codes = time.monotonic() + _DEADLINE, dict[int, int | None]()
    while len(codes) < len(children):
        for child in (one for one in children if one not in codes):
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                codes[child] = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > deadline:
                os.kill(child, 9)
                os.waitpid(child, 0)
                codes[child] = None
        time.sleep(0.02)
    return [codes[child] for child in children]


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])

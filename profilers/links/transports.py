"""Ways to reach a device. A transport starts programs there, with their pipes on this machine, and copies files.

Two words recur here and in `shells`. The *pulse* is the standard input of what we start on a device: our end of it
stays open as long as we are there. A program on a device with a POSIX shell runs under a *lease*, a shell script that
kills it when the pulse ends (a lost link ends it, too) or when its time is up.
"""

import contextlib
import os
import queue
import re
import secrets
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

from dilap.core.documents import words_of
from dilap.core.errors import LinkLost, Unavailable
from dilap.core.printable import printable

MAX_LINE = 1 << 20  # characters: an answer with 1,000 samples has 20,000
MAX_OUTPUT_BYTES = 64 << 20  # the most that a program may print until its end
_MAX_WAITING_LINES = 256  # lines that nobody has asked for yet: a device that prints more has to wait
_LEAST_COPY_SECONDS = 60.0  # that a copy may take beyond those of its bytes
_GRACE_SECONDS = 10.0  # for a device to notice that the pulse ended, kill the leased program and say so


@dataclass(frozen=True, kw_only=True)
class Completed:
    """A program that ran on a device to its end."""

    status: int
    stdout: str
    stderr: str

    def checked(self, doing: str) -> str:
        """Return standard output if the program succeeded. Raises Unavailable, saying that `doing` failed, if not."""
        if self.status != 0:
            last = (self.stderr.strip() or self.stdout.strip() or "no message").splitlines()[-1]
            raise Unavailable(f"{doing} failed with status {self.status}: {last}")
        return self.stdout


class Process(Protocol):
    """A running program that answers lines with lines."""

    def write(self, text: str) -> None:
        """Send text as it is. Raises LinkLost where nobody reads it any more."""

    def read_line(self, *, timeout: float) -> str:
        """Return the next line. Raises LinkLost where the program ended or stays silent for `timeout` seconds."""

    def status_of_death(self) -> int | None:
        """Return the status (negative) of a program on this machine that a signal has killed; None in other cases."""

    def close(self) -> None:
        """Close its input, which asks it to end, and make sure that it does."""


class Transport(Protocol):
    """A way to a device; paths there are relative to where its programs start."""

    def run(self, argv: Sequence[str], *, seconds: float) -> Completed:
        """Run a program to its end. Raises LinkLost where its end is not reported within `seconds`."""

    def start(self, argv: Sequence[str], *, seconds: float) -> Process:
        """Start a program; it ends when its Process is closed, when the link is lost, or after `seconds`."""

    def push(self, path: Path, remote: str, *, resume: bool = False) -> None:
        """Copy a file there; with `resume`, only the rest of what is there already. The caller checks the content."""

    def close(self) -> None:
        """End the connection to the device."""


class PipedProcess:
    """A child of this process with pipes: the program itself, or the ssh or adb client that runs it on a device."""

    def __init__(
        self,
        argv: Sequence[str],
        *,
        name: str,
        environment: Mapping[str, str] | None = None,
        is_local: bool = False,
    ) -> None:
        """Start the child. `is_local` says that it is the program itself and no client of a device that runs it."""
        self._name, self._is_local = name, is_local
        self._complaints = tempfile.TemporaryFile()  # noqa: SIM115  (it lives as long as the child)
        try:
            self._child = subprocess.Popen(
                argv,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._complaints,
                encoding="utf-8",
                errors="replace",
                env=environment,
                # a Ctrl-C in the terminal is for us alone: we end the child by closing its input
                start_new_session=True,
            )
        except (OSError, ValueError) as error:
            self._complaints.close()
            raise Unavailable(f"{argv[0]} cannot be started: {words_of(error)}") from error
        self._lines: queue.Queue[str | None] = queue.Queue(_MAX_WAITING_LINES)
        self._closing = threading.Event()
        # a thread, because a pipe cannot be waited for with a timeout on Windows
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def write(self, text: str) -> None:
        assert self._child.stdin is not None
        try:
            self._child.stdin.write(text)
            self._child.stdin.flush()
        except OSError:
            raise LinkLost(self._obituary()) from None

    def read_line(self, *, timeout: float) -> str:
        try:
            answer = self._lines.get(timeout=timeout)
        except queue.Empty:
            raise LinkLost(f"{self._name} gave no answer for {timeout:g} s") from None
        if answer is None:
            raise LinkLost(f"{self._name} printed a line of more than {MAX_LINE >> 20} MB; try again")
        if not answer:
            raise LinkLost(self._obituary())
        return printable(answer.rstrip("\r\n"), width=MAX_LINE) + "\n"

    def status_of_death(self) -> int | None:
        status = self._child.poll()
        return status if self._is_local and status is not None and status < 0 else None

    def close(self) -> None:
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._closing.set()
        with contextlib.suppress(OSError):  # unsent data for a program that has ended
            self._child.stdin.close()
        try:
            self._child.wait(timeout=_GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
        self._reader.join()
        self._child.stdout.close()
        self._complaints.close()

    def _read(self) -> None:
        assert self._child.stdout is not None
        while line := self._child.stdout.readline(MAX_LINE):
            is_whole = line.endswith("\n") or len(line) < MAX_LINE
            self._put(line if is_whole else None)
            if self._closing.is_set() or not is_whole:
                return
        self._put("")  # the end

    def _put(self, line: str | None) -> None:
        while not self._closing.is_set():
            with contextlib.suppress(queue.Full):
                self._lines.put(line, timeout=0.1)
                return

    def _obituary(self) -> str:
        """Return the message for a child that has ended: its status and the last line of its standard error."""
        status = self._child.wait()
        self._complaints.seek(0)
        words = self._complaints.read()[-4096:].decode("utf-8", "replace").strip().splitlines()
        last = f": {printable(words[-1])}" if words else ""
        return f"{self._name} ended with status {status}{last}"


def copy_seconds(num_bytes: int, *, bytes_per_second: float) -> float:
    """Return how long a copy of so many bytes may take over the slowest link that is worth waiting for."""
    return _LEAST_COPY_SECONDS + num_bytes / bytes_per_second


def run_marked(
    client: Callable[[str], Sequence[str]], *, seconds: float, device: str, explain: Callable[[str], str]
) -> Completed:
    """Run a program on a device to its end; `client` makes the local argv, which begins with ssh or adb, from a mark.

    The mark is a random word that is printed before and after the program's output. Only what stands between is the
    program's: a login shell may print before it. Where the second mark is missing, the link broke, whatever status the
    client ended with: LinkLost is raised, with the advice that `explain` makes of the client's complaint.
    """
    mark = f"dilap-{secrets.token_hex(8)}"
    completed = run_client(client(mark), seconds=seconds + _GRACE_SECONDS, device=device)
    _, begun, rest = completed.stdout.partition(f"{mark} begin\n")
    output, ended, status = rest.rpartition(f"\n{mark} end ")
    if not begun or not ended or not re.fullmatch(r"-?[0-9]{1,10}\s*", status):
        raise LinkLost(f"the link to {device} broke: {explain(completed.stderr.strip() or completed.stdout.strip())}")
    return Completed(status=int(status), stdout=output, stderr=completed.stderr)


def run_client(argv: Sequence[str], *, seconds: float, device: str) -> Completed:
    """Run a program here, such as an ssh client. Its standard input is the pulse, which stays open until it ends."""
    pulse, ours = os.pipe()
    try:
        try:
            child = subprocess.Popen(argv, stdin=pulse, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        except (OSError, ValueError) as error:
            raise Unavailable(f"{argv[0]} cannot be started: {words_of(error)}") from error
        finally:
            os.close(pulse)
        try:
            outputs = _outputs(child, seconds=seconds, device=device)
        finally:
            _end(child)
    finally:
        os.close(ours)
    stdout, stderr = map(_words_of_device, outputs)
    return Completed(status=child.returncode, stdout=stdout, stderr=stderr)


def _outputs(child: "subprocess.Popen[bytes]", *, seconds: float, device: str) -> tuple[bytes, bytes]:
    """Read both outputs to their ends. Raises LinkLost where they do not end in time, or are endless."""
    assert child.stdout is not None
    assert child.stderr is not None
    found = bytearray(), bytearray()
    readers = [
        threading.Thread(target=_collect, args=(pipe, into, child), daemon=True)
        for pipe, into in zip((child.stdout, child.stderr), found, strict=True)
    ]
    for reader in readers:
        reader.start()
    deadline = time.monotonic() + seconds
    for reader in readers:
        reader.join(max(0.0, deadline - time.monotonic()))
    if any(len(one) > MAX_OUTPUT_BYTES for one in found):
        raise LinkLost(f"{device} printed more than {MAX_OUTPUT_BYTES >> 20} MB where a few lines are expected")
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(max(0.0, deadline - time.monotonic()))
    if child.returncode is None or any(reader.is_alive() for reader in readers):
        raise LinkLost(f"{device} gave no answer for {seconds:g} s")
    return bytes(found[0]), bytes(found[1])


def _collect(pipe: IO[bytes], into: bytearray, child: "subprocess.Popen[bytes]") -> None:
    with contextlib.suppress(OSError, ValueError):  # closed by us, because it took too long
        while data := os.read(pipe.fileno(), 1 << 16):
            into += data
            if len(into) > MAX_OUTPUT_BYTES:
                child.kill()
                return


def _words_of_device(data: bytes) -> str:
    """Return a device's output as text, without what could move a cursor and without Windows' carriage returns."""
    lines = data.decode("utf-8", "replace").replace("\r\n", "\n").split("\n")
    return "\n".join(printable(line, width=MAX_OUTPUT_BYTES) for line in lines)


def _end(child: "subprocess.Popen[bytes]") -> None:
    """Make sure that a client has ended; with it, the pulse on the device ends."""
    if child.poll() is None:
        child.kill()
        child.wait()
    for pipe in (child.stdout, child.stderr):
        assert pipe is not None
        pipe.close()

"""Ways to reach a device. Every one starts a process there by argv, with its pipes here."""

import contextlib
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import dilap
from dilap.errors import Unavailable


class Process(Protocol):
    """A running program that answers lines with lines."""

    def request(self, line: str, *, timeout: float) -> str:
        """Send one line and wait for one. Raises Unavailable where the program ended or stays silent."""

    def close(self) -> None:
        """Close its input, which asks it to end, and see that it does."""


class Transport(Protocol):
    """A way to a device. `python` is the argv prefix that runs DiLAP's agent there."""

    python: tuple[str, ...]

    def start(self, argv: Sequence[str]) -> Process:
        """Start a program on the device."""

    def push(self, path: Path, *, sha256: str, companions: Mapping[str, str]) -> str:
        """Bring a file and those beside it (name -> SHA-256) to the device; its path there.

        What the device has already, with that content, stays.
        """

    def close(self) -> None:
        """Leave the device."""


class PipedProcess:
    """A child of this process; ssh and adb are children too."""

    def __init__(self, argv: Sequence[str], *, environment: Mapping[str, str] | None = None) -> None:
        self._argv = argv
        self._complaints = tempfile.TemporaryFile()  # noqa: SIM115  (it lives as long as the child)
        try:
            self._child = subprocess.Popen(
                argv,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._complaints,
                encoding="utf-8",
                env=environment,
            )
        except OSError as error:
            self._complaints.close()
            raise Unavailable(f"{argv[0]} cannot be started: {error.strerror}") from error
        self._lines: queue.Queue[str] = queue.Queue()
        # a thread, because a pipe cannot be waited for with a timeout on Windows
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def request(self, line: str, *, timeout: float) -> str:
        assert self._child.stdin is not None
        try:
            self._child.stdin.write(line + "\n")
            self._child.stdin.flush()
        except OSError:
            raise Unavailable(self._obituary()) from None
        try:
            answer = self._lines.get(timeout=timeout)
        except queue.Empty:
            raise Unavailable(f"{self._argv[0]} gave no answer for {timeout:g} s") from None
        if not answer:
            raise Unavailable(self._obituary())
        return answer

    def close(self) -> None:
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        with contextlib.suppress(OSError):  # unsent data for a program that has ended
            self._child.stdin.close()
        try:
            self._child.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
        self._reader.join()
        self._child.stdout.close()
        self._complaints.close()

    def _read(self) -> None:
        assert self._child.stdout is not None
        for line in self._child.stdout:
            self._lines.put(line)
        self._lines.put("")  # the end

    def _obituary(self) -> str:
        status = self._child.wait()
        self._complaints.seek(0)
        words = self._complaints.read()[-4096:].decode("utf-8", "replace").strip().splitlines()
        last = f": {words[-1]}" if words else ""
        return f"the agent on the device ended with status {status}{last}"


class LocalTransport:
    """The machine DiLAP runs on."""

    python: tuple[str, ...] = (sys.executable,)

    def start(self, argv: Sequence[str]) -> Process:
        # the child must import this very DiLAP, also from a checkout that is not installed
        source = str(Path(dilap.__file__).resolve().parent.parent)
        paths = [source, *filter(None, [os.environ.get("PYTHONPATH")])]
        return PipedProcess(argv, environment={**os.environ, "PYTHONPATH": os.pathsep.join(paths)})

    def push(self, path: Path, *, sha256: str, companions: Mapping[str, str]) -> str:  # noqa: ARG002
        return str(path.resolve())

    def close(self) -> None:
        pass

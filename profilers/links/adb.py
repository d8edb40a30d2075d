"""Android devices over adb: the system's client, which takes care of USB, Wi-Fi pairing and keys."""

import re
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from dilap.core.errors import InvalidInput, LinkLost, Unavailable
from dilap.profilers.links.shells import posix
from dilap.profilers.links.transports import Completed, PipedProcess, Process, copy_seconds, run_client, run_marked

_CALLS = 3
_PAUSE_SECONDS = 0.5
_BYTES_PER_SECOND = 2e6  # the slowest link worth waiting for


class AdbTransport:
    """One device of the local adb server. A serial `host:port` is connected to first."""

    def __init__(self, serial: str) -> None:
        if not serial or any(ord(sign) < 32 for sign in serial):
            raise InvalidInput(f"{serial!r} is no adb serial; `adb devices` lists them")
        if shutil.which("adb") is None:
            raise Unavailable("adb is not installed here; run: apt-get install adb")
        self._serial = serial
        if re.fullmatch(r"[\w.-]+:\d+", serial) and not self._answers():
            self._connect()

    def run(self, argv: Sequence[str], *, seconds: float) -> Completed:
        return run_marked(
            lambda mark: self._adb("shell", "-T", posix(argv, seconds=seconds, mark=mark)),
            seconds=seconds,
            device=self._serial,
            explain=self._explain,
        )

    def start(self, argv: Sequence[str], *, seconds: float) -> Process:
        command = posix(argv, seconds=seconds, passes_input=True)
        return PipedProcess(self._adb("shell", "-T", command), name=f"the program on {self._serial}")

    def push(self, path: Path, remote: str, *, resume: bool = False) -> None:  # noqa: ARG002  (adb starts again)
        seconds = copy_seconds(path.stat().st_size, bytes_per_second=_BYTES_PER_SECOND)
        done = run_client(self._adb("push", str(path.resolve()), remote), seconds=seconds, device=self._serial)
        if done.status != 0:
            complaint = self._explain(done.stderr.strip() or done.stdout.strip())
            raise LinkLost(f"copying to {self._serial} failed: {complaint}")

    def close(self) -> None:
        pass

    def _connect(self) -> None:
        """Connect over the network, in several attempts: a busy phone, or one that just woke, may miss the first.

        Where all attempts fail, the first command will say what is wrong.
        """
        for _ in range(_CALLS):
            # disconnect first: adb calls a network device that went away `already connected`
            run_client(["adb", "disconnect", self._serial], seconds=15, device=self._serial)
            if "connected to" in run_client(["adb", "connect", self._serial], seconds=15, device=self._serial).stdout:
                return
            time.sleep(_PAUSE_SECONDS)

    def _answers(self) -> bool:
        """Return whether the device itself answers.

        `adb get-state` would say what the server remembers of it, even of a link that just broke.
        """
        try:
            return run_client(self._adb("shell", "-T", "true"), seconds=15, device=self._serial).status == 0
        except LinkLost:
            return False

    def _adb(self, *words: str) -> list[str]:
        return ["adb", "-s", self._serial, *words]

    def _explain(self, complaint: str) -> str:
        """Return the client's last line that calls itself an error, or its last one, with advice if there is any."""
        lines = complaint.splitlines() or ["the connection ended without a word"]
        last = next((line for line in reversed(lines) if "error" in line), lines[-1]).strip()
        for sign, advice in (
            ("unauthorized", "unlock the phone and allow this computer"),
            ("offline", "plug it in again, or run: adb reconnect"),
            ("not found", "`adb devices` lists the serials; is USB debugging on?"),
            ("more than one", "give the serial in devices.toml"),
        ):
            if sign in complaint:
                return f"{last}; {advice}"
        return last

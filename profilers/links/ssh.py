"""Devices over ssh: the system's OpenSSH client, with the user's own configuration, keys, agents and jump hosts."""

import contextlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dilap.core.errors import InvalidInput, LinkLost, Unavailable
from dilap.profilers.links.shells import Shell, posix
from dilap.profilers.links.transports import Completed, PipedProcess, Process, copy_seconds, run_client, run_marked

# A dead link is noticed after 15 s; a password is never asked for, because nobody may be there to type it.
_OPTIONS = ("BatchMode=yes", "ConnectTimeout=10", "ServerAliveInterval=5", "ServerAliveCountMax=3")
# Longest path of the folder above ours: a socket's name has 103 bytes on macOS (107 on Linux), of which ours takes 15
# (/dilap-abcdefgh), the hash 41 (/%C), and what ssh puts behind it while it connects 17.
_MAX_SOCKET_FOLDER = 103 - 15 - 41 - 17
BYTES_PER_SECOND = 500e3  # the slowest link worth waiting for


@dataclass(frozen=True, kw_only=True)
class SshAddress:
    """Where a device is: `user@host`, or a name of the user's ssh configuration, which fills what is not given."""

    destination: str
    port: int | None = None
    identity_file: str | None = None
    config_file: str | None = None

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[^\s\x00-\x1f-][^\s\x00-\x1f]*", self.destination):
            raise InvalidInput(
                f"{self.destination!r} is no ssh destination: write user@host, or a Host of ~/.ssh/config"
            )

    def options(self) -> list[str]:
        """Return the options for ssh and sftp alike."""
        given = [f"-o{option}" for option in _OPTIONS]
        if self.port is not None:
            given.append(f"-oPort={self.port}")
        if self.identity_file is not None:
            given += ["-i", os.path.expanduser(self.identity_file)]
        if self.config_file is not None:
            given += ["-F", os.path.expanduser(self.config_file)]
        return given


class SshTransport:
    """One connection over ssh, shared by all commands where the client can (OpenSSH on Windows cannot)."""

    def __init__(self, address: SshAddress, *, shell: Shell = posix) -> None:
        for program in ("ssh", "sftp"):
            if shutil.which(program) is None:
                raise Unavailable(f"{program} is not installed here; run: apt-get install openssh-client")
        self._address, self._shell = address, shell
        self._folder = tempfile.TemporaryDirectory(prefix="dilap-")
        self._socket = _socket_folder()
        self._options = address.options()
        if self._socket is not None:
            # ours and not the user's: closing it must not end the user's own sessions
            self._options += ["-oControlMaster=auto", f"-oControlPath={self._socket.name}/%C", "-oControlPersist=60"]

    def run(self, argv: Sequence[str], *, seconds: float) -> Completed:
        return run_marked(
            lambda mark: self._ssh(self._shell(argv, seconds=seconds, mark=mark)),
            seconds=seconds,
            device=self._address.destination,
            explain=self._explain,
        )

    def start(self, argv: Sequence[str], *, seconds: float) -> Process:
        command = self._shell(argv, seconds=seconds, passes_input=True)
        return PipedProcess(self._ssh(command), name=f"the program on {self._address.destination}")

    def push(self, path: Path, remote: str, *, resume: bool = False) -> None:
        """Copy one file. sftp's batch language cannot quote every name, so it is given one with a plain name here."""
        with tempfile.TemporaryDirectory(dir=self._folder.name) as folder:
            plain = Path(folder) / "file"
            plain.symlink_to(path.resolve())
            words = f"{'reput' if resume else 'put'} {_quoted(str(plain))} {_quoted(remote)}"
            seconds = copy_seconds(path.stat().st_size, bytes_per_second=BYTES_PER_SECOND)
            self._batch(words, seconds=seconds)

    def close(self) -> None:
        if self._socket is not None:
            with contextlib.suppress(LinkLost):  # the shared connection may have ended already
                run_client(["ssh", *self._options, "-Oexit", "--", self._address.destination], seconds=10, device="ssh")
            self._socket.cleanup()
        self._folder.cleanup()

    def _ssh(self, command: str) -> list[str]:
        return ["ssh", *self._options, "-T", "--", self._address.destination, command]

    def _batch(self, words: str, *, seconds: float) -> None:
        argv = ["sftp", "-q", *self._options, "-b", "-", "--", self._address.destination]
        try:
            done = subprocess.run(
                argv,
                input=words + "\n",
                capture_output=True,
                encoding="utf-8",
                errors="replace",
                timeout=seconds,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise LinkLost(f"copying to {self._address.destination} took longer than {seconds:.0f} s") from None
        if done.returncode != 0:
            complaint = self._explain(done.stderr.strip())
            raise LinkLost(f"copying to {self._address.destination} failed: {complaint}")

    def _explain(self, complaint: str) -> str:
        """Return the client's last line, with advice where the cause is known."""
        last = complaint.splitlines()[-1].strip() if complaint else "the connection ended without a word"
        target = self._address.destination
        for sign, advice in (
            ("Permission denied", f"add your key there: ssh-copy-id {target}"),
            ("Host key verification failed", f"look at the key and accept it: ssh {target}"),
            ("Could not resolve", "correct the host in devices.toml"),
            ("refused", "is sshd running there, on that port?"),
            ("timed out", "is the device on, and in this network?"),
        ):
            if sign in complaint:
                return f"{last}; {advice}"
        return last


def _socket_folder() -> "tempfile.TemporaryDirectory[str] | None":
    """Make a folder of our own in which the connection's socket has a short enough name; None where there is none.

    The path of the system's folder for temporary files is often too long (macOS's is); /tmp is there nearly always.
    """
    if os.name == "nt":
        return None
    for parent in (os.environ.get("XDG_RUNTIME_DIR"), tempfile.gettempdir(), "/tmp"):  # noqa: S108
        if parent and os.path.isabs(parent) and len(os.fsencode(parent)) <= _MAX_SOCKET_FOLDER:
            with contextlib.suppress(OSError):
                return tempfile.TemporaryDirectory(prefix="dilap-", dir=parent)
    return None


def _quoted(path: str) -> str:
    """Return a path in sftp's batch language. Raises InvalidInput for a line break, which it cannot express."""
    if "\n" in path or "\r" in path:
        raise InvalidInput(f"sftp cannot name a path with a line break: {path!r}")
    for sign in '\\"':  # `*`, `?` and `[` are no patterns in quotes
        path = path.replace(sign, f"\\{sign}")
    return f'"{path}"'

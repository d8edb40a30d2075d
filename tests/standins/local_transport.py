"""This machine as a device: programs and files without a link."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from dilap.profilers.links.transports import Completed, PipedProcess, Process, run_client


class LocalTransport:
    """A `Transport` to the machine that the tests run on."""

    def run(self, argv: Sequence[str], *, seconds: float) -> Completed:
        return run_client(argv, seconds=seconds, device="this machine")

    def start(self, argv: Sequence[str], *, seconds: float) -> Process:  # a child ends with its pipe
        return PipedProcess(argv, name="the program", is_local=True)

    def push(self, path: Path, remote: str, *, resume: bool = False) -> None:
        shutil.copyfile(path, remote)

    def close(self) -> None:
        pass

"""The folder in which a run grows: beside the output, under another name, until it is whole."""

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from dilap.cli.console import Console
from dilap.codec import digest, read_json, write_json
from dilap.errors import DilapError, InvalidInput


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep other processes out of `folder`, which is made if need be. Raises InvalidInput where one is in it.

    The system gives the lock back when a process dies, whatever it dies of.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise InvalidInput(f"another process is at work in {folder}; let it end, or choose another --out") from None
    try:
        yield
    finally:
        lock.release()


class Workspace:
    """A killed run leaves its folder behind; the same run started again goes on in it.

    Runs of one comparison have a `shared` folder for what is the same in all of them: calibration text, the dense model
    and what it says, whatever of the methods does not depend on the budget.
    """

    def __init__(self, out: Path, console: Console, *, shared: Path | None = None) -> None:
        if out.exists():
            raise InvalidInput(f"{out} already exists; remove it or choose another --out")
        self.out, self.console = out, console
        self.folder = out.with_name(f".{out.name}.unfinished")
        self.cache = self.folder / "cache"  # what only a later stage of the same run reads
        self.common = shared or self.cache
        self.methods = self.common / "methods"
        self.dense = (shared or self.folder) / "dense"
        self.stage_seconds: dict[str, float] = {}
        self.is_continued = False
        self._is_open = False

    @contextmanager
    def opened(self, identity: dict[str, Any]) -> Iterator[None]:
        """Start, or go on where a run with the same `identity` stopped. Raises InvalidInput for another's folder.

        Nothing is left of a new run that ends with an error of ours: its options were bad.
        """
        with held(self.cache):
            self._open(identity)
            try:
                yield
            except DilapError:
                if not self.is_continued:
                    self.discard()
                raise
            finally:
                self.console.log_to(None)

    def _open(self, identity: dict[str, Any]) -> None:
        path = self.cache / "identity.json"
        if path.exists():
            if digest(read_json(path)) != digest(identity):
                raise InvalidInput(
                    f"{self.folder} holds an unfinished run with other options; remove it or choose another --out"
                )
            if self._stages.exists():
                self.stage_seconds = {**read_json(self._stages), **self.stage_seconds}
            self.is_continued = True
            self.console.say(f"going on with the unfinished run in {self.folder}")
        else:
            write_json(path, identity)
        self._is_open = True
        self.console.log_to(self.folder / "log.txt")

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage; its seconds survive a kill between stages."""
        start = time.monotonic()
        yield
        seconds = self.stage_seconds.get(name, 0.0) + time.monotonic() - start
        self.stage_seconds[name] = round(seconds, 3)
        self.console.say(f"[{seconds:6.1f} s] {name}")
        if self._is_open:  # not before what an earlier run left there has been read
            write_json(self._stages, self.stage_seconds)

    def finish(self) -> None:
        """Drop what only the run itself needed and give the folder its name."""
        shutil.rmtree(self.cache)
        self.folder.rename(self.out)

    def discard(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def _stages(self) -> Path:
        return self.cache / "stages.json"

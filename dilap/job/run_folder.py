"""The folder in which a run is written: beside the output and under another name, until the run is finished."""

import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from dilap.backends import host
from dilap.core.codec import (
    checked,
    digest,
    is_leftover,
    part_of,
    read_json,
    remove,
    remove_leftovers,
    rename_folder,
    write_json,
)
from dilap.core.errors import DilapError, Infeasible, InvalidInput, Unsupported
from dilap.core.progress import Progress
from dilap.job.log import Log


@contextmanager
def held(folder: Path) -> Iterator[FileLock]:
    """Keep other processes out of `folder`, which is made if need be. Raises InvalidInput where one holds it already.

    The system releases the lock when the process dies, for whatever reason.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise InvalidInput(f"another process is at work in {folder}; let it end, or choose another --out") from None
    try:
        yield lock
    finally:
        lock.release()


class Workspace:
    """The folder of a run that is not finished, with the run's log, and the seconds and peak memory of its stages.

    A killed run leaves its folder behind, and the same run, started again, goes on in it. Only the file
    `FOLDER/cache/identity.json` says to which run a folder belongs.

    Runs of one comparison have a folder `shared` for what is the same in all of them: calibration text, the dense model
    and its answers, and everything that a method computes once for all budgets.
    """

    def __init__(self, out: Path, progress: Progress, *, shared: Path | None = None) -> None:
        tidy(out)
        self.folder = out.with_name(f".{out.name}.unfinished")
        if out.parent.is_dir():
            remove_leftovers(self.folder)  # left by a run that was killed while it was discarded
        if os.path.lexists(out):
            raise InvalidInput(f"{out} already exists; remove it or choose another --out")
        self.out, self.log = out, Log(progress)
        self.cache = self.folder / "cache"  # files that only later stages of the same run read
        self.common = shared or self.cache
        self.methods = self.common / "methods"
        self.dense = (shared or self.folder) / "dense"
        self.stage_seconds: dict[str, float] = {}
        self.stage_peak_bytes: dict[str, int] = {}
        self._peaks: list[int] = []  # of the stages that are running, the outer ones first
        self.is_continued = False
        self._is_open = False
        self._has_kept = False

    @contextmanager
    def opened(self, identity: dict[str, Any]) -> Iterator[None]:
        """Start the run, or go on where one with the same `identity` stopped.

        A run that ends with an error keeps its folder, so that the same command goes on in it. After a DilapError, the
        folder of a new run is removed where no stage was finished in it, or where these options can never work. Raises
        InvalidInput where the folder belongs to another run.
        """
        self._require_ours()
        with held(self.cache) as self._lock:
            self._open(identity)
            try:
                yield
            except DilapError as error:
                self._leave(error)
                raise
            except Exception as error:
                self.log.keep_traceback(error)
                raise
            finally:
                self.log.write_to(None)

    def _require_ours(self) -> None:
        """Raise InvalidInput for a folder with content that no run of ours wrote."""
        if strange := foreign_content(self.folder, self.cache):
            raise InvalidInput(
                f"{self.folder} holds {strange} and does not say which run it is of: move it away or choose another "
                "--out"
            )

    def _open(self, identity: dict[str, Any]) -> None:
        if self._identity.exists():
            self._require_same(read_json(self._identity), identity)
            if self._stages.exists():
                earlier = checked(dict[str, tuple[float, int]], read_json(self._stages), source=str(self._stages))
                self.stage_seconds = {name: one[0] for name, one in earlier.items()} | self.stage_seconds
                self.stage_peak_bytes = {name: one[1] for name, one in earlier.items()} | self.stage_peak_bytes
            self.is_continued = True
            self.log.say(f"going on with the unfinished run in {self.folder}")
        else:
            write_json(self._identity, identity)
        remove_leftovers_below(self.folder)
        self._is_open = True
        self.log.write_to(self.folder / "log.txt")

    def _require_same(self, begun: dict[str, Any], identity: dict[str, Any]) -> None:
        if changed := changes(begun.get("inputs", {}), identity.get("inputs", {})):
            raise InvalidInput(
                f"{changed} changed since the unfinished run in {self.folder} began; put it back as it was, or remove "
                "that folder"
            )
        if begun.get("model") != identity.get("model") and digest(begun["options"]) == digest(identity["options"]):
            raise InvalidInput(
                f"the model's weights changed since the unfinished run in {self.folder} began; put them back as they "
                "were, or remove that folder"
            )
        if digest(begun) != digest(identity):
            raise InvalidInput(
                f"{self.folder} holds an unfinished run with other options; remove it or choose another --out"
            )

    def _leave(self, error: DilapError) -> None:
        if self.is_continued or (self._has_kept and not isinstance(error, Infeasible | Unsupported)):
            self.log.say(f"what is done so far is kept in {self.folder}: the same command, given again, goes on")
        else:
            self.discard()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage and take this process's peak memory in it; both are kept when the run is killed.

        The seconds are added to those of earlier starts. The memory is without that of the processes of runtimes.
        """
        start = time.monotonic()
        with self._peak_of(name):
            yield
        seconds = self.stage_seconds.get(name, 0.0) + time.monotonic() - start
        self.stage_seconds[name] = round(seconds, 3)
        self.log.say(f"[{seconds:6.1f} s, {self.stage_peak_bytes[name] / 1e9:4.1f} GB] {name}")
        if self._is_open:  # only then what earlier starts kept has been read
            self._has_kept = True
            kept = {one: (self.stage_seconds[one], self.stage_peak_bytes[one]) for one in self.stage_seconds}
            write_json(self._stages, kept)

    @contextmanager
    def _peak_of(self, name: str) -> Iterator[None]:
        """Take the peak memory of a stage, that of the stages inside it included."""
        self._raise_peaks_()
        self._peaks.append(0)
        host.reset_peak_memory_()
        try:
            yield
        finally:
            self._raise_peaks_()
            self.stage_peak_bytes[name] = max(self.stage_peak_bytes.get(name, 0), self._peaks.pop())

    def _raise_peaks_(self) -> None:
        peak = host.memory_use().peak_bytes
        self._peaks = [max(earlier, peak) for earlier in self._peaks]

    def end(self, result: dict[str, Any] | None) -> None:
        """Keep the result of the run as `result.json` and finish, or discard the folder of a run without one."""
        if result is None:
            self.discard()
        else:
            write_json(self.folder / "result.json", result)
            self.finish()

    def finish(self) -> None:
        """Rename the folder to `out`, in one step, and then remove its cache.

        A kill in between leaves a finished run with a cache, which `tidy` removes.
        """
        self.log.write_to(None)
        remove_leftovers_below(self.folder)
        self._let_go()
        rename_folder(self.folder, self.out)
        drop(self.out / "cache")

    def discard(self) -> None:
        self.log.write_to(None)
        self._let_go()
        drop(self.folder)

    def _let_go(self) -> None:
        if os.name == "nt":  # Windows can neither rename nor remove a folder with an open file
            self._lock.release()

    @property
    def _identity(self) -> Path:
        return self.cache / "identity.json"

    @property
    def _stages(self) -> Path:
        return self.cache / "stages.json"


def foreign_content(folder: Path, cache: Path) -> str:
    """Return the name of something in `folder` that no job of ours wrote; empty where `cache` says what it is of."""
    if not folder.exists() or (cache / "identity.json").exists():
        return ""
    if not folder.is_dir():
        return "a file"
    begun = {cache, cache / "lock", *cache.glob(".identity.json.*.part")}  # killed before it had an identity
    return next((one.name for one in folder.rglob("*") if one not in begun), "")


def tidy(run: Path) -> None:
    """Remove what a kill at the very end left in a finished run; any other folder stays as it is."""
    if (run / "result.json").is_file():
        if (run / "cache" / "identity.json").is_file():
            drop(run / "cache")
        remove_leftovers(run / "cache")


def drop(folder: Path) -> None:
    """Rename a folder of ours and then remove it, so that no kill leaves part of it under its own name."""
    gone = part_of(folder)
    folder.rename(gone)
    shutil.rmtree(gone)


def remove_leftovers_below(folder: Path) -> None:
    """Remove what killed processes left below `folder`, in which no other process may be at work."""
    for one in [one for one in folder.rglob(".*.part") if is_leftover(one)]:
        remove(one)


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Return the names that both have with different values, joined by "and"; empty where there are none."""
    return " and ".join(name for name in before if name in now and before[name] != now[name])

"""The log of a run: every line that is shown is also written into the run's `log.txt`, with the time."""

import time
import traceback
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from dilap.core.errors import TRACEBACK_KEPT
from dilap.core.printable import printable
from dilap.core.progress import Progress


class Log:
    """A `Progress` that passes everything on to another one, and writes the lines into a file once there is one."""

    def __init__(self, shown: Progress) -> None:
        self._shown = shown
        self._path: Path | None = None

    def write_to(self, path: Path | None) -> None:
        """Write every further line into the file `path`; into none with None."""
        self._path = path

    def say(self, text: str) -> None:
        """Show and write one line; line breaks in it are escaped, so that no quoted text looks like a line of ours."""
        self._shown.say(text)
        self._write(printable(text))

    def bar(self, title: str, *, total: int | None, unit: str) -> AbstractContextManager[Any]:
        return self._shown.bar(title, total=total, unit=unit)

    def keep(self, text: str) -> None:
        """Write a text of several lines into the file alone; a command shows it in another way."""
        for line in text.split("\n"):
            self._write(printable(line))

    def keep_traceback(self, error: Exception) -> None:
        """Write the traceback of `error` into the file, and say so in a note on the error.

        Nothing is written for an OSError, which a user can mend.
        """
        if self._path is not None and not isinstance(error, OSError):
            self._write("".join(traceback.format_exception(error)))
            error.add_note(f"{TRACEBACK_KEPT}{self._path}")

    def _write(self, text: str) -> None:
        if self._path is not None:
            with self._path.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

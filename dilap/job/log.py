"""What a run says, shown and kept: every line goes into the run's `log.txt` as well."""

import traceback
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from dilap.core.errors import TRACEBACK_KEPT, DilapError
from dilap.core.printable import printable
from dilap.core.progress import Progress


class Log:
    """Passes everything on to another `Progress`, and writes the lines into a file once there is one."""

    def __init__(self, shown: Progress) -> None:
        self._shown = shown
        self._path: Path | None = None

    def write_to(self, path: Path | None) -> None:
        """Write every further line into this file; into none with None."""
        self._path = path

    def say(self, text: str) -> None:
        """One line; what a device or a file says in it cannot look like another line of ours."""
        self._shown.say(text)
        self._write(printable(text))

    def bar(self, title: str, *, total: int | None, unit: str) -> AbstractContextManager[Any]:
        return self._shown.bar(title, total=total, unit=unit)

    def keep_traceback(self, error: BaseException) -> None:
        """Write it down, if `error` is none that a user can mend; a note on the error says where it is."""
        if self._path is not None and not isinstance(error, DilapError | OSError | KeyboardInterrupt):
            self._write("".join(traceback.format_exception(error)))
            error.add_note(f"{TRACEBACK_KEPT}{self._path}")

    def _write(self, text: str) -> None:
        if self._path is not None:
            with self._path.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(text + "\n")

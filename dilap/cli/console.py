"""What a command shows: lines, progress bars, one-line errors; standard output is left to results."""

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dilap.errors import DilapError


class Console:
    """Writes to standard error, and to a log file once there is one."""

    def __init__(self) -> None:
        self._log: Path | None = None

    def log_to(self, path: Path | None) -> None:
        self._log = path

    def say(self, text: str) -> None:
        tqdm.write(text, file=sys.stderr)
        if self._log is not None:
            with self._log.open("a", encoding="utf-8") as file:
                file.write(text + "\n")

    def bar(self, title: str, *, total: int | None, unit: str) -> Any:
        """A progress bar, used as a context manager; `update(n)` moves it."""
        return tqdm(
            desc=title, total=total, unit=unit, unit_scale=True, file=sys.stderr, leave=False, dynamic_ncols=True
        )


def run(command: Callable[[], int]) -> None:
    """Run a command's body and exit: 0 done, 1 the result does not keep its promise, 2 bad input, 130 interrupted."""
    for name in ("torchao", "torch.utils._pytree"):  # at import: GPU libraries not found, deprecations between the two
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        code = command()
    except DilapError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        code = 130
    except BrokenPipeError:
        code = 141
    sys.exit(code)

"""Progress as lines, for a file or a pipe: a bar in it would be thousands of lines that overwrite nothing."""

import time
from collections.abc import Callable
from typing import Any

SECONDS_BETWEEN = 30.0


class LineBar:
    """A progress bar that is told as a line now and then; it has what `Progress.bar` promises of its bars."""

    def __init__(self, say: Callable[[str], None], title: str, *, total: int | None, unit: str) -> None:
        self.n, self.total = 0, total
        self._say, self._title, self._unit, self._postfix = say, title, unit, ""
        self._begun = self._said = time.monotonic()

    def __enter__(self) -> "LineBar":
        return self

    def __exit__(self, *_: object) -> None:
        """A bar ends without a line: what follows says what came of it."""

    def update(self, n: int = 1) -> None:
        self.n += n
        self._tell()

    def set_postfix_str(self, text: str) -> None:
        self._postfix = text
        self._tell()

    def set_postfix(self, **values: Any) -> None:
        self.set_postfix_str(", ".join(f"{name}={value}" for name, value in values.items()))

    def _tell(self) -> None:
        now = time.monotonic()
        if now - self._said < SECONDS_BETWEEN:
            return
        self._said = now
        from tqdm import tqdm  # noqa: PLC0415 - no command's --help should wait for it

        self._say(
            tqdm.format_meter(
                self.n,
                self.total,
                now - self._begun,
                ncols=0,  # no bar, only numbers
                prefix=self._title,
                unit=self._unit,
                unit_scale=True,
                postfix=self._postfix,
            )
        )

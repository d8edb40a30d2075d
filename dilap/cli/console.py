"""What a command shows: lines, progress bars, one-line errors; standard output is left to results."""

import logging
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any

from dilap.core import launched
from dilap.core.codec import to_json
from dilap.core.documents import words_of
from dilap.core.errors import TRACEBACK_KEPT, DilapError, InvalidInput, reason_of
from dilap.core.printable import printable, printable_lines
from dilap.job.lines import LineBar

EXIT_CODES = (
    "exit codes: 0 done, 1 a budget that is not kept beyond doubt, or a check that fails, 2 bad input, 70 an error of "
    "DiLAP's own, 130 interrupted, 141 nobody reads the output"
)
_MEMORY_WORDS = ("can't allocate memory", "not enough memory", "out of memory")  # of torch, in a RuntimeError


class Console:
    """A `Progress` that writes lines to standard error, and bars where that is a terminal."""

    def say(self, text: str) -> None:
        """Write one line; line breaks in it are escaped, so that no quoted text looks like a line of ours."""
        if _is_terminal():
            from tqdm import tqdm

            tqdm.write(printable(text), file=sys.stderr)
        else:
            print(printable(text), file=sys.stderr, flush=True)

    def bar(self, title: str, *, total: int | None, unit: str) -> Any:
        """Return a progress bar, which is used as a context manager; `update(n)` moves it."""
        if not _is_terminal():
            return LineBar(self.say, title, total=total, unit=unit)
        from tqdm import tqdm

        return tqdm(
            desc=title, total=total, unit=unit, unit_scale=True, file=sys.stderr, leave=False, dynamic_ncols=True
        )


def _is_terminal() -> bool:
    return sys.stderr.isatty()


def show(text: str) -> None:
    """Print a result for people on standard output."""
    print(printable_lines(text))


def show_json(document: Any) -> None:
    """Print a result for programs, as JSON, on standard output."""
    print(to_json(document))


def run(command: Callable[[], int]) -> None:
    """Run a command's body and exit: with its own code, or with one of `EXIT_CODES` and one line that says why."""
    for name in ("torchao", "torch.utils._pytree"):  # they warn of missing GPU libraries and of deprecations
        logging.getLogger(name).setLevel(logging.ERROR)
    sys.exit(_code_of(command if launched.count() == 1 else partial(_with_helpers, command)))


def _with_helpers(command: Callable[[], int]) -> int:
    """Run a command in the main process; the others help it, and print nothing."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # torch warns of every process that ends
    if launched.rank() > 0:
        nothing = os.open(os.devnull, os.O_WRONLY)
        for stream in (1, 2):
            os.dup2(nothing, stream)
    from dilap.models.processes import with_helpers  # importing torch takes seconds

    return with_helpers(command) or 0


def _code_of(command: Callable[[], int]) -> int:
    try:
        return _finished(command)
    except DilapError as error:
        return _end(f"error: {reason_of(error)}", code=2)
    except KeyboardInterrupt:
        return _end("interrupted; run the same command again to go on", code=130)
    except OSError as error:
        _forget_output()
        is_unread = isinstance(error, BrokenPipeError)
        return 141 if is_unread else _end(f"error: {_words_of_system_error(error)}", code=2)
    except SystemExit:
        raise
    except BaseException as error:  # a panic in a Rust library is a BaseException only
        return _end_of_unforeseen(error)


def _finished(command: Callable[[], int]) -> int:
    _open_streams()
    try:
        return command()
    finally:
        sys.stdout.flush()  # a full disk, or a reader that is gone, is noticed here and not while Python ends


def _end(text: str, *, code: int) -> int:
    print(printable(text), file=sys.stderr)
    return code


def _end_of_unforeseen(error: BaseException) -> int:
    if isinstance(error, MemoryError) or any(words in str(error) for words in _MEMORY_WORDS):
        return _end(f"error: there is not enough memory: {reason_of(error)}", code=2)
    return _end(f"internal error: {reason_of(error)}; {_where_it_is_told(error)}", code=70)


def _words_of_system_error(error: OSError) -> str:
    names = (error.filename, error.filename2)
    files = " and ".join(os.fsdecode(name) for name in names if isinstance(name, str | bytes))
    words = words_of(error) or type(error).__name__
    return f"{files} cannot be used: {words}" if files else f"the system refuses: {words}"


def _where_it_is_told(error: BaseException) -> str:
    """Say which file holds the traceback: the run's log, or a new temporary file."""
    places = [
        note.removeprefix(TRACEBACK_KEPT) for note in getattr(error, "__notes__", ()) if note.startswith(TRACEBACK_KEPT)
    ]
    if not places:
        text = "".join(traceback.format_exception(error))
        try:
            with tempfile.NamedTemporaryFile(
                "w", encoding="utf-8", errors="backslashreplace", prefix="dilap-error-", suffix=".txt", delete=False
            ) as file:
                file.write(text)
        except OSError:
            return f"its traceback could not be kept: {printable(text[-1000:])}"
        places = [file.name]
    return f"this is a defect of DiLAP: please report it with the traceback in {places[0]}"


def _open_streams() -> None:
    """Make standard output and standard error usable, where they are closed or cannot show all characters.

    Raises InvalidInput where standard output is closed: the next file that is opened would get the results.
    """
    if sys.stderr is None:
        sys.stderr = os.fdopen(os.dup2(os.open(os.devnull, os.O_WRONLY), 2), "w", encoding="utf-8")
    if sys.stdout is None:
        raise InvalidInput("standard output is closed; send it to a file, or to /dev/null")
    if hasattr(sys.stdout, "reconfigure"):  # for a terminal or file with few characters
        sys.stdout.reconfigure(errors="backslashreplace")


def _forget_output() -> None:
    """Discard what could not be written to standard output, so that Python does not try again when it ends."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):  # standard output has no file, as in a test
        return

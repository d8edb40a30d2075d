"""Convert frozen dataclasses to JSON and back, and write files so that they are either whole or absent."""

import ctypes
import dataclasses
import errno
import hashlib
import json
import math
import os
import re
import shutil
import stat
import sys
import tempfile
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from dilap.core.documents import parse_object, read_text
from dilap.core.errors import DilapError, InvalidInput

T = TypeVar("T")
_MAY_ASK, _NO_SUCH_PROCESS = 0x1000, 87  # Windows: PROCESS_QUERY_LIMITED_INFORMATION, ERROR_INVALID_PARAMETER
VERSION = 1  # of documents whose class has no VERSION; to be raised when an old reader would misread a new file


def encode(value: Any) -> dict[str, Any]:
    """Return a dataclass as a JSON object: its fields, `type` and `version`."""
    return {"type": type(value).__name__, "version": _version(type(value)), **dataclasses.asdict(value)}


def decode(cls: type[T], document: Any, *, source: str) -> T:
    """Return the dataclass that `encode` wrote; `source` names the file in errors. Raises InvalidInput."""
    if not isinstance(document, Mapping):
        raise InvalidInput(f"{source}: expected a {cls.__name__}, got {document!r:.80}")
    if document.get("type") != cls.__name__:
        raise InvalidInput(f"{source}: expected a {cls.__name__}, got type {document.get('type')!r:.80}")
    known = range(1, _version(cls) + 1)  # fields that a later version added have defaults
    if document.get("version") not in known:
        raise InvalidInput(
            f"{source}: {cls.__name__} has version {document.get('version')!r:.80}, this DiLAP reads "
            f"{' and '.join(map(str, known))}"
        )
    fields = {name: value for name, value in document.items() if name not in ("type", "version")}
    return checked(cls, fields, source=f"{source}: damaged {cls.__name__}")


def _version(cls: type) -> int:
    return int(getattr(cls, "VERSION", VERSION))


def checked(hint: type[T], value: Any, *, source: str) -> T:
    """Return a JSON value as the type `hint`, after checking all its parts.

    Raises InvalidInput, whose text begins with `source`.
    """
    try:
        return typing.cast(T, _build(hint, value))
    except DilapError as error:
        raise InvalidInput(f"{source}: {error}") from error
    except (TypeError, ValueError, KeyError, ArithmeticError, AttributeError) as error:  # a dataclass's own checks
        raise InvalidInput(f"{source}: {error}") from error


def _build(hint: Any, value: Any) -> Any:
    """Return `value` as the type `hint`, for the types that our dataclasses use."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        return None if value is None else _build_one_of([a for a in arguments if a is not type(None)], value)
    if origin is typing.Literal:
        if value not in arguments:
            raise ValueError(f"{value!r:.80} is none of {', '.join(map(repr, arguments))}")
        return value
    if origin is tuple:
        return _build_tuple(arguments, value)
    if isinstance(hint, typing.TypeVar):
        return _build_one_of(hint.__constraints__, value)
    return _build_object(hint, origin or hint, arguments, value)


def _build_one_of(hints: Sequence[Any], value: Any) -> Any:
    """Return `value` as the one type of `hints`, or as one of several dataclasses, which their fields tell apart."""
    if len(hints) == 1:
        return _build(hints[0], value)
    return _build(next((one for one in hints if set(_mapping(value)) <= _names_of(one)), hints[0]), value)


def _build_object(hint: Any, kind: Any, arguments: tuple[Any, ...], value: Any) -> Any:
    """Return `value` as a dictionary, a dataclass or a plain value."""
    if kind in (dict, Mapping):
        return {key: _build(arguments[1] if arguments else Any, item) for key, item in _mapping(value).items()}
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        if unknown := sorted(set(_mapping(value)) - _names_of(kind)):
            raise ValueError(f"unknown field {unknown[0]!r:.80}")
        return typing.cast(Any, kind)(**{name: _build_field(name, hints[name], item) for name, item in value.items()})
    if hint is float and type(value) in (int, float):
        return _finite(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise TypeError(f"expected {hint.__name__}, got {value!r:.80}")
    return value


def _names_of(kind: Any) -> set[str]:
    return {field.name for field in dataclasses.fields(kind)}


def _finite(value: float) -> float:
    if not math.isfinite(number := float(value)):
        raise ValueError(f"expected a finite number, got {number}")
    return number


def _build_field(name: str, hint: Any, value: Any) -> Any:
    try:
        return _build(hint, value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: {error}") from error


def _build_tuple(arguments: tuple[Any, ...], value: Any) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise TypeError(f"expected a list, got {value!r:.80}")
    if arguments[-1] is Ellipsis:
        return tuple(_build(arguments[0], item) for item in value)
    if len(value) != len(arguments):
        raise ValueError(f"expected {len(arguments)} values, got {value!r:.80}")
    return tuple(_build(hint, item) for hint, item in zip(arguments, value, strict=True))


def _mapping(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise TypeError(f"expected an object, got {value!r:.80}")
    return value


def canonical(document: Any) -> str:
    """Return JSON with sorted keys and without spaces, so that equal documents have equal digests."""
    return json.dumps(document, sort_keys=True, separators=(",", ":"))


def digest(document: Any) -> str:
    """Return the SHA-256, in hex, of the canonical JSON of `document`."""
    return hashlib.sha256(canonical(document).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """Return the SHA-256, in hex, of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _sha256(file)


def _sha256(file: typing.BinaryIO) -> str:
    """Hash an open file on Python 3.10, which devices may have and which lacks `hashlib.file_digest`."""
    hasher = hashlib.sha256()
    while chunk := file.read(1 << 20):
        hasher.update(chunk)
    return hasher.hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """Read the JSON object in `path`. Raises InvalidInput, naming the file, where it is absent or damaged."""
    return parse_object(read_text(path), source=str(path))


def write_json(path: Path, document: Any) -> None:
    """Write `document` to `path`, whole or not at all."""
    with written_aside(path) as temporary:
        temporary.write_text(to_json(document) + "\n", encoding="utf-8")


def to_json(document: Any, *, indent: int | None = 1) -> str:
    """Return `document` as JSON for people and programs. Raises InvalidInput for NaN.

    JSON has no infinity, but the perplexity of a ruined model is infinite: the largest float is written instead.
    """
    try:
        return json.dumps(document, indent=indent, allow_nan=False)
    except ValueError:  # an infinity, or NaN
        return json.dumps(_in_range(document), indent=indent, allow_nan=False)


def _in_range(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _in_range(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_in_range(item) for item in value]
    if isinstance(value, float) and math.isnan(value):
        raise InvalidInput("a result is not a number (NaN): what the model computes overflows")
    if isinstance(value, float) and math.isinf(value):
        return math.copysign(sys.float_info.max, value)
    return value


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Yield a temporary path for a file or a folder; rename it to `path` at the end, remove it on failure.

    It lies beside `path`. A file replaces an older one at `path`. Where `path` is a link, the file that it leads to is
    replaced. Where it is a device or a pipe (`/dev/stdout`), the content is written into it. A folder replaces only an
    empty folder. Raises InvalidInput where `path` has become anything else meanwhile, or where the system refuses to
    write (a full disk, a read-only folder).
    """
    if _is_stream(path):
        with _written_into(path) as temporary:
            yield temporary
        return
    path = Path(os.path.realpath(path)) if os.path.islink(path) else path
    temporary = part_of(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path)
        remove(temporary)
        yield temporary
        if temporary.is_dir():
            _let_others_read(temporary)
            rename_folder(temporary, path)
        else:
            os.replace(temporary, path)
    except Exception as error:
        if (reason := _refusal(error, temporary)) is not None:
            raise InvalidInput(f"{path} cannot be written: {reason}; choose another --out") from error
        raise
    finally:
        with suppress(OSError):
            remove(temporary)


def _refusal(error: Exception, written: Path) -> str | None:
    """Return why the system refused to write `written`, or a file in it; None for an error about anything else.

    safetensors raises no OSError, but an error whose text has the number of one. numpy raises an OSError without a
    number for an incomplete write, which only a full disk causes.
    """
    number = error.errno if isinstance(error, OSError) else None
    if found := re.search(r"\(os error (\d+)\)", str(error)):
        number = int(found[1])
    elif type(error) is OSError and number is None and "written" in str(error):
        number = errno.ENOSPC
    named = getattr(error, "filename", None)
    if number is None or (named is not None and not str(named).startswith(str(written.parent))):
        return None
    if number == errno.ENOSPC:
        return f"no space left ({shutil.disk_usage(written.parent).free / 1e6:.0f} MB free), free some"
    return os.strerror(number)


def part_of(path: Path) -> Path:
    """Return a temporary name for what will become `path`, or for what was `path` and will be removed.

    It holds the number of this process, so that `is_leftover` recognises it once the process has ended.
    """
    return path.with_name(f".{path.name}.{os.getpid()}.part")


@contextmanager
def scratch_folder(path: Path) -> Iterator[Path]:
    """Yield a folder beside `path`, on the same disk, for files that are needed to make it; remove it at the end.

    Folders that killed processes left are removed first.
    """
    folder = part_of(path.with_name(f"{path.name}.scratch"))
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.with_name(f"{path.name}.scratch"))
    remove(folder)
    folder.mkdir()
    try:
        yield folder
    finally:
        remove(folder)


def _let_others_read(folder: Path) -> None:
    """Give every file in a folder the permissions of the folder: safetensors makes its files for their owner alone."""
    mode = folder.stat().st_mode & 0o666
    for file in folder.rglob("*"):
        if file.is_file() and not file.is_symlink():
            file.chmod(mode)


def rename_folder(folder: Path, path: Path) -> None:
    """Rename `folder` to `path` in one step. Raises InvalidInput where anything but an empty folder is there."""
    try:
        os.rename(folder, path)
    except OSError as error:
        if not os.path.lexists(path):
            raise
        raise InvalidInput(
            f"{path} was made by somebody else in the meantime and is left as it is; move it away and run again"
        ) from error


def remove(path: Path) -> None:
    """Remove a file, a link or a whole folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_leftovers(path: Path) -> None:
    """Remove the temporary files of processes that died while they wrote `path`; those of running ones stay."""
    prefix = f".{path.name}."
    for one in list(path.parent.iterdir()):
        if one.name.startswith(prefix) and is_leftover(one):
            remove(one)


def is_leftover(path: Path) -> bool:
    """Return whether `path` is the temporary file or folder of a process that has died."""
    found = re.fullmatch(r"\..+\.(\d+)\.part", path.name)
    return found is not None and not _is_alive(int(found[1]))


def _is_alive(process: int) -> bool:
    if sys.platform == "win32":  # there, signal 0 would end the process
        return _is_alive_on_windows(process)
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _is_alive_on_windows(process: int) -> bool:
    kernel = ctypes.WinDLL("kernel32", use_last_error=True)  # type: ignore[attr-defined, unused-ignore]
    handle = kernel.OpenProcess(_MAY_ASK, False, process)
    error = ctypes.get_last_error()  # type: ignore[attr-defined, unused-ignore]
    if handle:
        kernel.CloseHandle(handle)
    return bool(handle) or error != _NO_SUCH_PROCESS


def _is_stream(path: Path) -> bool:
    """Return whether `path` is, directly or through links, a device, a pipe or an open file of this process."""
    for _ in range(40):  # as many links as Linux follows
        if path.absolute().parts[:3] in (("/", "dev", "fd"), ("/", "proc", "self")) or _is_special(path):
            return True
        if not os.path.islink(path):
            return False
        path = path.parent / path.readlink()
    return False


def _is_special(path: Path) -> bool:
    try:
        mode = path.lstat().st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode) or stat.S_ISLNK(mode))


@contextmanager
def _written_into(path: Path) -> Iterator[Path]:
    """Yield a temporary path; write the content of its file into the device or pipe `path` at the end."""
    with tempfile.TemporaryDirectory() as folder:
        temporary = Path(folder) / "content"
        yield temporary
        # Appended, because the open file that /dev/stdout stands for may hold something already.
        with temporary.open("rb") as content, open(os.open(path, os.O_WRONLY | os.O_APPEND), "wb") as stream:
            shutil.copyfileobj(content, stream)

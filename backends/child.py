"""Native runtimes in a process of their own, so that a crash there does not end this process.

A crash inside llama.cpp or ONNX Runtime ends the whole process, in silence. Whatever exports, verifies or evaluates
through such a library therefore opens its objects in a child:

    with opened(Gguf, path, runtime="llamacpp", num_tokens=64) as file:
        file.logits(token_ids, incremental=False)

`opened` returns a stand-in for the object in the child: calls of its methods run there; its properties are read once,
when it is opened, and kept here. Arguments and results may be what JSON holds, paths and numpy arrays. When the child
dies, the call raises Crashed, and the next `opened` or `called` starts another child. There is one child for each
runtime; it ends when this process does.
"""

import atexit
import base64
import contextlib
import functools
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, TypeVar, cast

import numpy as np

import dilap
from dilap import backends
from dilap.core import errors
from dilap.core.errors import Crashed, DilapError

T = TypeVar("T")
_PIPE_BYTES = 1 << 20  # with the default of 64 KiB, logits (100 MB at a time) take half as long again
_F_SETPIPE_SZ = 1031
_PATH, _ARRAY = "__path__", "__array__"


def opened(kind: Callable[..., T], *arguments: Any, runtime: str, **options: Any) -> T:
    """Make an object of the class `kind` in the child of the backend `runtime`, and return a stand-in for it.

    Raises what its constructor raises, and Crashed.
    """
    return cast(T, _child(runtime).open(kind, arguments, options))


def called(function: Callable[..., T], *arguments: Any, runtime: str, **options: Any) -> T:
    """Call a module's function in the child of the backend `runtime` and return its result.

    Raises what the function raises, and Crashed.
    """
    return cast(T, _child(runtime).run(function, arguments, options))


def obituary(runtime: str, status: int, doing: str, *, said: str = "") -> Crashed:
    """Return the error for a backend's process that ended while it was `doing` something.

    `status` is its exit status, or minus the number of the signal that killed it; `said` is the last line it printed.
    """
    how = f"died of {_signal_name(-status)}" if status < 0 else f"ended with status {status}"
    words = f" ({said})" if said else ""
    backend = backends.get(runtime)
    return Crashed(f"{runtime} {how} while {doing}{words}; {backend.after_a_crash()}")


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def python_environment() -> dict[str, str]:
    """Return the environment for a Python that we start.

    It imports this very DiLAP, even from a checkout that is not installed, and nothing from the current folder, which
    may be a downloaded model's.
    """
    source = str(Path(dilap.__file__).resolve().parent.parent)
    paths = [source, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1", "ORT_DISABLE_TELEMETRY": "1"}


class _Child:
    """The process of one runtime, and the requests that are sent to it."""

    def __init__(self, runtime: str) -> None:
        self._runtime = runtime
        self._lock = threading.Lock()
        self._complaints: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  (it lives as long as the child)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "dilap.backends.child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._complaints,
            env=python_environment(),
            start_new_session=True,  # a Ctrl-C in the terminal is for us alone: the child ends when we do
        )
        assert self._process.stdout is not None
        with contextlib.suppress(ImportError, OSError):  # only Linux can, and it limits all pipes together
            importlib.import_module("fcntl").fcntl(self._process.stdout, _F_SETPIPE_SZ, _PIPE_BYTES)

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def open(self, kind: Callable[..., Any], arguments: tuple[Any, ...], options: Mapping[str, Any]) -> "_StandIn":
        name = _file_name(arguments)
        made = self._ask({"open": _name_of(kind), "arguments": arguments, "options": options}, f"opening {name}")
        return _StandIn(self, name, made)

    def run(self, function: Callable[..., Any], arguments: tuple[Any, ...], options: Mapping[str, Any]) -> Any:
        doing = f"working on {_file_name(arguments)}"
        return self._ask({"run": _name_of(function), "arguments": arguments, "options": options}, doing)

    def call(self, number: int, method: str, arguments: tuple[Any, ...], options: Mapping[str, Any], name: str) -> Any:
        request = {"call": number, "method": method, "arguments": arguments, "options": options}
        return self._ask(request, f"running {name}")

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._complaints.close()

    def _ask(self, request: Mapping[str, Any], doing: str) -> Any:
        """Send a request and return the response. Raises the error that the child reports, or Crashed if it died."""
        assert self._process.stdin is not None
        line = json.dumps(request, default=_plain) + "\n"
        with self._lock:
            try:
                self._process.stdin.write(line.encode())
                self._process.stdin.flush()
                response, array = _received(cast(IO[bytes], self._process.stdout))
            except (OSError, EOFError):
                raise obituary(self._runtime, self._process.wait(), doing, said=self._last_words()) from None
        if "error" in response:
            kind = getattr(errors, str(response["error"]["type"]), DilapError)
            raise kind(response["error"]["message"])
        return response["value"] if array is None else array

    def _last_words(self) -> str:
        self._complaints.seek(0)
        lines = self._complaints.read()[-4096:].decode("utf-8", "replace").strip().splitlines()
        return lines[-1].strip() if lines else ""


class _StandIn:
    """Stands for an object in a child: its methods run there, its properties have the values from its opening."""

    def __init__(self, child: _Child, name: str, made: Mapping[str, Any]) -> None:
        self._child, self._name = child, name
        self._number, self._methods, self._values = made["number"], set(made["methods"]), dict(made["values"])

    def __getattr__(self, name: str) -> Any:
        if name in self._values:
            return self._values[name]
        if name not in self._methods:
            raise AttributeError(name)

        def method(*arguments: Any, **options: Any) -> Any:
            return self._child.call(self._number, name, arguments, options, self._name)

        return method

    def close(self) -> None:
        """Free the object; if its child died, it is gone already."""
        if self._child.is_alive:
            with contextlib.suppress(Crashed):
                self._child.call(self._number, "close", (), {}, self._name)

    def __enter__(self) -> "_StandIn":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


_children: dict[str, _Child] = {}
_starting = threading.Lock()


def _child(runtime: str) -> _Child:
    """Return the running child of a backend; start one where there is none."""
    with _starting:
        found = _children.get(runtime)
        if found is None or not found.is_alive:
            if found is not None:
                found.close()
            found = _children[runtime] = _Child(runtime)
        return found


@atexit.register
def close_children() -> None:
    """End all children, and wait until they have ended."""
    with _starting:
        for child in _children.values():
            child.close()
        _children.clear()


def _name_of(kind: Callable[..., Any]) -> str:
    return f"{kind.__module__}:{kind.__qualname__}"


def _file_name(arguments: tuple[Any, ...]) -> str:
    return next((one.name for one in arguments if isinstance(one, Path)), "a model")


def _plain(value: Any) -> Any:
    """Turn a path or a numpy value into what JSON can hold; see `_restored`."""
    if isinstance(value, Path):
        return {_PATH: str(value.absolute())}  # we may change the current folder; the child stays where it began
    if isinstance(value, np.integer):
        return int(value)
    if isinstance(value, np.ndarray):  # a batch of images as JSON numbers would take ten times as long
        content = base64.b64encode(np.ascontiguousarray(value).data).decode("ascii")
        return {_ARRAY: content, "dtype": value.dtype.str, "shape": value.shape}
    raise TypeError(f"{type(value).__name__} does not travel to a child")


def _restored(document: dict[str, Any]) -> Any:
    """Turn the objects that `_plain` made into paths and arrays again; return all others as they are."""
    if set(document) == {_PATH}:
        return Path(document[_PATH])
    if set(document) == {_ARRAY, "dtype", "shape"}:
        flat = np.frombuffer(base64.b64decode(document[_ARRAY]), np.dtype(document["dtype"]))
        return flat.reshape(document["shape"])
    return document


def _received(stream: IO[bytes]) -> tuple[dict[str, Any], "np.ndarray[Any, Any] | None"]:
    """Read a response: a line of JSON, and after it the bytes of an array where the line announces one.

    Raises EOFError where the child has ended.
    """
    line = stream.readline()
    if not line.endswith(b"\n"):
        raise EOFError
    response: dict[str, Any] = json.loads(line)
    if (announced := response.get("array")) is None:
        return response, None
    array = np.empty(announced["shape"], np.dtype(announced["dtype"]))
    view = array.reshape(-1).view(np.uint8).data
    done = 0
    while done < len(view):
        count = cast(Any, stream).readinto(view[done:])
        if not count:
            raise EOFError
        done += count
    return response, array


class _Server:
    """The child's side: keeps the open objects and answers the requests."""

    def __init__(self) -> None:
        self._objects: dict[int, Any] = {}
        self._num_opened = 0

    def answer(self, request: Mapping[str, Any]) -> Any:
        arguments, options = request["arguments"], request["options"]
        if "open" in request:
            return self._open(_imported(request["open"])(*arguments, **options))
        if "run" in request:
            return _imported(request["run"])(*arguments, **options)
        found = self._objects[request["call"]]
        if request["method"] == "close":
            del self._objects[request["call"]]
            return found.close() if hasattr(found, "close") else None
        return getattr(found, request["method"])(*arguments, **options)

    def _open(self, made: Any) -> dict[str, Any]:
        self._num_opened += 1
        self._objects[self._num_opened] = made
        public = {name: getattr(made, name) for name in dir(made) if not name.startswith("_")}
        return {
            "number": self._num_opened,
            "methods": [name for name, value in public.items() if callable(value)],
            "values": {name: value for name, value in public.items() if not callable(value)},
        }


def _imported(name: str) -> Any:
    module, _, attribute = name.partition(":")
    return functools.reduce(getattr, attribute.split("."), importlib.import_module(module))


def _serve(requests: IO[str], responses: IO[bytes]) -> None:
    """Answer requests until they end."""
    from dilap.backends.agent import received  # noqa: PLC0415  (the two read their requests in the same way)

    server = _Server()
    for line in received(requests, idle_seconds=lambda: None):
        array: np.ndarray[Any, Any] | None = None
        try:
            value = server.answer(json.loads(line, object_hook=_restored))
            if isinstance(value, np.ndarray):
                array = np.ascontiguousarray(value)
            response: dict[str, Any] = {"value": None if array is not None else value}
        except Exception as error:  # whatever a runtime raises, the parent must hear of it
            kind = type(error).__name__ if isinstance(error, DilapError) else "DilapError"
            response = {"error": {"type": kind, "message": errors.reason_of(error)}}
        if array is not None:
            response["array"] = {"shape": array.shape, "dtype": array.dtype.str}
        responses.write(json.dumps(response, default=_plain).encode() + b"\n")
        if array is not None:
            responses.write(array.reshape(-1).view(np.uint8).data)
        responses.flush()


def main() -> None:
    # Native libraries print to descriptor 1, so the responses go to a copy of it, and 1 itself becomes stderr.
    with os.fdopen(os.dup(1), "wb") as responses:
        os.dup2(2, 1)
        _serve(sys.stdin, responses)


if __name__ == "__main__":
    main()

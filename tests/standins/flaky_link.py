"""A TCP link to a device of the lab that breaks or crawls when a test says so."""

import contextlib
import socket
import threading
import time
from types import TracebackType


class FlakyLink:
    """Forwards a port of its own to `port` here; `cut_after` counts the bytes of both directions."""

    def __init__(self, port: int, *, cut_after: int | None = None, bytes_per_second: float | None = None) -> None:
        self.cut_after, self.bytes_per_second = cut_after, bytes_per_second
        self._target = port
        self._num_bytes = 0
        self._lock = threading.Lock()
        self._sockets: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def cut(self) -> None:
        """Break every connection, as a pulled cable does once it is noticed."""
        with self._lock:
            for one in self._sockets:
                _shut(one)

    def mend(self) -> None:
        """From now on the link holds."""
        self.cut_after = self.bytes_per_second = None

    def __enter__(self) -> "FlakyLink":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _shut(self._listener)  # wakes `accept`, which closing alone does not
        self._threads[0].join()
        self.cut()
        for thread in self._threads:
            thread.join()
        for one in (self._listener, *self._sockets):
            one.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            far = socket.create_connection(("127.0.0.1", self._target))
            for one in (near, far):
                one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            pairs = ((near, far), (far, near))
            with self._lock:
                self._sockets += [near, far]
                self._threads += [threading.Thread(target=self._forward, args=pair) for pair in pairs]
                for thread in self._threads[-2:]:
                    thread.start()

    def _forward(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(16384):
                if self.bytes_per_second is not None:
                    time.sleep(len(data) / self.bytes_per_second)
                self._num_bytes += len(data)
                if self.cut_after is not None and self._num_bytes > self.cut_after:
                    target.sendall(data[: len(data) // 2])
                    self.cut()
                    return
                target.sendall(data)
        for one in (source, target):
            _shut(one)


def _shut(one: socket.socket) -> None:
    with contextlib.suppress(OSError):
        one.shutdown(socket.SHUT_RDWR)

"""A stand-in for a phone: the device's side of adb over TCP, so that a real adb client can drive it.

It speaks CNXN, OPEN, OKAY, WRTE and CLSE, the services `shell,v2` (stdin, stdout, stderr, exit status) and `sync`
(STAT, LIST, SEND, RECV), and asks for no key, as a device with ro.adb.secure=0 does. Programs run in the root folder
that it is given, in a chroot, and like adbd it sends only SIGHUP to a shell whose stream was closed.
"""

import argparse
import contextlib
import itertools
import os
import selectors
import signal
import socket
import stat
import struct
import subprocess
import tempfile
import threading
from pathlib import Path

VERSION, MAX_DATA = 0x01000001, 1 << 20  # from this version on, a zero checksum is accepted
PROPERTIES = {"ro.product.name": "dm1qxeea", "ro.product.model": "SM-S911B", "ro.product.device": "dm1q"}
STDIN, STDOUT, STDERR, EXIT, CLOSE_STDIN = range(5)  # the kinds of packets in shell,v2


class Connection:
    """One adb server's connection and its streams."""

    def __init__(self, peer: socket.socket, root: Path) -> None:
        self.peer, self.root = peer, root
        self.max_data = 4096
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._streams: dict[int, Stream] = {}

    def send(self, command: bytes, first: int, second: int, data: bytes = b"") -> None:
        (number,) = struct.unpack("<I", command)
        header = struct.pack("<6I", number, first, second, len(data), 0, number ^ 0xFFFFFFFF)
        with self._lock:
            self.peer.sendall(header + data)

    def serve(self) -> None:
        with contextlib.suppress(EOFError, OSError):
            while True:
                command, first, second, size, _, _ = struct.unpack("<4s5I", self._receive(24))
                self._handle(command, first, second, self._receive(size))
        for stream in list(self._streams.values()):
            stream.hang_up()
        self.peer.close()

    def forget(self, number: int) -> None:
        self._streams.pop(number, None)

    def _handle(self, command: bytes, first: int, second: int, data: bytes) -> None:
        stream = self._streams.get(second)
        if command == b"CNXN":
            self.max_data = min(second, MAX_DATA)
            properties = "".join(f"{key}={value};" for key, value in PROPERTIES.items())
            self.send(b"CNXN", VERSION, MAX_DATA, f"device::{properties}features=shell_v2,cmd".encode())
        elif command == b"OPEN":
            number = next(self._numbers)  # never used again: the client still answers for ended streams
            self._streams[number] = Stream(self, number, first, data.rstrip(b"\0").decode())
            threading.Thread(target=self._streams[number].run, daemon=True).start()
        elif stream is None:
            return  # it was closed from this end already
        elif command == b"OKAY":
            stream.acknowledged.release()
        elif command == b"WRTE":
            stream.feed(data)
        elif command == b"CLSE":
            self.forget(second)
            stream.hang_up()

    def _receive(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            chunk = self.peer.recv(min(size - len(data), MAX_DATA))
            if not chunk:
                raise EOFError
            data += chunk
        return bytes(data)


class Stream:
    """One service of a connection. Every write waits for its OKAY: that is adb's flow control."""

    def __init__(self, connection: Connection, number: int, remote: int, service: str) -> None:
        self._connection, self._number, self._remote, self._service = connection, number, remote, service
        self.acknowledged = threading.Semaphore(0)
        self._received = bytearray()
        self._changed = threading.Condition()
        self._ended = False
        self._program: subprocess.Popen[bytes] | None = None

    def feed(self, data: bytes) -> None:
        with self._changed:
            self._received += data
            self._changed.notify()
        self._connection.send(b"OKAY", self._number, self._remote)

    def hang_up(self) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify()
        self.acknowledged.release()
        if self._program is not None and self._program.poll() is None:
            assert self._program.stdin is not None
            with contextlib.suppress(OSError):
                os.kill(self._program.pid, signal.SIGHUP)
                self._program.stdin.close()

    def run(self) -> None:
        kind, _, argument = self._service.partition(":")
        serve = {"shell": self._shell, "sync": self._sync}.get(kind.split(",")[0])
        with contextlib.suppress(EOFError, ConnectionError):
            try:
                if serve is not None and (kind == "sync" or "v2" in kind):
                    self._connection.send(b"OKAY", self._number, self._remote)
                    serve(argument)
            finally:
                self._connection.send(b"CLSE", self._number, self._remote)
        self._connection.forget(self._number)

    def _read(self, size: int) -> bytes:
        with self._changed:
            while len(self._received) < size:
                if self._ended:
                    raise EOFError
                self._changed.wait()
            data = bytes(self._received[:size])
            del self._received[:size]
            return data

    def _write(self, data: bytes) -> None:
        size = self._connection.max_data
        for start in range(0, len(data), size):
            self._connection.send(b"WRTE", self._number, self._remote, data[start : start + size])
            self.acknowledged.acquire()
            if self._ended:
                raise EOFError

    def _shell(self, command: str) -> None:
        self._program = subprocess.Popen(
            ["/usr/sbin/chroot", str(self._connection.root), "/bin/sh", "-c", command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={"PATH": "/usr/bin:/bin", "HOME": "/", "TMPDIR": self._temporary()},
            start_new_session=True,
        )
        assert self._program.stdin is not None
        threading.Thread(target=self._pass_stdin, daemon=True).start()
        outputs = selectors.DefaultSelector()
        for kind, pipe in ((STDOUT, self._program.stdout), (STDERR, self._program.stderr)):
            assert pipe is not None
            outputs.register(pipe, selectors.EVENT_READ, kind)
        while outputs.get_map():
            for key, _ in outputs.select():
                data = os.read(key.fd, 32768)
                if data:
                    self._write(struct.pack("<BI", key.data, len(data)) + data)
                else:
                    outputs.unregister(key.fileobj)
        status = self._program.wait()
        with contextlib.suppress(OSError):
            self._program.stdin.close()  # even where another process reads it still, as adbd does
        self._write(struct.pack("<BIB", EXIT, 1, status if status >= 0 else 128 - status))

    def _temporary(self) -> str:
        """Return Android's folder for what a shell writes, or that of this machine where it is the device."""
        is_android = (self._connection.root / "data/local/tmp").is_dir()
        return "/data/local/tmp" if is_android else tempfile.gettempdir()

    def _pass_stdin(self) -> None:
        assert self._program is not None
        assert self._program.stdin is not None
        with contextlib.suppress(EOFError, OSError, ValueError):
            while True:
                kind, size = struct.unpack("<BI", self._read(5))
                data = self._read(size)
                if kind == STDIN:
                    self._program.stdin.write(data)
                    self._program.stdin.flush()
                elif kind == CLOSE_STDIN:
                    self._program.stdin.close()

    def _sync(self, _: str) -> None:
        operations = {b"STAT": self._stat, b"LIST": self._list, b"SEND": self._receive_file, b"RECV": self._send_file}
        while True:
            operation, size = struct.unpack("<4sI", self._read(8))
            if operation == b"QUIT":
                return
            path = self._read(size).decode()
            try:
                operations[operation](path)
            except OSError as error:
                words = str(error.strerror).encode()
                self._write(b"FAIL" + struct.pack("<I", len(words)) + words)

    def _path(self, path: str) -> Path:
        return self._connection.root / path.lstrip("/")

    def _stat(self, path: str) -> None:
        try:
            found = self._path(path).stat()
            fields = (found.st_mode, min(found.st_size, 0xFFFFFFFF), int(found.st_mtime))
        except OSError:
            fields = (0, 0, 0)
        self._write(struct.pack("<4s3I", b"STAT", *fields))

    def _list(self, path: str) -> None:
        for entry in os.scandir(self._path(path)):
            found, name = entry.stat(follow_symlinks=False), entry.name.encode()
            fields = (found.st_mode, found.st_size & 0xFFFFFFFF, int(found.st_mtime), len(name))
            self._write(struct.pack("<4s4I", b"DENT", *fields) + name)
        self._write(struct.pack("<4s4I", b"DONE", 0, 0, 0, 0))

    def _receive_file(self, path_and_mode: str) -> None:
        path, _, mode = path_and_mode.rpartition(",")
        failure: OSError | None = None
        try:
            self._path(path).parent.mkdir(parents=True, exist_ok=True)
            file = self._path(path).open("wb")
        except OSError as error:
            file, failure = Path(os.devnull).open("wb"), error  # noqa: SIM115  (closed below)
        with file:
            while True:
                operation, size = struct.unpack("<4sI", self._read(8))
                if operation == b"DONE":
                    break
                data = self._read(size)
                if failure is None:
                    try:
                        file.write(data)
                        file.flush()
                    except OSError as error:
                        failure = error
        if failure is not None:
            raise failure
        self._path(path).chmod(stat.S_IMODE(int(mode)) or 0o644)
        self._write(b"OKAY" + struct.pack("<I", 0))

    def _send_file(self, path: str) -> None:
        with self._path(path).open("rb") as file:
            while data := file.read(65536):
                self._write(b"DATA" + struct.pack("<I", len(data)) + data)
        self._write(b"DONE" + struct.pack("<I", 0))


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--port", type=int, required=True)
    arguments.add_argument("--root", type=Path, required=True, help="what is / on the device")
    given = arguments.parse_args()
    listener = socket.create_server(("127.0.0.1", given.port))
    while True:
        peer, _ = listener.accept()
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        threading.Thread(target=Connection(peer, given.root.resolve()).serve, daemon=True).start()


if __name__ == "__main__":
    main()

"""The content-addressed store, with the programs for POSIX shells and for Windows."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from standins.local_transport import LocalTransport

from dilap.core.codec import file_sha256
from dilap.core.errors import InvalidInput, LinkLost, Unavailable
from dilap.profilers.links import store as stores
from dilap.profilers.links.shells import powershell
from dilap.profilers.links.store import Programs, Store, posix_programs, python_programs
from dilap.profilers.links.transports import Completed

PROGRAMS = {"posix": posix_programs(), "python": python_programs(sys.executable)}


class CountingTransport(LocalTransport):
    """Counts what it copies; `garble` changes the content on its way, `cut` ends the copy after so many bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.pushed: list[str] = []
        self.garble = 0
        self.cut: int | None = None

    def push(self, path: Path, remote: str, *, resume: bool = False) -> None:
        self.pushed.append(path.name)
        content = path.read_bytes()
        if self.cut is not None:
            Path(remote).write_bytes(content[: self.cut])
            raise LinkLost("cut")
        have = Path(remote).read_bytes() if resume else b""
        content = have + content[len(have) :]
        if self.garble:
            self.garble -= 1
            content = b"?" + content[1:]
        Path(remote).write_bytes(content)


@pytest.fixture(params=sorted(PROGRAMS))
def programs(request: pytest.FixtureRequest) -> Programs:
    return PROGRAMS[request.param]


@pytest.fixture
def transport() -> CountingTransport:
    return CountingTransport()


@pytest.fixture
def store(tmp_path: Path, transport: CountingTransport, programs: Programs) -> Store:
    return Store(transport, folder=str(tmp_path / "device"), programs=programs)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    path.write_bytes(os.urandom(5000))
    return path


def place(store: Store, path: Path, *, beside: Sequence[str] = ()) -> Path:
    companions = {name: file_sha256(path.with_name(name)) for name in beside}
    return Path(store.place(path, sha256=file_sha256(path), companions=companions))


def test_a_file_arrives(store: Store, model: Path) -> None:
    assert place(store, model).read_bytes() == model.read_bytes()


def test_files_that_belong_together_lie_together(store: Store, model: Path) -> None:
    model.with_name("model.onnx.data").write_bytes(b"weights")
    assert place(store, model, beside=["model.onnx.data"]).with_name("model.onnx.data").read_bytes() == b"weights"


def test_a_second_push_sends_nothing(store: Store, model: Path, transport: CountingTransport) -> None:
    place(store, model)
    place(store, model)
    assert transport.pushed == ["model.onnx"]


def test_a_damaged_file_on_the_device_is_sent_again(store: Store, model: Path, transport: CountingTransport) -> None:
    place(store, model).write_bytes(b"damaged")
    assert place(store, model).read_bytes() == model.read_bytes()


def test_an_interrupted_push_is_gone_on_with(store: Store, model: Path, transport: CountingTransport) -> None:
    transport.cut = 1000
    with pytest.raises(LinkLost, match="cut"):
        place(store, model)
    transport.cut = None
    assert place(store, model).read_bytes() == model.read_bytes()


def test_a_corrupted_part_is_sent_afresh(
    store: Store, model: Path, transport: CountingTransport, tmp_path: Path
) -> None:
    (tmp_path / "device" / "parts").mkdir(parents=True)
    (tmp_path / "device" / "parts" / file_sha256(model)).write_bytes(b"not how it begins")
    assert place(store, model).read_bytes() == model.read_bytes()
    assert transport.pushed == ["model.onnx"] * 2


def test_what_arrives_garbled_is_never_used(store: Store, model: Path, transport: CountingTransport) -> None:
    transport.garble = 9
    with pytest.raises(LinkLost, match="another content"):
        place(store, model)
    transport.garble = 0
    assert place(store, model).read_bytes() == model.read_bytes()


def test_the_oldest_files_go_when_the_store_is_full(
    store: Store, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores, "_LIMIT_BYTES", 0)
    old = tmp_path / "device" / "store" / "0123456789abcdef"
    old.mkdir(parents=True)
    (old / "model").write_bytes(bytes(9000))
    place(store, model)
    assert not old.exists()


def test_what_is_not_the_stores_own_stays(
    store: Store, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores, "_LIMIT_BYTES", 0)
    (tmp_path / "device" / "store").mkdir(parents=True)
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").touch()
    linked, *others = (tmp_path / "device" / "store" / name for name in ("f" * 16, "notes", "a b", "F" * 16, "f" * 17))
    linked.symlink_to(tmp_path / "precious")
    for one in others:
        one.mkdir()
    (tmp_path / "device" / "store" / ("e" * 16)).touch()
    place(store, model)
    assert linked.is_symlink()
    assert (tmp_path / "precious" / "file").exists()
    assert all(one.is_dir() for one in others)
    assert (tmp_path / "device" / "store" / ("e" * 16)).is_file()


def test_files_in_use_stay_when_the_device_is_full(
    store: Store, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = place(store, model)
    monkeypatch.setattr(stores, "_SPARE_BYTES", 1 << 60)
    (tmp_path / "other").write_bytes(bytes(9000))
    with pytest.raises(Unavailable):
        place(store, tmp_path / "other")
    assert first.exists()


def test_no_room_is_said_before_anything_is_sent(
    store: Store, model: Path, transport: CountingTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores, "_SPARE_BYTES", 1 << 60)
    with pytest.raises(Unavailable, match=r"MB free in .*device, .* MB are needed"):
        place(store, model)
    assert transport.pushed == []


@pytest.mark.parametrize("name", ["a b", "it's", "$(touch owned)", '"', "line\nbreak", "ünïcödé ☃", "-rf", "*"])
def test_a_hostile_name_is_only_a_name(store: Store, tmp_path: Path, name: str) -> None:
    (tmp_path / "here").mkdir()
    model = tmp_path / "here" / name
    model.write_bytes(b"content")
    placed = place(store, model)
    assert (placed.name, placed.read_bytes()) == (name, b"content")


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "..", "a\\b"])
def test_a_companion_cannot_leave_its_folder(store: Store, model: Path, name: str) -> None:
    with pytest.raises(InvalidInput, match="no file name"):
        store.place(model, sha256=file_sha256(model), companions={name: "0" * 64})


class TalkingTransport(LocalTransport):
    """Answers everything with the same words."""

    def run(self, argv: Sequence[str], *, seconds: float) -> Completed:
        return Completed(status=0, stdout="segmentation fault\n", stderr="")


def test_garbage_from_the_device_is_an_error(model: Path) -> None:
    store = Store(TalkingTransport(), folder="x", programs=posix_programs())
    with pytest.raises(LinkLost, match="segmentation fault"):
        place(store, model)


@pytest.mark.parametrize("program", ["survey", "accept", "evict"])
def test_the_programs_for_windows_pass_its_shell(program: str) -> None:
    argv = [*getattr(python_programs("python"), program), "C:/Users/me/" + "x" * 150]
    assert len(powershell(argv, seconds=1, mark="m" * 22)) < 8191


def test_a_folder_may_have_any_name(
    tmp_path: Path, transport: CountingTransport, programs: Programs, model: Path
) -> None:
    folder = tmp_path / 'it\'s $(touch owned) "here"'
    store = Store(transport, folder=str(folder), programs=programs)
    assert place(store, model).read_bytes() == model.read_bytes()

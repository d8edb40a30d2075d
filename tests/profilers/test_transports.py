"""ssh and adb for real: the system's clients against the device lab's sshd and phone."""

import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from standins.device_lab import HOSTILE, adb_transport, needs_lab, orphans, private_lab, processes, ssh_transport

from dilap.core.codec import file_sha256
from dilap.core.errors import InvalidInput, LinkLost
from dilap.profilers.links.adb import AdbTransport
from dilap.profilers.links.ssh import SshAddress, SshTransport
from dilap.profilers.links.store import Store, posix_programs
from dilap.profilers.links.transports import Transport

pytestmark = needs_lab
WAYS: dict[str, tuple[Callable[[], Transport], str]] = {
    "ssh": (ssh_transport, "/root"),
    "adb": (adb_transport, "/data/local/tmp"),
}


@pytest.fixture(scope="module", autouse=True)
def _adb(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with private_lab(tmp_path_factory.mktemp("home")):
        yield


@pytest.fixture(scope="module", params=sorted(WAYS))
def way(request: pytest.FixtureRequest) -> Iterator[tuple[Transport, str]]:
    connect, folder = WAYS[request.param]
    with closing(connect()) as transport:
        yield transport, folder


def test_programs_run_on_the_device(way: tuple[Transport, str]) -> None:
    assert way[0].run(["uname", "-m"], seconds=30).stdout == "aarch64\n"


def test_status_and_both_outputs_come_back(way: tuple[Transport, str]) -> None:
    done = way[0].run(["sh", "-c", "echo out; echo err >&2; exit 7"], seconds=30)
    assert (done.status, done.stdout, done.stderr) == (7, "out\n", "err\n")


def test_hostile_words_are_only_words(way: tuple[Transport, str]) -> None:
    assert way[0].run(["printf", "%s|", *HOSTILE], seconds=30).stdout == "|".join([*HOSTILE, ""])


def test_a_program_answers_lines(way: tuple[Transport, str]) -> None:
    with closing(way[0].start(["cat"], seconds=60)) as child:
        child.write("hello\n")
        assert child.read_line(timeout=30) == "hello\n"


def test_a_program_that_takes_too_long_is_stopped_on_the_device(way: tuple[Transport, str]) -> None:
    assert way[0].run(["sleep", "60"], seconds=1).status == 124
    assert orphans() == []


def test_a_cancelled_program_leaves_no_process(way: tuple[Transport, str]) -> None:
    child = way[0].start(["sh", "-c", "sleep 297 & sleep 298"], seconds=300)
    wait_until(lambda: any("sleep 298" in command for command in processes()))
    child.close()
    assert orphans() == []


def test_a_file_arrives_with_every_byte(way: tuple[Transport, str], tmp_path: Path) -> None:
    transport, folder = way
    (tmp_path / "sent").write_bytes(bytes(range(256)) * 4000)
    transport.push(tmp_path / "sent", f"{folder}/a file")
    found = transport.run(["sha256sum", f"{folder}/a file"], seconds=30).stdout
    assert found.split()[0] == file_sha256(tmp_path / "sent")


@pytest.mark.parametrize("name", ["a b", "it's", '"', "$(touch owned)", "ünïcödé ☃", "line\nbreak", "*"])
def test_a_local_file_of_any_name_is_pushed(way: tuple[Transport, str], tmp_path: Path, name: str) -> None:
    transport, folder = way
    (tmp_path / name).write_bytes(b"content")
    store = Store(transport, folder=f"{folder}/names", programs=posix_programs())
    place = store.place(tmp_path / name, sha256=file_sha256(tmp_path / name), companions={})
    assert transport.run(["cat", place], seconds=30).stdout == "content"


@pytest.mark.parametrize("name", ["a b", "it's $(touch owned)", '"', "ünïcödé ☃", "[*?]", "\\"])
def test_a_folder_of_any_name_keeps_files(way: tuple[Transport, str], tmp_path: Path, name: str) -> None:
    transport, folder = way
    (tmp_path / "model").write_bytes(b"content")
    store = Store(transport, folder=f"{folder}/folders/{name}", programs=posix_programs())
    place = store.place(tmp_path / "model", sha256=file_sha256(tmp_path / "model"), companions={})
    assert transport.run(["cat", place], seconds=30).stdout == "content"


def test_ssh_goes_on_with_a_part(tmp_path: Path) -> None:
    content = bytes(range(256)) * 4000
    (tmp_path / "half").write_bytes(content[:500_000])
    (tmp_path / "whole").write_bytes(content)
    with closing(ssh_transport()) as transport:
        transport.push(tmp_path / "half", "/root/part")
        transport.push(tmp_path / "whole", "/root/part", resume=True)
        said = transport.run(["sha256sum", "/root/part"], seconds=30).stdout
    assert said.split()[0] == file_sha256(tmp_path / "whole")


def test_a_closed_ssh_connection_leaves_no_process_there() -> None:
    with closing(ssh_transport()) as transport:
        transport.run(["true"], seconds=30)
    assert orphans() == []


def test_a_refused_connection_says_what_to_look_at() -> None:
    with closing(ssh_transport(port=1)) as transport, pytest.raises(LinkLost, match="is sshd running there"):
        transport.run(["true"], seconds=5)


def test_an_unknown_serial_says_what_lists_them() -> None:
    with pytest.raises(LinkLost, match="adb devices"):
        AdbTransport("no such phone $(id)").run(["true"], seconds=5)


@pytest.mark.parametrize("destination", ["-oProxyCommand=touch owned", "a b", "", "a\nb"])
def test_a_destination_is_no_option(destination: str) -> None:
    with pytest.raises(InvalidInput, match="no ssh destination"):
        SshTransport(SshAddress(destination=destination))


@pytest.mark.parametrize("serial", ["", "a\nb"])
def test_an_impossible_serial_is_refused(serial: str) -> None:
    with pytest.raises(InvalidInput, match="no adb serial"):
        AdbTransport(serial)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)

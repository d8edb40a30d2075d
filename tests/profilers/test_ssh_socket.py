"""Where the shared connection's socket lies: ssh refuses a path that is longer than a socket's name may be."""

import stat
import tempfile
from contextlib import closing
from pathlib import Path

import pytest

from dilap.core.errors import LinkLost
from dilap.profilers.links.ssh import SshAddress, SshTransport

LONGEST = 103  # bytes on macOS, with the end of the text; Linux has 107


@pytest.fixture
def long_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """For temporary files, as long as macOS's own or longer."""
    folder = tmp_path / ("x" * 60)
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    return folder


def socket_of(transport: SshTransport) -> Path:
    (option,) = [one for one in transport._options if one.startswith("-oControlPath=")]
    return Path(option.partition("=")[2])


@pytest.mark.usefixtures("long_folder")
def test_the_socket_is_short_and_ours_alone_where_temporary_files_are_far_away() -> None:
    with closing(SshTransport(SshAddress(destination="nobody@127.0.0.1", port=1))) as transport:
        path = socket_of(transport)
        assert len(str(path.with_name("x" * 40))) + len(".1234567890123456") <= LONGEST
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert not path.parent.exists()


@pytest.mark.usefixtures("long_folder")
def test_ssh_gets_as_far_as_the_network_where_temporary_files_are_far_away() -> None:
    with (
        closing(SshTransport(SshAddress(destination="nobody@127.0.0.1", port=1))) as transport,
        pytest.raises(LinkLost, match="is sshd running there"),
    ):
        transport.run(["true"], seconds=10)


@pytest.mark.usefixtures("long_folder")
def test_without_a_short_folder_every_command_connects_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dilap.profilers.links.ssh._MAX_SOCKET_FOLDER", 0)
    with closing(SshTransport(SshAddress(destination="nobody@127.0.0.1", port=1))) as transport:
        assert not any("Control" in option for option in transport._options)

"""200 faults at random points, over ssh and adb: whatever breaks, no wrong result, nothing left running, and a rerun
completes.

Every fault is one attempt that may fail with an error of ours; where it does, the same attempt again must not.
"""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from standins import STANDINS
from standins.device_lab import (
    ADB_PORT,
    LAB,
    SSH_PORT,
    adb_transport,
    agent_archive,
    needs_lab,
    orphans,
    private_lab,
    ssh_transport,
    write_devices,
)
from standins.fabricated import TINY_LAYER, tiny_llama
from standins.flaky_link import FlakyLink

from dilap import backends
from dilap.core.artifact import Artifact
from dilap.core.codec import encode, file_sha256, write_json
from dilap.core.errors import DilapError
from dilap.core.workload import Workload
from dilap.profilers.devices.device import Device
from dilap.profilers.instruments import agent as client
from dilap.profilers.links.store import Store, posix_programs
from dilap.profilers.links.transports import Transport
from dilap.profilers.profiler import Case, Profiler
from dilap.profilers.protocol import Protocol
from dilap.profilers.tables.entries import TableEntry, runs_of
from dilap.profilers.tables.table import LatencyTable, TableHeader

pytestmark = needs_lab
ARCHITECTURE = tiny_llama(TINY_LAYER, TINY_LAYER)
WORKLOAD = Workload(precision="f32", context=16)
ONCE = Protocol(
    warm_up_samples=1,
    warm_up_cap_seconds=0.0,
    max_seconds=0.0,
    min_rounds=1,
    lead_in_seconds=0.0,
    contention_share=1000.0,
)  # the seconds are made up
# bytes of both directions until a link is ready, and of one small command
HANDSHAKE = {"ssh": 6000, "adb": 300}
COMMAND = {"ssh": 2500, "adb": 1800}
RUNNER = STANDINS / "executor_runner.standin"
FOLDERS = {"ssh": "/root/faults", "adb": "/data/local/tmp/faults"}


@dataclass(frozen=True)
class Fault:
    """One fault: over which way, of which kind, and the seed of its place and time."""

    way: str
    kind: str
    seed: int

    @property
    def draw(self) -> random.Random:
        return random.Random(self.seed)

    def content(self, folder: Path) -> Path:
        """A file of its own."""
        path = folder / f"{self.way}-{self.seed}"
        path.write_bytes(random.Random(self.seed).randbytes(20_000 + 400 * self.seed))
        return path

    def link(self) -> FlakyLink:
        return FlakyLink(SSH_PORT if self.way == "ssh" else ADB_PORT)

    def connect(self, port: int) -> Transport:
        return ssh_transport(port) if self.way == "ssh" else adb_transport(port)

    def on_device(self, path: str) -> Path:
        """Where the lab keeps a file of the device."""
        return LAB / "jetson" / path.lstrip("/")


NUMBERS = {
    "cut push": 48,
    "cut run": 24,
    "corrupted part": 8,
    "corrupted file": 6,
    "full disk": 4,
    "slow": 2,
    "garbage": 2,
    "killed": 4,
    "clock": 2,
}
FAULTS = [
    Fault(way, kind, seed)
    for way in ("ssh", "adb")
    for seed, kind in enumerate(kind for kind, count in NUMBERS.items() for _ in range(count))
]
BATCHES = 5


@pytest.fixture(scope="module", autouse=True)
def _lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    for folder in FOLDERS.values():
        for left in (LAB / "jetson" / folder.lstrip("/")).parent.glob("faults*"):
            shutil.rmtree(left, ignore_errors=True)
    with private_lab(tmp_path_factory.mktemp("home")), pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(STANDINS)
        patch.setitem(backends.BACKENDS, "standin", "standin_backend:StandIn")
        backend = (STANDINS / "standin_backend.py").read_text()
        content = agent_archive(
            name="dilap/backends/__init__.py",
            replaced={"BACKENDS = {": 'BACKENDS = {\n    "standin": "dilap.backends.standin:StandIn",'},
            added={"dilap/backends/standin.py": backend},
        )
        patch.setattr(client, "agent_archive", lambda: content)
        yield


@pytest.mark.parametrize("batch", range(BATCHES))
def test_a_fault_leaves_nothing_wrong(batch: int, tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        results = pool.map(lambda fault: inject(fault, tmp_path), FAULTS[batch::BATCHES])
        outcomes = list(results)  # raises what an attempt raised
    assert orphans(seconds=15) == []
    assert any("failed" in outcome for outcome in outcomes), "no fault of this batch was felt"


def inject(fault: Fault, folder: Path) -> str:
    """One faulty attempt, and the clean one after it where it failed; what came of the first."""
    attempts: dict[str, Callable[[Fault, Path], str]] = {
        "cut push": cut_push,
        "cut run": cut_run,
        "corrupted part": corrupted_part,
        "corrupted file": corrupted_file,
        "full disk": full_disk,
        "slow": slow,
        "garbage": garbage,
        "killed": killed,
        "clock": clock,
    }
    try:
        return f"{fault}: {attempts[fault.kind](fault, folder)}"
    except Exception as error:
        raise AssertionError(f"{fault}: {error!r}") from error


def tried(attempt: Callable[[], object], *, mend: Callable[[], object] = lambda: None) -> str:
    """What an attempt, which checks its own result, came to. It may fail with an error of ours; not so when mended."""
    try:
        attempt()
    except DilapError as error:
        failure = str(error)
    else:
        return "went well"
    assert "\n" not in failure
    mend()
    attempt()
    return f"failed: {failure}"


def push(fault: Fault, port: int, path: Path) -> str:
    """Bring a file to the device, and look at it there without any of our code."""
    with closing(fault.connect(port)) as transport:
        files = Store(transport, folder=FOLDERS[fault.way], programs=posix_programs())
        place = files.place(path, sha256=file_sha256(path), companions={})
        assert fault.on_device(place).read_bytes() == path.read_bytes()
        return place


def cut_push(fault: Fault, folder: Path) -> str:
    path = fault.content(folder)
    whole = HANDSHAKE[fault.way] + 4 * COMMAND[fault.way] + path.stat().st_size

    def mend() -> None:
        for kept in fault.on_device(f"{FOLDERS[fault.way]}/store").glob(f"*/{path.name}"):
            assert kept.read_bytes() == path.read_bytes()
        link.mend()

    with fault.link() as link:
        link.cut_after = fault.draw.randrange(whole)
        return tried(lambda: push(fault, link.port, path), mend=mend)


def cut_run(fault: Fault, folder: Path) -> str:
    word = f"{fault.way}{fault.seed}"

    def run(port: int) -> None:
        with closing(fault.connect(port)) as transport:
            done = transport.run(["sh", "-c", 'sleep 0.3; echo "$1"; exit 3', "x", word], seconds=60)
            assert (done.status, done.stdout) == (3, f"{word}\n")

    with fault.link() as link:
        link.cut_after = fault.draw.randrange(HANDSHAKE[fault.way] + COMMAND[fault.way])
        return tried(lambda: run(link.port), mend=link.mend)


def corrupted_part(fault: Fault, folder: Path) -> str:
    path, draw = fault.content(folder), fault.draw
    part = fault.on_device(f"{FOLDERS[fault.way]}/parts/{file_sha256(path)}")
    part.parent.mkdir(parents=True, exist_ok=True)
    part.write_bytes(draw.randbytes(draw.randrange(2 * path.stat().st_size)))
    with fault.link() as link:
        return tried(lambda: push(fault, link.port, path))


def corrupted_file(fault: Fault, folder: Path) -> str:
    path = fault.content(folder)
    with fault.link() as link:
        place = fault.on_device(push(fault, link.port, path))
        content = bytearray(place.read_bytes())
        content[fault.draw.randrange(len(content))] ^= 255
        place.write_bytes(content)
        return tried(lambda: push(fault, link.port, path))


def full_disk(fault: Fault, folder: Path) -> str:
    """A disk that has less room than it says, then enough."""
    path = fault.content(folder)
    mount = fault.on_device(f"{FOLDERS[fault.way]}-full-{fault.seed}")
    mount.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "none", str(mount)], check=True)
    remote = "/" + str(mount.relative_to(LAB / "jetson"))

    def fill(port: int) -> None:
        with closing(fault.connect(port)) as transport:
            files = Store(transport, folder=remote, programs=posix_programs())
            files._make_room = lambda num_bytes, free: None  # type: ignore[method-assign]
            files.place(path, sha256=file_sha256(path), companions={})

    def mend() -> None:
        assert not list(mount.glob(f"store/*/{path.name}"))
        subprocess.run(["mount", "-o", "remount,size=4m", str(mount)], check=True)

    try:
        with fault.link() as link:
            outcome = tried(lambda: fill(link.port), mend=mend)
            assert "failed" in outcome
            assert next(mount.glob(f"store/*/{path.name}")).read_bytes() == path.read_bytes()
    finally:
        subprocess.run(["umount", "-l", str(mount)], check=True)
    return outcome


def slow(fault: Fault, folder: Path) -> str:
    with fault.link() as link:
        link.bytes_per_second = 30_000
        push(fault, link.port, fault.content(folder))
    return "went well"


def device(fault: Fault, port: int, folder: Path, *, runner: Path | None = None) -> Device:
    """The lab's device behind a link of this fault."""
    toml = folder / f"{fault.way}-{fault.seed}.toml"
    registry = write_devices(toml, ssh_port=port, adb_port=port, folder=f"faults-{fault.seed}")
    found = registry.group("jetson_cpu")[0] if fault.way == "ssh" else registry.get("s23")
    if runner is not None and found.location is not None:
        found = replace(found, location=replace(found.location, runner=str(runner)))
    return found


def measure(fault: Fault, port: int, folder: Path, *, runner: Path) -> None:
    """Measure a file, whose size is its latency, into a table that is read back."""
    path = model(fault, folder)
    backend = "standin" if fault.way == "ssh" else "executorch"
    profiler = Profiler(device(fault, port, folder, runner=runner), backend=backend, force=True)
    (found,) = profiler.measure([Case(path=path, workload=WORKLOAD)], ONCE)
    expected = path.stat().st_size * (1 if fault.way == "ssh" else 1000)
    assert set(found.samples_ns) == {expected}
    header = TableHeader(
        fingerprint=found.fingerprint,
        workload=WORKLOAD,
        architecture=ARCHITECTURE,
        backend=backend,
        protocol=ONCE,
        created=found.started,
    )
    entry = TableEntry(
        role="dense",
        runs=runs_of(ARCHITECTURE.layers),
        samples_ns=found.samples_ns,
        sentinel_ns=found.samples_ns,
        status="ok",
    )
    LatencyTable(header, (entry,)).write(path.with_name("table.jsonl"))


def model(fault: Fault, folder: Path) -> Path:
    """A "model" that the stand-ins load, with its sidecar."""
    path = folder / f"model-{fault.way}-{fault.seed}" / "model.pte"
    if not path.exists():
        path.parent.mkdir()
        path.write_bytes(bytes(5000 + fault.seed))
        artifact = Artifact(
            path=path.name,
            format="pte",
            backend="executorch",
            precision="f32",
            plan_digest="",
            architecture=ARCHITECTURE,
            sha256=file_sha256(path),
            num_bytes=path.stat().st_size,
            sqnr_db=None,
            details={"max_context": 64},
        )
        write_json(path.with_name("artifact.json"), encode(artifact))
    return path


def tried_measuring(fault: Fault, folder: Path, *, runner: Path = RUNNER) -> str:
    """Measure with that runner; where it fails there is no damaged table, and the real one completes."""
    table = model(fault, folder).with_name("table.jsonl")
    runners = iter((runner, RUNNER))

    def mend() -> None:
        assert not table.exists() or len(LatencyTable.read(table).entries) == 1

    with fault.link() as link:
        outcome = tried(lambda: measure(fault, link.port, folder, runner=next(runners)), mend=mend)
    assert len(LatencyTable.read(table).entries) == 1
    return outcome


def garbage(fault: Fault, folder: Path) -> str:
    """What is printed around and between the answers: by a login shell, or by a runner that goes wild."""
    noise = fault.draw.randbytes(200).replace(b"\0", b"?").replace(b"\n", b"?")
    if fault.way == "ssh":
        with ExitStack() as stack:
            talkative = LAB / "jetson" / "root" / ".bashrc"
            stack.callback(talkative.unlink, missing_ok=True)
            talkative.write_bytes(b"printf '%s\\n' '" + noise.replace(b"'", b"?") + b"'\n")
            return tried_measuring(fault, folder)
    runner = folder / f"executor_runner.{fault.seed}"
    script = RUNNER.read_bytes()
    runner.write_bytes(script.replace(b"while read -r line; do", b"while read -r line; do\n" + b'echo "$$ \xff{"', 1))
    return tried_measuring(fault, folder, runner=runner)


def killed(fault: Fault, folder: Path) -> str:
    """The program that measures is killed at some moment."""
    word = f"faults-{fault.seed}/store" if fault.way == "ssh" else f"executor_runner.{fault.seed}"
    runner = folder / f"executor_runner.{fault.seed}"
    shutil.copyfile(RUNNER, runner)
    over = threading.Event()
    killer = threading.Thread(target=kill_soon, args=(word, fault.draw.random(), over))
    killer.start()
    try:
        return tried_measuring(fault, folder, runner=runner)
    finally:
        over.set()
        killer.join()


def kill_soon(word: str, seconds: float, over: threading.Event) -> None:
    """Wait for a process of the devices with that word in its command line, and kill it a moment later."""
    while not over.is_set():
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError, ProcessLookupError):
                inside = os.readlink(process / "root") == str(LAB / "jetson")
                if inside and word.encode() in (process / "cmdline").read_bytes():
                    time.sleep(seconds)
                    os.kill(int(process.name), signal.SIGKILL)
                    return
        time.sleep(0.05)


def clock(fault: Fault, folder: Path) -> str:
    """A clock that jumps: the runner's own, or this machine's wall clock."""
    if fault.way == "ssh":
        with pytest.MonkeyPatch.context() as patch:
            jump = fault.draw.choice([-3600.0, 86400.0])
            real = time.time
            patch.setattr(time, "time", lambda: real() + jump)
            return tried_measuring(fault, folder)
    runner = folder / f"executor_runner.{fault.seed}"
    jump = fault.draw.randrange(100_000, 1_000_000)
    script = RUNNER.read_text().replace("clock=$((clock + size));", f"clock=$((clock + size - {jump}));", 1)
    runner.write_text(script)
    outcome = tried_measuring(fault, folder, runner=runner)
    assert "clock went backwards" in outcome
    return outcome

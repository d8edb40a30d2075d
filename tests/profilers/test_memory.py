"""What a device's kernel says of a program's memory, by the real sh and /proc of this machine."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from standins.local_transport import LocalTransport

from dilap.core.errors import Unavailable
from dilap.core.workload import Workload
from dilap.profilers.instruments import memory
from dilap.profilers.instruments.runners import Job, LlamaBench

MEGABYTES = 64
HUNGRY = f"import time; held = bytearray({MEGABYTES} << 20); time.sleep(0.3)"
SAYS = 'echo \'{"n_gen": 8, "samples_ns": [8000, 8000]}\''


def test_a_program_is_watched_to_its_end() -> None:
    done = subprocess.run(
        memory.watched_start([sys.executable, "-c", f"{HUNGRY}; print('said'); exit(3)"]),
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stdout, memory.other_words(done.stderr)) == (3, "said\n", "")
    average = memory.average_bytes(done.stderr)
    assert average is not None
    assert average <= memory.peak_bytes(done.stderr)
    assert MEGABYTES << 20 < memory.peak_bytes(done.stderr) < (MEGABYTES + 200) << 20


def test_a_running_process_is_watched() -> None:
    said = subprocess.run(
        memory.watched_process(str(os.getpid())), capture_output=True, text=True, check=True, timeout=60
    )
    assert said.stdout.endswith(memory.END)
    average = memory.average_bytes(said.stdout)
    assert average is not None
    assert 0 < average <= memory.peak_bytes(said.stdout)


def test_what_is_not_said_is_unknown() -> None:
    assert (memory.peak_bytes("grep: no such file"), memory.average_bytes("")) == (0, None)


def bench(folder: Path, script: str) -> tuple[str, Job]:
    program = folder / "llama-bench"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    model = folder / "model.gguf"
    return str(program), Job(model=str(model), local=model, workload=Workload(), prefix=(), put=lambda name, _: name)


def test_a_program_that_starts_for_every_sample_tells_its_memory(tmp_path: Path) -> None:
    session = LlamaBench().open(LocalTransport(), *bench(tmp_path, f"sleep 0.2; {SAYS}"))
    average = session.average_memory(50)
    assert average is not None
    assert 0 < average <= session.peak_memory_bytes * 2  # two starts of one shell
    assert session.sample(2) == [1000, 1000]


def test_an_error_of_a_watched_program_is_its_own_words(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match=r"status 1: no such tensor$"):
        LlamaBench().open(LocalTransport(), *bench(tmp_path, "echo no such tensor >&2; sleep 0.1; exit 1"))
